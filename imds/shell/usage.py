"""A command's usage, read as a grammar: which words may come next, and what is still to be typed.

::

    usage    name element*
    element  word | [ element* ]          what is in brackets may be left out; its element* may also be
    word     part | part|part ...         alternatives: [EX seconds|PX milliseconds|PERSIST]
    part     CAPITALS                     a keyword, typed as it is, in any case
             letters                      an argument
             ...                          what is before it in the brackets may come again

In brackets a bar between a keyword and an argument separates alternatives of several words; one between
two words of a kind, such as ``AGGREGATE SUM|MIN|MAX``, only those words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from imds.commands import COMMANDS, lookup

_PIECE = re.compile(r"[\[\]]|[^\s\[\]]+")
_AGAIN = "..."


@dataclass(frozen=True, slots=True)
class Word:
    """One token: one of the keywords ``parts``, or an argument that has these names."""

    parts: tuple[str, ...]

    @property
    def keyword(self) -> bool:
        return self.parts[0].isupper()

    def __str__(self) -> str:
        return "|".join(self.parts)


@dataclass(frozen=True, slots=True)
class Group:
    """What may be left out: one of ``branches``, as often as one likes if it ``repeats``."""

    branches: tuple[tuple[Word | Group, ...], ...]
    repeats: bool

    def __str__(self) -> str:
        text = "|".join(" ".join(map(str, branch)) for branch in self.branches)
        return f"[{text} {_AGAIN}]" if self.repeats and text != _AGAIN else f"[{text}]"


Elements = tuple[Word | Group, ...]


@cache
def parse(usage: str) -> Elements:
    """Return the elements of what follows the name. Raises ValueError where a bracket is not closed."""
    pieces = iter(_PIECE.findall(usage.partition(" ")[2]))
    (branch,), _ = _branches(pieces, inner=False)
    return branch


def _branches(pieces: Iterator[str], inner: bool) -> tuple[list[Elements], bool]:
    """Return the alternatives up to the bracket's end (``inner``) or the text's; whether they repeat."""
    branches: list[Elements] = []
    branch: list[Word | Group] = []
    repeats = False
    for piece in pieces:
        if piece == "]" and inner:
            return [*branches, tuple(branch)], repeats
        if piece == "[":
            found, again = _branches(pieces, inner=True)
            branch.append(Group(tuple(found), again))
        elif piece == _AGAIN and inner:
            repeats = True
            if not branch:
                branch.append(Word((_AGAIN,)))
        else:
            first, *others = _words(piece)
            branch.append(first)
            for word in others:
                branches.append(tuple(branch))
                branch = [word]
    if inner:
        raise ValueError("a bracket is not closed")
    return [tuple(branch)], False


def _words(piece: str) -> list[Word]:
    """Return one word, or several where keywords and arguments are mixed."""
    parts = piece.split("|")
    if len({part.isupper() for part in parts}) == 1:
        return [Word(tuple(parts))]
    return [Word((part,)) for part in parts]


def advance(elements: Elements, token: str) -> Elements | None:
    """Return what may follow after ``token`` where ``elements`` were expected, or None if it fits nowhere.

    A token that may be a keyword is one. Groups of keywords come in any order.
    """
    wanted = token.upper()
    for position, element in enumerate(elements):
        if isinstance(element, Word):
            if element.keyword and wanted in element.parts:
                return elements[position + 1 :]
            break
        for branch in element.branches:
            first = branch[0]
            if isinstance(first, Word) and first.keyword and wanted in first.parts:
                before = tuple(other for other in elements[:position] if _keywords(other))
                rest = branch[1:]
                again = (Group((rest,), True),) if element.repeats and rest else ()
                return (*rest, *again, *before, *elements[position + 1 :])
    for position, element in enumerate(elements):
        if isinstance(element, Word):
            return None if element.keyword else elements[position + 1 :]
        if not _keywords(element):
            rest = element.branches[0][1:]
            again = (element,) if element.repeats else ()
            return (*rest, *again, *elements[:position], *elements[position + 1 :])
    return None


def keywords(elements: Elements) -> list[str]:
    """Return the keywords that may come next."""
    found: list[str] = []
    for element in elements:
        if isinstance(element, Word):
            return found + list(element.parts if element.keyword else ())
        found += _keywords(element)
    return found


def _keywords(element: Word | Group) -> list[str]:
    """Return the keywords that a group may begin with."""
    if isinstance(element, Word):
        return []
    firsts = (branch[0] for branch in element.branches)
    return [part for first in firsts if isinstance(first, Word) and first.keyword for part in first.parts]


def expected(tokens: Sequence[bytes]) -> Elements | None:
    """Return what may follow ``tokens``, name included; None if that is no command, or whole."""
    if not tokens or (row := lookup(tokens[0])) is None:
        return None
    elements: Elements | None = parse(row.usage)
    for token in tokens[1:]:
        if elements is None:
            break
        elements = advance(elements, token.decode(errors="replace"))
    return elements


def hint(tokens: Sequence[bytes]) -> str:
    """Return what is still to be typed after ``tokens``, as the usage has it; empty if that is nothing."""
    return " ".join(map(str, expected(tokens) or ()))


def completions(tokens: Sequence[bytes], begun: str) -> list[str]:
    """Return the words that begin with ``begun`` and may follow ``tokens``: names and keywords, never data.

    In capitals where ``begun`` is.
    """
    if not tokens or (len(tokens) == 1 and tokens[0].lower() == b"help"):
        found = [*COMMANDS] if tokens else [*COMMANDS, "help", "exit"]
    else:
        found = [word.lower() for word in keywords(expected(tokens) or ())]
    found = [word for word in found if word.startswith(begun.lower())]
    return [word.upper() for word in found] if begun.isupper() else found
