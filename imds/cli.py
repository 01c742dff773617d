"""imds-cli: commands from a prompt, a command line or a pipe.

At a terminal a payload is shown as it is, if that is plain text, otherwise quoted, with escapes that may
be typed again. When the output goes elsewhere, the payload of one command (``imds-cli get logo > file``)
is written as its very bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from imds import __version__
from imds.client import Client, ConnectionError, ImdsError, Response
from imds.commands import COMMANDS, lookup
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT, ERROR, LIST, MISSING, OK

PROMPT = "imds> "

# Exit codes; EX_USAGE as sysexits.h has it.
EX_OK, EX_MISSING, EX_SERVER, EX_CONNECTION, EX_USAGE = 0, 1, 2, 3, 64

_EPILOG = """\
Without a command, commands are read from the terminal, or line by line from a pipe. Arguments with spaces
are quoted: 'as it is', or "with \\n \\t \\\\ \\" \\x00 escapes".

environment: IMDS_HOST, IMDS_PORT, IMDS_UNIX are the defaults of --host, --port, --unix.

exit codes: 0 done; 1 missing; 2 the server answered by an error; 3 the server cannot be reached, went away or
did not answer in time; 64 wrong usage. Of many lines from a pipe, the highest, where missing counts as done.
"""


# The connection, and its options: also for scripts.


class Parser(argparse.ArgumentParser):
    """An argument parser with the options that say where the server is; leaves with EX_USAGE."""

    def __init__(self, **options: object) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,  # type: ignore[arg-type]
        )
        self.add_argument("-H", "--host", help=f"name or address of the server (default {DEFAULT_HOST})")
        self.add_argument("-p", "--port", help=f"its port (default {DEFAULT_PORT})")
        self.add_argument("--unix", metavar="PATH", help="its Unix socket, instead of host and port")
        self.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=_seconds,
            default=5.0,
            help="how long to wait for a reply (default 5, 0 for ever)",
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")

    def client(self, args: argparse.Namespace) -> Client[bytes]:
        """Return a client of the server that the options, or else the environment, name."""
        unix, env = args.unix, os.environ.get
        if unix is None and args.host is None and args.port is None:
            unix = env("IMDS_UNIX") or None
        host = args.host or env("IMDS_HOST") or DEFAULT_HOST
        if args.port is not None:
            source, port = "--port", args.port
        else:
            source, port = "IMDS_PORT", env("IMDS_PORT") or str(DEFAULT_PORT)
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            self.error(f"{source} {port!r}: must be a whole number from 1 to 65535")
        return Client(host, int(port), unix=unix, timeout=args.timeout or None)


def discard_output() -> None:
    """Whoever read our output has seen enough, and Python's last flush must not complain about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds"


# A line to its tokens, and a payload to text.

