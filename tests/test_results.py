"""The tables of benchmarks/RESULTS.md: medians, ratios, goals, and groups that are measured one by one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import compare
from generator import Job
from results import Group, Results, slug
from table import Row, Section, figure, section_lines


def test_ratio_is_of_the_medians() -> None:
    row = Row("get", "requests/s", goals={"redis": 2.0})
    for ours, theirs in ((100, 10), (300, 900), (200, 100)):
        row.add("imds", ours)
        row.add("redis", theirs)
    assert (row.median("imds"), row.median("redis"), row.ratio("imds", "redis")) == (200, 100, 2.0)


@pytest.mark.parametrize(
    ("better", "ours", "met"),
    [("more", 200, True), ("more", 199, False), ("less", 200, True), ("less", 201, False)],
)
def test_a_goal_and_a_limit_are_met_at_it(better: str, ours: float, met: bool) -> None:
    row = Row("x", "s", better, {"redis": 2.0}, {"imds": [ours], "redis": [100]}, limit=200)
    assert row.met("imds", "redis") is met
    assert row.within("imds") is met
    assert row.met("imds", "twemproxy") is None
    assert row.verdicts("imds") == [met, met]


def section() -> Section:
    row = Row("get", "requests/s", "more", {"redis": 2.0}, {"imds": [1234, 3000], "redis": [4000, 500]})
    lone = Row("set", "µs", "less", {}, {"imds": [0.25]}, limit=0.5)
    return Section("Title", "Text.", "imds", ("redis",), [row, lone])


def test_table() -> None:
    assert section_lines(section()) == [
        *("### Title", "", "Text.", ""),
        "|  | unit | imds | redis | imds, least to most | imds / redis |",
        "|---|---|---:|---:|---:|---:|",
        "| get | requests/s | 2,117 | 2,250 | 1,234 to 3,000 | 0.94 (≥ 2: **missed**) |",
        "| set | µs | 0.25 (≤ 0.5: met) |  |  |  |",
        "",
    ]


def test_results_are_the_same_when_they_are_read_again(tmp_path: Path) -> None:
    results = Results(tmp_path, ["one"])
    results.put("one", Group({"machine": "this", "commit": "a"}, [section()]))
    results.write()
    assert Results(tmp_path, ["one"]).groups == results.groups
    assert json.loads((tmp_path / "results.json").read_text())["groups"]["one"]["facts"]["commit"] == "a"


def test_a_group_measured_again_leaves_the_others(tmp_path: Path) -> None:
    for name, commit in (("two", "a"), ("one", "a"), ("two", "b")):
        results = Results(tmp_path, ["one", "two"])
        part = section()
        part.title += f" {name} {commit}"
        results.put(name, Group({"machine": "this", "commit": commit}, [part]))
        results.write()
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(("* ", "Goals", "commit", "#"))] == [
        "# Results",
        "* machine: this",
        "Goals: 2 of 4 met. Missed:",
        "* one: get: 0.94 of redis, not ≥ 2",
        "* two: get: 0.94 of redis, not ≥ 2",
        *("## one", "commit: a.", "### Title one a"),
        *("## two", "commit: b.", "### Title two b"),
    ]


def test_a_missed_limit_is_told(tmp_path: Path) -> None:
    results = Results(tmp_path, [])
    row = Row("stall", "ms", "less", limit=5)
    row.add("imds", 7.5)
    results.put("pause", Group({}, [Section("T", "t", "imds", rows=[row])]))
    assert "* pause: stall: 7.50 ms, not ≤ 5" in results.markdown().splitlines()


def test_a_section_with_an_axis_gets_its_picture(tmp_path: Path) -> None:
    results = Results(tmp_path, [])
    part = section()
    part.axis = "keys"
    results.put("one", Group({}, [part]))
    assert "![" not in results.markdown(lambda _section, _path: False)
    drawn: list[Path] = []
    text = results.markdown(lambda _section, path: not drawn.append(path))
    assert "![Title](plots/title.png)" in text
    assert drawn == [tmp_path / "plots" / "title.png"]
    drawn[0].parent.mkdir()
    drawn[0].touch()
    assert "![Title](plots/title.png)" in results.markdown()  # drawn earlier, from the same figures
    results.put("one", Group({}, [part]))
    assert "![" not in results.markdown()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": {"a": {"facts": {}}}}', '{"groups": {"a": 1}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="not the results"):
        Results(tmp_path, [])


def test_slug() -> None:
    assert slug("Values of 1,024 bytes") == "values-of-1-024-bytes"


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (0.5, "0.50"), (12.34, "12.3"), (99999.6, "100,000")]
)
def test_figures_are_short(value: float, text: str) -> None:
    assert figure(value) == text


def test_checkouts_are_compared_round_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        "before": compare.Runs([100.0, 200.0, 400.0], [2.0, 2.5, 9.0]),
        "after": compare.Runs([150.0, 200.0, 300.0], [1.0, 1.25, 3.0]),
    }
    compare._line(Job("set", 16), runs)
    assert capsys.readouterr().out == (
        "set at 16: before 200/s; after 1.000 (0.75 to 1.50) | before 2.50, after 1.25 µs\n"
    )


def test_a_checkout_is_named_and_may_have_variables(tmp_path: Path) -> None:
    (tmp_path / "imds").mkdir()
    (tmp_path / "imds" / "__init__.py").touch()
    assert compare._tree(f"new={tmp_path},A=1,B=") == ("new", tmp_path, {"A": "1", "B": ""})
    for wrong in (str(tmp_path), f"={tmp_path}", f"new={tmp_path}/imds", f"new={tmp_path},A"):
        with pytest.raises(argparse.ArgumentTypeError):
            compare._tree(wrong)
