"""Rows of figures, and their tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(slots=True)
class Row:
    """One measured thing. ``runs`` holds each server's figures, one for each round.

    ``goals`` is peer: ratio. With ``better`` "more" the ratio imds / peer must reach it, with "less" it
    must not exceed it. ``limit`` is the same for the figure of imds itself. A row that is a point of a
    curve says which (``curve``) and where (``x``).
    """

    name: str
    unit: str
    better: str = "more"
    goals: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)
    limit: float | None = None
    curve: str = ""
    x: float = 0.0

    def add(self, server: str, figure: float) -> None:
        """Append the figure of one round."""
        self.runs.setdefault(server, []).append(figure)

    def median(self, server: str) -> float:
        """Return the median over the rounds."""
        return median(self.runs[server])

    def ratio(self, server: str, to: str) -> float:
        """Return the ratio of the medians of two servers, infinite where the second is 0."""
        below = self.median(to)
        return self.median(server) / below if below else float("inf")

    def met(self, server: str, to: str) -> bool | None:
        """Return whether the goal beside ``to`` is met, None where there is none."""
        return None if to not in self.goals else self._reaches(self.ratio(server, to), self.goals[to])

    def within(self, server: str) -> bool | None:
        """Return whether the figure of ``server`` keeps the limit, None where there is none."""
        return None if self.limit is None else self._reaches(self.median(server), self.limit)

    def verdicts(self, server: str) -> list[bool]:
        """Return for each goal, and the limit, whether ``server`` meets it."""
        all_of_them = [self.within(server), *(self.met(server, peer) for peer in self.goals)]
        return [verdict for verdict in all_of_them if verdict is not None]

    def _reaches(self, figure: float, goal: float) -> bool:
        return figure >= goal if self.better == "more" else figure <= goal


@dataclass(slots=True)
class Section:
    """A table with a heading. ``server`` is the one that is compared, to each of ``peers``.

    ``axis`` says what the x of the rows' curves is; with one, the section is drawn, too.
    """

    title: str
    text: str
    server: str
    peers: Sequence[str] = ()
    rows: list[Row] = field(default_factory=list)
    axis: str = ""


def figure(value: float) -> str:
    """Return ``value`` with three digits that matter, thousands grouped."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _ratio(row: Row, server: str, peer: str) -> str:
    if not {server, peer} <= row.runs.keys():
        return ""
    text = f"{row.ratio(server, peer):.2f}"
    return text + _verdict(row, row.goals.get(peer), row.met(server, peer))


def _verdict(row: Row, goal: float | None, met: bool | None) -> str:
    if goal is None:
        return ""
    return f" ({'≥' if row.better == 'more' else '≤'} {goal:g}: {'met' if met else '**missed**'})"


def _figure(row: Row, name: str, server: str) -> str:
    if not row.runs.get(name):
        return ""
    text = figure(row.median(name))
    return text + _verdict(row, row.limit, row.within(server)) if name == server else text


def _spread(row: Row, server: str) -> str:
    runs = row.runs.get(server, [])
    return f"{figure(min(runs))} to {figure(max(runs))}" if len(runs) > 1 else ""


def section_lines(section: Section) -> list[str]:
    """Return the Markdown of one section."""
    order = list(dict.fromkeys(server for row in section.rows for server in row.runs))
    heads = ["", "unit", *order, f"{section.server}, least to most"]
    heads += [f"{section.server} / {peer}" for peer in section.peers]
    lines = [f"### {section.title}", "", section.text, ""]
    lines.append("| " + " | ".join(heads) + " |")
    lines.append("|---|---|" + "---:|" * (len(heads) - 2))
    for row in section.rows:
        cells = [row.name, row.unit]
        cells += [_figure(row, name, section.server) for name in order]
        cells.append(_spread(row, section.server))
        cells += [_ratio(row, section.server, peer) for peer in section.peers]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]
