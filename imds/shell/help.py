"""What ``help`` says, from the table of commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imds.commands import COMMANDS, Command, lookup
from imds.shell.line import quote
from imds.shell.output import heading


def help_text(tokens: Sequence[bytes], colour: bool = False) -> str | None:
    """Return what ``help`` or ``help COMMAND`` shows, or None if ``tokens`` do not ask for it."""
    if tokens[0].lower() != b"help":
        return None
    if len(tokens) == 1:
        return _rows([*_lines(COMMANDS.values()), ("help [command]", "this"), ("exit", "leave")])
    if row := lookup(tokens[1]):
        kind = "write" if row.write else "read" if row.in_store else "about the server"
        return f"{heading(row.usage, colour)}\n  {row.summary}\n  {kind}; goes to: {row.spread.value}"
    begun = tokens[1].lower().decode(errors="replace")
    if found := [row for row in COMMANDS.values() if begun and row.name.startswith(begun)]:
        return _rows(_lines(found))
    return f"no command is called {quote(tokens[1])}; help lists them all"


def _lines(rows: Iterable[Command]) -> list[tuple[str, str]]:
    return [(row.usage, row.summary) for row in rows]


_WIDEST = 44  # a longer usage has its summary on a line of its own, so that lines stay readable


def _rows(lines: Sequence[tuple[str, str]]) -> str:
    width = min(_WIDEST, max(len(usage) for usage, _ in lines))
    return "\n".join(
        f"  {usage:<{width}}  {summary}" if len(usage) <= width else f"  {usage}\n  {'':<{width}}  {summary}"
        for usage, summary in lines
    )