_PIECE = re.compile(
    rb"""(?P<space> \s+ )
       | ' (?P<single> [^']* ) '
       | " (?P<double> (?: [^"\\] | \\. )* ) "
       | \\ (?P<escaped> . )
       | (?P<plain> [^\s'"\\]+ )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_CONTROLS = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"0": b"\0"}


def split_line(line: bytes) -> list[bytes]:
    """Return the tokens of a command line. Raises ValueError for a quote that is not closed.

    Spaces separate tokens. In single quotes everything is itself; in double quotes ``\\n \\r \\t \\0 \\xNN``
    are bytes, and a backslash before anything else stands for that; outside it makes the next byte plain.
    """
    tokens: list[bytes] = []
    inside = False  # a token has begun: "a'b c'" is one token, and '' is one too
    pos = 0
    while pos < len(line):
        piece = _PIECE.match(line, pos)
        if piece is None:
            quote = line[pos : pos + 1].decode()
            raise ValueError("nothing follows the last \\" if quote == "\\" else f"no closing {quote}")
        pos = piece.end()
        if piece["space"] is not None:
            inside = False
            continue
        if not inside:
            tokens.append(b"")
            inside = True
        if piece["double"] is not None:
            tokens[-1] += _ESCAPE.sub(_unescape, piece["double"])
        else:
            tokens[-1] += piece[piece.lastgroup or 0]
    return tokens


def _unescape(escape: re.Match[bytes]) -> bytes:
    code = escape[1]
    if len(code) == 3:
        return bytes.fromhex(code[1:].decode())
    if code == b"x":
        raise ValueError("\\x needs two hexadecimal digits")
    return _CONTROLS.get(code, code)


def quote(payload: bytes) -> str:
    """Return ``payload`` as it is if it is plain text, otherwise in double quotes and escaped."""
    text = payload.decode(errors="surrogateescape")
    if text and text.isprintable() and text == text.strip() and text[0] not in '"(':
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '\\"':
        return "\\" + char
    if char.isprintable():
        return char
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return names.get(char) or "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))


def render(reply: Response) -> str:
    """Return a reply as people read it: one line, or one for each element of a list."""
    if error := reply.error():
        return f"(error) {quote(error.message.encode())}"
    if reply.status == MISSING:
        return "(nil)"
    if reply.status == OK:
        return quote(reply.payload)
    if reply.status != LIST:
        return f"(status {reply.status}) {quote(reply.payload)}"
    items = reply.items()
    width = len(str(len(items)))
    lines = [f"{n:>{width}}) {'(nil)' if item is None else quote(item)}" for n, item in enumerate(items, 1)]
    return "\n".join(lines) or "(empty list)"


def help_text(tokens: Sequence[bytes]) -> str | None:
    """Return what ``help`` or ``help COMMAND`` shows, or None if ``tokens`` do not ask for it."""
    if tokens[0].lower() != b"help":
        return None
    if len(tokens) == 1:
        width = max(len(row.usage) for row in COMMANDS.values())
        rows = [f"  {row.usage:<{width}}  {row.summary}" for row in COMMANDS.values()]
        return "\n".join([*rows, f"  {'help [command]':<{width}}  this", f"  {'exit':<{width}}  leave"])
    row = lookup(tokens[1])
    if row is None:
        return f"no command is called {quote(tokens[1])}; help lists them all"
    return f"{row.usage}\n  {row.summary}"


# The three ways to run commands.


def run_one(client: Client[bytes], tokens: Sequence[bytes], newline: bool) -> int:
    """Run the command of a command line and return the exit code."""
    if help_ := help_text(tokens):
        _say(help_)
        return EX_OK
    reply = client.execute(*tokens)
    if reply.status == ERROR:
        print(render(reply), file=sys.stderr)
        return EX_SERVER
    if sys.stdout.isatty():
        _say(render(reply))
    elif reply.status != MISSING:
        items = reply.items() if reply.status == LIST else [reply.payload]
        sys.stdout.flush()
        sys.stdout.buffer.write(b"\n".join(item or b"" for item in items) + (b"\n" if newline else b""))
        sys.stdout.buffer.flush()
    return EX_MISSING if reply.status == MISSING else EX_OK


def run_lines(client: Client[bytes], lines: Iterable[bytes]) -> int:
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
        if _leaves(tokens):
            break
        if help_ := help_text(tokens):
            _say(help_)
            continue
        reply = client.execute(*tokens)
        _say(render(reply))
        if reply.status == ERROR:
            worst = max(worst, EX_SERVER)
    return worst


def run_prompt(client: Client[bytes]) -> int:
    """Talk to the person at the terminal until exit or the end of input. Only they decide to leave."""
    _edit_lines()
    try:
        client.connect()
        _say(f"imds-cli {__version__}, connected to {client.address}; help lists the commands, exit leaves")
    except ImdsError as error:
        _say(f"(error) {error}")
    while True:
        try:
            line = input(PROMPT)
        except KeyboardInterrupt:
            _say("")
            continue
        except EOFError:
            _say("")
            return EX_OK
        try:
            tokens = split_line(line.encode(errors="surrogateescape"))
            if not tokens:
                continue
            if _leaves(tokens):
                return EX_OK
            _say(help_text(tokens) or _answer(client, tokens))
        except KeyboardInterrupt:
            _say("(interrupted; the command may have been carried out)")
        except ConnectionError as error:
            _say(f"(error) {error}; the next command connects again")
        except (ImdsError, ValueError) as error:
            _say(f"(error) {error}")


def _answer(client: Client[bytes], tokens: Sequence[bytes]) -> str:
    before = client.connects
    text = render(client.execute(*tokens))
    return text if client.connects == before or not before else f"(connected again)\n{text}"


def _leaves(tokens: Sequence[bytes]) -> bool:
    return len(tokens) == 1 and tokens[0].lower() in (b"exit", b"quit")


def _edit_lines() -> None:
    """Let readline edit the line and complete command names, where Python has it."""
    try:
        import readline
    except ImportError:
        return
    names = [*COMMANDS, "help", "exit"]

    def complete(text: str, state: int) -> str | None:
        first = not readline.get_line_buffer()[: readline.get_begidx()].strip()
        found = [f"{name} " for name in names if first and name.startswith(text.lower())]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def _say(text: str) -> None:
    """Print ``text``, whatever the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = Parser(prog="imds-cli", description="Talk to an imds server.", epilog=_EPILOG)
    parser.add_argument("-n", "--no-newline", action="store_true", help="write a payload without a newline")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="a command and its arguments, such as: get foo"
    )
    args = parser.parse_args(argv)
    tokens = [os.fsencode(word) for word in args.command]
    with parser.client(args) as client:
        try:
            if tokens:
                return run_one(client, tokens, not args.no_newline)
            if sys.stdin.isatty():
                return run_prompt(client)
            return run_lines(client, sys.stdin.buffer)
        except BrokenPipeError:
            discard_output()
            return EX_OK
        except ImdsError as error:
            print(f"imds-cli: {error}", file=sys.stderr)
            return EX_CONNECTION
        except ValueError as error:  # a request over the limits
            print(f"imds-cli: {error}", file=sys.stderr)
            return EX_USAGE
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
