"""The conversation at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from imds import __version__
from imds.client import Client, ConnectionError, ImdsError
from imds.shell.editor import Editor
from imds.shell.help import help_text
from imds.shell.line import split_line
from imds.shell.options import EX_OK
from imds.shell.output import Form, encode, error_text, render, say, value, write


def leaves(tokens: Sequence[bytes]) -> bool:
    """Whether a line means to leave."""
    return len(tokens) == 1 and tokens[0].lower() in (b"exit", b"quit")


class Conversation:
    """Carries out what a person types, until they leave. Only they decide to."""

    def __init__(self, client: Client[bytes], editor: Editor, form: Form, colour: bool) -> None:
        self._client = client
        self._editor = editor
        self._form = form
        self._colour = colour

    def run(self) -> int:
        """Talk until exit or the end of input; return the exit code."""
        try:
            self._client.connect()
            say(
                f"imds-cli {__version__}, connected to {self._client.address}; "
                "help lists the commands, exit leaves"
            )
        except ImdsError as error:
            self._complain(str(error))
        while True:
            try:
                typed = self._editor.read()
            except KeyboardInterrupt:
                say("")
                continue
            except EOFError:
                say("")
                return EX_OK
            for line in typed.splitlines():
                if not self._carry_out(line):
                    return EX_OK

    def _carry_out(self, line: str) -> bool:
        """Carry out one line; return whether to go on."""
        try:
            tokens = split_line(line.encode(errors="surrogateescape"))
            if not tokens:
                return True
            if leaves(tokens):
                return False
            if help_ := help_text(tokens, self._colour):
                say(help_)
            else:
                self._answer(tokens)
        except KeyboardInterrupt:
            say("(interrupted; the command may have been carried out)")
        except ConnectionError as error:
            self._complain(f"{error}; the next command connects again")
        except (ImdsError, ValueError) as error:
            self._complain(str(error))
        return True

    def _answer(self, tokens: Sequence[bytes]) -> None:
        before = self._client.connects
        reply = self._client.execute(*tokens)
        if before and self._client.connects != before:
            say("(connected again)")
        if self._form is Form.TEXT or reply.error():
            say(render(reply, tokens[0], self._colour))
        else:
            write(encode(value(reply, tokens[0]), self._form) + b"\n")

    def _complain(self, text: str) -> None:
        say(error_text(text, self._colour))
