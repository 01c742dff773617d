"""The tables of benchmarks/RESULTS.md: medians, ratios, and whether a goal is met."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "table.py"
    spec = importlib.util.spec_from_file_location("benchmarks_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ratio_is_of_the_medians(table: ModuleType) -> None:
    row = table.Row("get", "requests/s", goals={"redis": 2.0})
    for ours, theirs in ((100, 10), (300, 900), (200, 100)):
        row.add("imds", ours)
        row.add("redis", theirs)
    assert (row.median("imds"), row.median("redis"), row.ratio("imds", "redis")) == (200, 100, 2.0)


@pytest.mark.parametrize(
    ("better", "ours", "met"),
    [("more", 200, True), ("more", 199, False), ("less", 200, True), ("less", 201, False)],
)
def test_a_goal_is_met_at_the_limit(table: ModuleType, better: str, ours: float, met: bool) -> None:
    row = table.Row("x", "s", better, {"redis": 2.0}, {"imds": [ours], "redis": [100]})
    assert row.met("imds", "redis") is met
    assert row.met("imds", "twemproxy") is None


def test_markdown_and_document(table: ModuleType) -> None:
    row = table.Row("get", "requests/s", "more", {"redis": 2.0}, {"imds": [1234, 3000], "redis": [4000, 500]})
    lone = table.Row("set", "µs", "less", {}, {"imds": [0.25]})
    section = table.Section("Title", "Text.", "imds", ("redis",), [row, lone])
    text = table.markdown({"machine": "this"}, "Intro.", [section])
    assert text.splitlines() == [
        *("# Results", "", "Intro.", "", "* machine: this", "* goals: 0 of 1 met", ""),
        *("## Title", "", "Text.", ""),
        "|  | unit | imds | redis | imds, least to most | imds / redis |",
        "|---|---|---:|---:|---:|---:|",
        "| get | requests/s | 2,117 | 2,250 | 1,234 to 3,000 | 0.94 (≥ 2: **missed**) |",
        "| set | µs | 0.25 |  |  |  |",
    ]
    document = json.loads(json.dumps(table.document({"machine": "this"}, [section])))
    assert document["sections"][0]["rows"][0]["runs"] == {"imds": [1234, 3000], "redis": [4000, 500]}


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (0.5, "0.50"), (12.34, "12.3"), (99999.6, "100,000")]
)
def test_figures_are_short(table: ModuleType, value: float, text: str) -> None:
    assert table.figure(value) == text
