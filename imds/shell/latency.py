"""How long a server takes to answer one request after another, as this client sees it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from imds.client import Client
from imds.histogram import Histogram, bounds
from imds.shell.keys import answered
from imds.shell.output import Form, csv_row, dump_json, heading, say, wants_colour, write
from imds.shell.ticks import ticks

INTERVAL = 0.01  # seconds between two requests
QUANTILES = (0.5, 0.9, 0.99, 0.999)

_REDRAW = 0.1  # seconds between two looks of the line at a terminal
_BAR = 40  # characters
_MILLION = 1e6  # nanoseconds in a millisecond


def measure_latency(
    client: Client[bytes], tokens: Sequence[bytes], interval: float, duration: float | None, form: Form
) -> None:
    """Send ``tokens`` again and again until Ctrl-C or for ``duration`` seconds, then print what was seen.

    Raises ServerError where they are answered by an error, ImdsError when the server goes away; what was seen
    up to then is printed first.
    """
    seen = Histogram()
    line = Line()
    client.connect()  # which is no part of a request
    try:
        for _ in ticks(interval, duration):
            start = time.perf_counter_ns()
            reply = client.execute(*tokens)
            seen.record(time.perf_counter_ns() - start)
            answered(reply)
            line.show(seen)
    except KeyboardInterrupt:
        pass
    finally:
        line.clear()
        print_latency(seen, form)


class Line:
    """The figures up to now, on one line of a terminal; elsewhere nothing."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._next = 0.0

    def show(self, seen: Histogram) -> None:
        if self._on and time.monotonic() >= self._next:
            self._next = time.monotonic() + _REDRAW
            sys.stderr.write(f"\r\x1b[K{_figures(seen)}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._next:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def steps(seen: Histogram) -> list[tuple[float, int]]:
    """Return the histogram in steps of 1, 2, 5: (milliseconds that are not exceeded, how often).

    From the first step that has any to the last. A sample is counted by the middle of its bucket, so the
    bounds are exact to ERROR of themselves.
    """
    rows: dict[int, int] = {}
    for number, times in enumerate(seen.counts):
        if times:
            low, high = bounds(number)
            step = _step((low + high) // 2)
            rows[step] = rows.get(step, 0) + times
    found = sorted(rows)
    if not found:
        return []
    edges = [edge for edge in _EDGES if found[0] <= edge <= found[-1]]
    return [(edge / _MILLION, rows.get(edge, 0)) for edge in edges]


_EDGES: list[int] = [factor * 10**power for power in range(3, 14) for factor in (1, 2, 5)]  # 1 us to 14 hours


def _step(value: int) -> int:
    return next(edge for edge in _EDGES if value <= edge)


def print_latency(seen: Histogram, form: Form) -> None:
    """Print the figures and the histogram."""
    if form is Form.JSON:
        write(dump_json(_summary(seen)) + b"\n")
    elif form is not Form.TEXT:
        for edge, times in steps(seen):
            row = [f"{edge:g}".encode(), b"%d" % times]
            write((csv_row([*row]) if form is Form.CSV else b"\t".join(row)) + b"\n")
    else:
        say(heading(_figures(seen), wants_colour(sys.stdout)))
        rows = steps(seen)
        most = max((times for _, times in rows), default=0)
        below = 0
        for edge, times in rows:
            below += times
            share = below / seen.number
            say(f"<= {edge:8g} ms {times:9,} {share:7.2%}  {'#' * round(_BAR * times / most)}".rstrip())


def _figures(seen: Histogram) -> str:
    if not seen.number:
        return "no request was answered"
    parts = [f"{seen.number:,} requests", f"min {_ms(seen.low)}", f"mean {_ms(seen.mean())}"]
    parts += [f"p{100 * quantile:g} {_ms(seen.quantile(quantile))}" for quantile in QUANTILES]
    return "  ".join([*parts, f"max {_ms(seen.high)} ms"])


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / _MILLION:.3f}"


def _summary(seen: Histogram) -> dict[str, Any]:
    figures = {"min": seen.low, "mean": seen.mean(), "max": seen.high}
    figures |= {f"p{100 * quantile:g}": seen.quantile(quantile) for quantile in QUANTILES}
    return {
        "requests": seen.number,
        "ms": {name: round(value / _MILLION, 6) for name, value in figures.items()},
        "histogram": [{"le_ms": edge, "requests": times} for edge, times in steps(seen)],
    }
