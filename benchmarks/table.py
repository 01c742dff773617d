"""Rows of figures, and RESULTS.md made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(slots=True)
class Row:
    """One measured thing. ``runs`` holds each server's figures, one for each round.

    ``goals`` is peer: ratio. With ``better`` "more" the ratio imds / peer must reach it, with "less" it
    must not exceed it.
    """

    name: str
    unit: str
    better: str = "more"
    goals: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)

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
        goal = self.goals.get(to)
        if goal is None:
            return None
        ratio = self.ratio(server, to)
        return ratio >= goal if self.better == "more" else ratio <= goal


@dataclass(slots=True)
class Section:
    """A table with a heading. ``server`` is the one that is compared, to each of ``peers``."""

    title: str
    text: str
    server: str
    peers: Sequence[str] = ()
    rows: list[Row] = field(default_factory=list)


def figure(value: float) -> str:
    """Return ``value`` with three digits that matter, thousands grouped."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _ratio(row: Row, server: str, peer: str) -> str:
    if not {server, peer} <= row.runs.keys():
        return ""
    text = f"{row.ratio(server, peer):.2f}"
    goal = row.goals.get(peer)
    if goal is None:
        return text
    sign = "≥" if row.better == "more" else "≤"
    return f"{text} ({sign} {goal:g}: {'met' if row.met(server, peer) else '**missed**'})"


def _spread(row: Row, server: str) -> str:
    runs = row.runs.get(server, [])
    return f"{figure(min(runs))} to {figure(max(runs))}" if len(runs) > 1 else ""


def section_lines(section: Section) -> list[str]:
    """Return the Markdown of one section."""
    order = list(dict.fromkeys(server for row in section.rows for server in row.runs))
    heads = ["", "unit", *order, f"{section.server}, least to most"]
    heads += [f"{section.server} / {peer}" for peer in section.peers]
    lines = [f"## {section.title}", "", section.text, ""]
    lines.append("| " + " | ".join(heads) + " |")
    lines.append("|---|---|" + "---:|" * (len(heads) - 2))
    for row in section.rows:
        cells = [row.name, row.unit]
        cells += [figure(row.median(name)) if name in row.runs else "" for name in order]
        cells.append(_spread(row, section.server))
        cells += [_ratio(row, section.server, peer) for peer in section.peers]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def markdown(facts: Mapping[str, str], text: str, sections: Sequence[Section]) -> str:
    """Return the whole of RESULTS.md: what was measured on what, and a table for each section."""
    lines = ["# Results", "", text, ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    verdicts = [
        row.met(section.server, peer) for section in sections for row in section.rows for peer in row.goals
    ]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    if verdicts:
        lines.append(f"* goals: {sum(map(bool, verdicts))} of {len(verdicts)} met")
    lines.append("")
    for section in sections:
        lines += section_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def document(facts: Mapping[str, str], sections: Sequence[Section]) -> dict[str, Any]:
    """Return the same as plain data, with the figure of every round."""
    return {"facts": dict(facts), "sections": [asdict(section) for section in sections]}
