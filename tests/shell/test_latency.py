"""--latency: the histogram in steps, and what ends the measurement."""

import json
import signal
import threading

import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st

from imds.histogram import ERROR, LIMIT, Histogram
from imds.shell.latency import steps


@given(st.lists(st.integers(0, LIMIT - 1), max_size=30))
def test_steps_hold_every_sample(samples):
    seen = Histogram()
    for sample in samples:
        seen.record(sample)
    rows = steps(seen)
    assert sum(times for _, times in rows) == len(samples)
    assert [edge for edge, _ in rows] == sorted({edge for edge, _ in rows})
    for edge, _ in rows:
        at_most = sum(times for other, times in rows if other <= edge)
        nanoseconds = edge * 1e6
        # exact but for the width of a bucket
        assert sum(s <= nanoseconds * (1 - 2 * ERROR) for s in samples) <= at_most
        assert at_most <= sum(s <= nanoseconds * (1 + 2 * ERROR) for s in samples)


def test_steps_of_one_two_five():
    seen = Histogram()
    for sample in (1500, 40_000, 40_000):
        seen.record(sample)
    assert steps(seen) == [(0.002, 1), (0.005, 0), (0.01, 0), (0.02, 0), (0.05, 2)]


class TestMeasurement:
    def test_of_a_command(self, run, real):
        real.set("k", "v")
        code, out, err = run("--latency", "--interval", "0", "--duration", "0.1", "--json", "get", "k")
        assert (code, err) == (0, b"")
        found = json.loads(out)
        figures = found["ms"]
        assert found["requests"] == sum(step["requests"] for step in found["histogram"]) > 1
        assert 0 < figures["min"] <= figures["p50"] <= figures["p99"] <= figures["max"] < 1000

    def test_for_people(self, run, real):
        code, out, err = run("--latency", "--duration", "0.05")
        assert (code, err) == (0, b"")
        first, *rows = out.decode().splitlines()
        assert first.split()[1:3] == ["requests", "min"]
        assert rows[-1].split()[4] == "100.00%"

    def test_a_command_that_fails(self, run, real):
        code, out, err = run("--latency", "nonsense")
        assert (code, err) == (2, b"imds-cli: ERR unknown command\n")
        assert out.startswith(b"1 requests")

    @pytest.mark.parametrize("interrupted", [False, True])
    def test_what_was_seen_is_told_whatever_ends_it(self, run, interrupted):
        def serve(peer):
            for _ in range(3):
                peer.read()
                peer.reply(b"PONG")
            peer.read()
            if interrupted:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                peer.read()

        with FakeServer(serve) as fake:
            code, out, err = run("--latency", "--csv", "--interval", "0", options=("-p", str(fake.port)))
        assert sum(int(line.split(b'"')[3]) for line in out.splitlines()) == 3
        expected = (0, b"") if interrupted else (3, b"imds-cli: the server closed the connection\n")
        assert (code, err) == expected
