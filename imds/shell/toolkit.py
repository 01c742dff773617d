"""The line editor of prompt_toolkit: completion in a menu, hints behind the cursor, search in the history."""

from __future__ import annotations

import os
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History as ToolkitHistory
from prompt_toolkit.input import Input
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.styles import Style

from imds.commands import COMMANDS
from imds.shell.editor import PROMPT, suggestions
from imds.shell.history import History
from imds.shell.line import begun
from imds.shell.usage import hint

_STYLE = Style.from_dict({"hint": "ansibrightblack italic"})  # italic is left where there are no colours


class ToolkitEditor:
    """Reads lines by prompt_toolkit; ``input`` and ``output`` are the terminal unless a test gives others."""

    def __init__(self, history: History, input: Input | None = None, output: Output | None = None) -> None:
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=_Remembered(history),
            completer=_Commands(),
            complete_while_typing=False,
            input_processors=[_Hint()],
            style=_STYLE,
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            enable_suspend=True,
            input=input,
            output=output,
        )

    def read(self) -> str:
        return self._session.prompt()


class _Remembered(ToolkitHistory):
    """Our history, as prompt_toolkit asks for it."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._history.lines)

    def append_string(self, string: str) -> None:
        for line in string.splitlines():
            if self._history.add(line):
                super().append_string(line)

    def store_string(self, string: str) -> None:
        """Our history has stored it."""


class _Commands(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed, words = suggestions(document.text_before_cursor)
        for word in words:
            row = COMMANDS.get(word.lower()) if typed == document.text_before_cursor.lstrip() else None
            yield Completion(f"{word} ", -len(typed), display=word, display_meta=row.summary if row else "")


class _Hint(Processor):
    """Shows, behind a line that the cursor is at the end of, what its command still wants."""

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        fragments = transformation_input.fragments
        document = transformation_input.document
        if (
            transformation_input.lineno == document.line_count - 1
            and document.is_cursor_at_the_end
            and not get_app().is_done  # a line that was entered stays on the screen without it
            and (text := hint_after(document.text))
        ):
            fragments = [*fragments, ("class:hint", text)]
        return Transformation(fragments)


def hint_after(typed: str) -> str:
    """Return what to show behind a line that is being typed."""
    found = begun(typed.encode(errors="surrogateescape"))
    if found is None:
        return ""
    tokens, word = found
    text = hint([*tokens, word] if word else tokens)
    return f" {text}" if text and word else text
