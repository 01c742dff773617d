"""Who reads a line from the terminal: prompt_toolkit (``pip install imds[cli]``), or else Python's own input.

Both bring back lines by the arrow keys and complete commands and their keywords by Tab. prompt_toolkit also
shows behind the cursor what the command still wants.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Protocol

from imds.shell.history import History
from imds.shell.line import begun
from imds.shell.usage import completions

PROMPT = "imds> "


class Editor(Protocol):
    """Reads what a person types."""

    def read(self) -> str:
        """Return a line, or several that were pasted. Raises EOFError, KeyboardInterrupt."""


def make_editor(history: History) -> Editor:
    """Return the best editor for this terminal."""
    if os.environ.get("TERM", "dumb") != "dumb" and sys.stdout.isatty():
        try:
            from imds.shell.toolkit import ToolkitEditor

            return ToolkitEditor(history)
        except ImportError:
            pass
    return PlainEditor(history)


def suggestions(typed: str) -> tuple[str, list[str]]:
    """Return the word that a line ends in, and the words that it may become."""
    found = begun(typed.encode(errors="surrogateescape"))
    if found is None:
        return "", []
    tokens, word = found
    text = word.decode(errors="surrogateescape")
    return text, completions(tokens, text) if typed.endswith(text) else []


class PlainEditor:
    """input(), with readline where Python has it."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._remember: Callable[[str], None] | None = None
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # any bytes may be typed
        try:
            import readline
        except ImportError:
            return

        def complete(_: str, state: int) -> str | None:
            _, words = suggestions(readline.get_line_buffer()[: readline.get_endidx()])
            return f"{words[state]} " if state < len(words) else None

        readline.set_auto_history(False)
        readline.clear_history()
        for line in history.lines:
            readline.add_history(line)
        readline.set_completer_delims(" \t\n")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")
        self._remember = readline.add_history

    def read(self) -> str:
        line = input(PROMPT)
        if self._history.add(line) and self._remember:
            self._remember(line)
        return line
