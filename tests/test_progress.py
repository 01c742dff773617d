"""The progress of a long job: a bar on a terminal, lines in the log elsewhere."""

import io
import logging

import pytest

from imds.progress import Progress, amount


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_bar_on_a_terminal():
    out, clock = Terminal(), Clock()
    with Progress("moving", 10_000_000, out, clock) as progress:
        progress.update(1)
        assert out.getvalue() == ""  # not yet
        clock.now += 2
        progress.update(5_000_000)
        assert out.getvalue() == f"\rmoving [{'#' * 15}{'.' * 15}]  50%  2.5 MB/s  2 s left"
        progress.update(5_000_001)
        clock.now += 2
        progress.update(10_000_000)
    *_, last = out.getvalue().split("\r")
    assert last == f"moving [{'#' * 30}] 100%  2.5 MB/s  0 s left\n"


def test_shorter_line_covers_a_longer_one():
    out, clock = Terminal(), Clock()
    with Progress("x", 1_000_000, out, clock) as progress:
        clock.now += 100
        progress.update(1)
        clock.now += 1
        progress.update(1_000_000)
    _, first, second, third = out.getvalue().split("\r")
    assert len(first) > len(second.rstrip())
    assert len(second) == len(first)
    assert third.endswith("\n")


def test_lines_in_the_log_elsewhere(caplog):
    caplog.set_level(logging.INFO)
    out, clock = io.StringIO(), Clock()
    with Progress("moving", 1000, out, clock) as progress:
        for step in range(1, 101):
            clock.now += 0.125
            progress.update(step * 10)
    assert [record.message for record in caplog.records] == [
        "moving: 40%  80 B/s  8 s left",
        "moving: 80%  80 B/s  2 s left",
    ]
    assert out.getvalue() == ""


@pytest.mark.parametrize(("total", "done"), [(0, 0), (10, 20), (10, 0)])
def test_odd_totals(total, done):
    out, clock = Terminal(), Clock()
    with Progress("x", total, out, clock) as progress:
        clock.now += 1
        progress.update(done)
    assert "%" in out.getvalue()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3_400_000, "3.4 MB"), (7e12, "7000.0 GB")],
)
def test_amount(size, text):
    assert amount(size) == text


def test_other_amounts_than_bytes():
    out, clock = Terminal(), Clock()
    with Progress("looking", 1000, out, clock, shown=lambda number: f"{number:,.0f} keys") as progress:
        clock.now += 0.1
        progress.update(200)
    assert out.getvalue().split("\r")[1] == f"looking [{'#' * 6}{'.' * 24}]  20%  2,000 keys/s  0 s left"


def test_a_total_that_is_not_known():
    out, clock = Terminal(), Clock()
    with Progress("loading", None, out, clock) as progress:
        clock.now += 2
        progress.update(5000)
    assert out.getvalue().split("\r")[1] == "loading 5.0 kB  2.5 kB/s"


def test_a_note_stands_above_the_bar():
    out, clock = Terminal(), Clock()
    with Progress("x", None, out, clock) as progress:
        progress.note("at once")
        clock.now += 1
        progress.update(10)
        width = len(out.getvalue().split("\r")[-1])
        progress.note("line 7: no")
        clock.now += 1
        progress.update(20)
    start, first, blank, note, *_ = out.getvalue().split("\r")
    assert (start, first) == ("at once\n", "x 10 B  10 B/s")
    assert (blank, note) == (" " * width, "line 7: no\n")
