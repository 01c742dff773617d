"""Commands from a command line, and lines of commands from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from imds.client import Client
from imds.protocol import ERROR, MISSING
from imds.shell.help import help_text
from imds.shell.line import split_line
from imds.shell.options import EX_MISSING, EX_OK, EX_SERVER, EX_USAGE
from imds.shell.output import Form, encode, render, say, value, wants_colour, write
from imds.shell.prompt import leaves


def run_one(client: Client[bytes], tokens: Sequence[bytes], form: Form | None, newline: bool) -> int:
    """Run the command of a command line and return the exit code.

    Without a ``form`` that is asked for, text goes to a terminal, and elsewhere the bytes, or nothing for a
    missing one.
    """
    colour = wants_colour(sys.stdout)
    if help_ := help_text(tokens, colour):
        say(help_)
        return EX_OK
    reply = client.execute(*tokens)
    missing = reply.status == MISSING
    if reply.status == ERROR:
        print(render(reply, colour=wants_colour(sys.stderr)), file=sys.stderr)
        return EX_SERVER
    if form is Form.TEXT or (form is None and sys.stdout.isatty()):
        say(render(reply, tokens[0], colour))
    elif form is not None or not missing:
        write(encode(value(reply, tokens[0]), form or Form.RAW) + (b"\n" if newline else b""))
    return EX_MISSING if missing else EX_OK


def run_lines(client: Client[bytes], lines: Iterable[bytes], form: Form) -> int:
    """Run commands from a pipe until its end, or until the connection is lost; return the exit code."""
    worst = EX_OK
    for number, line in enumerate(lines, 1):
        try:
            tokens = split_line(line)
        except ValueError as error:
            print(f"imds-cli: line {number}: {error}", file=sys.stderr)
            worst = EX_USAGE
            continue
        if not tokens:
            continue
        if leaves(tokens):
            break
        if help_ := help_text(tokens):
            say(help_)
            continue
        reply = client.execute(*tokens)
        if reply.status == ERROR:
            worst = max(worst, EX_SERVER)
        if form is Form.TEXT:
            say(render(reply, tokens[0]))
        elif reply.status == ERROR and form is not Form.JSON:
            print(f"imds-cli: line {number}: {render(reply)}", file=sys.stderr)
        else:
            write(encode(value(reply, tokens[0]), form) + b"\n")
    return worst
