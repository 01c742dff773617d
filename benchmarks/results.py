"""What was measured, group by group: results.json, and RESULTS.md made of it.

A group that is measured again takes the place of its former figures; all others stay. So every group carries
its own facts (machine, versions, commit, how it was run), and those that all groups share are told once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from table import Row, Section, figure, section_lines

TEXT = (
    "Written by `benchmarks/run.py`; the figure of every round is in `results.json`, how to read them in "
    "[README.md](README.md). Each figure is the median over the rounds, each ratio that of two medians. The "
    "load generator, all servers and all their processes share this one machine."
)


@dataclass(slots=True)
class Group:
    """The sections of one group, and what a reader must know to judge and to repeat them."""

    facts: dict[str, str]
    sections: list[Section]


class Results:
    """The groups in ``directory``. :meth:`put` and then :meth:`write`.

    ``order`` is that of the groups in RESULTS.md. Raises ValueError where results.json is not ours.
    """

    def __init__(self, directory: Path, order: Sequence[str]) -> None:
        self.directory = directory
        self._order = {name: place for place, name in enumerate(order)}
        self.groups: dict[str, Group] = {}
        path = directory / "results.json"
        if path.exists():
            try:
                self.groups = {
                    name: Group(value["facts"], [_section(part) for part in value["sections"]])
                    for name, value in json.loads(path.read_bytes())["groups"].items()
                }
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not the results of this program: {error!r}") from None

    def put(self, name: str, group: Group) -> None:
        """Take ``group`` for what is known of ``name``. Its pictures go, which show other figures."""
        self.groups[name] = group
        for section in group.sections:
            (self.directory / _picture(section)).unlink(missing_ok=True)
        self.groups = dict(sorted(self.groups.items(), key=lambda pair: self._order.get(pair[0], 1 << 30)))

    def write(self, draw: Callable[[Section, Path], bool] = lambda _section, _path: False) -> None:
        """Write both files. ``draw`` makes a picture of a section, and says whether it could."""
        self.directory.mkdir(parents=True, exist_ok=True)
        document = {"groups": {name: asdict(group) for name, group in self.groups.items()}}
        (self.directory / "results.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.directory / "RESULTS.md").write_text(self.markdown(draw))

    def markdown(self, draw: Callable[[Section, Path], bool] = lambda _section, _path: False) -> str:
        """Return RESULTS.md: what was measured on what, the goals that were missed, and all tables."""
        shared = _shared([group.facts for group in self.groups.values()])
        lines = ["# Results", "", TEXT, "", *(f"* {name}: {value}" for name, value in shared.items())]
        lines += ["", *self._goals(), ""]
        for name, group in self.groups.items():
            own = [f"{fact}: {value}" for fact, value in group.facts.items() if fact not in shared]
            lines += [f"## {name}", "", *(["; ".join(own) + ".", ""] if own else [])]
            for section in group.sections:
                lines += section_lines(section)
                if section.axis:
                    picture = _picture(section)
                    if draw(section, self.directory / picture) or (self.directory / picture).exists():
                        lines += [f"![{section.title}]({picture})", ""]
        return "\n".join(lines).rstrip() + "\n"

    def _goals(self) -> list[str]:
        """How many goals are met, and a line for each that is not."""
        verdicts: list[bool] = []
        missed = []
        for name, group in self.groups.items():
            for section in group.sections:
                for row in section.rows:
                    verdicts += row.verdicts(section.server)
                    missed += [f"* {name}: {row.name}: {text}" for text in _misses(row, section.server)]
        if not verdicts:
            return []
        return [f"Goals: {sum(verdicts)} of {len(verdicts)} met{'. Missed:' if missed else '.'}", "", *missed]


def _picture(section: Section) -> Path:
    return Path("plots") / f"{slug(section.title)}.png"


def _misses(row: Row, server: str) -> list[str]:
    sign = "≥" if row.better == "more" else "≤"
    found = [
        f"{row.ratio(server, peer):.2f} of {peer}, not {sign} {goal:g}"
        for peer, goal in row.goals.items()
        if not row.met(server, peer)
    ]
    if row.within(server) is False:
        found.append(f"{figure(row.median(server))} {row.unit}, not {sign} {row.limit:g}")
    return found


def _section(plain: Mapping[str, Any]) -> Section:
    """Return a section from its plain data. Raises KeyError and TypeError."""
    peers, rows = plain["peers"], plain["rows"]
    return Section(**{**plain, "peers": tuple(peers), "rows": [Row(**row) for row in rows]})


def _shared(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the facts that are the same everywhere."""
    first, *others = facts or [{}]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def slug(title: str) -> str:
    """Return a file name made of ``title``."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
