"""imds-benchmark from its command line: options, output, exit codes, signals, no process left behind."""

from __future__ import annotations

import importlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent / "load"))
from answering import Server, imds_store, resp_store

from imds import benchmark
from imds.histogram import Histogram
from imds.load.workload import Workload, fill
from imds.protocol import encode_error

# few requests and little data: nothing here is about speed
COMMAND = (sys.executable, "-m", "imds.benchmark", "--pool", "500", "--sets", "2", "--members", "5")


def bench(server: Server | int, *arguments: str) -> subprocess.CompletedProcess[str]:
    port = server if isinstance(server, int) else server.port
    return subprocess.run(
        [*COMMAND, "--port", str(port), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_table() -> None:
    with Server(imds_store()) as server:
        done = bench(
            server, "--requests", "200", "--keys", "30", "--preload", "--tests", "get,SET,mixed,zrank"
        )
    assert (done.returncode, done.stderr) == (0, "")
    title, headings, *rows = done.stdout.splitlines()
    assert "imds protocol, closed loop: 50 connections of 1 processes, pipeline 1, 30 keys uniform" in title
    assert headings.split()[:2] == ["test", "ops/s"]
    assert [row.split()[0] for row in rows] == ["get", "set", "mixed", "get", "set", "zrank"]
    assert all(len(row) == len(headings) for row in rows)
    assert rows[0].split()[-3:] == ["200", "0", "0"]
    asked = Counter(tokens[0] for tokens in server.seen)
    assert asked[b"set"] == 30 + 200 + int(rows[4].split()[-3])  # the preload is made once for all tests
    assert asked[b"zadd"] == 2 * 5


def test_json_of_two_processes_that_preload_together() -> None:
    with Server(imds_store()) as server:
        done = bench(
            server,
            *("--json", "--preload", "--keys", "40", "--value-size", "3", "--processes", "2"),
            *(
                "--connections",
                "3",
                "--pipeline",
                "5",
                "--requests",
                "300",
                "--mix",
                "get:9,set:1",
                "--seed",
                "7",
            ),
        )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["settings"]["workload"]["seed"] == 7
    (result,) = document["results"]
    assert (result["test"], result["ops"], result["errors"], result["misses"]) == ("mix", 300, 0, 0)
    parts = {part["test"]: part["ops"] for part in result["commands"]}
    assert sum(parts.values()) == 300
    times = [result[name] for name in ("p50_us", "p99_us", "p999_us", "max_us")]
    assert 0 < times[0] <= times[1] <= times[2] <= times[3]
    asked = Counter(tokens[0].decode() for tokens in server.seen)
    assert asked == Counter(get=parts["get"] + 1, set=parts["set"] + 40)  # with the probe and the preload
    assert {tokens[2] for tokens in server.seen if tokens[0] == b"set"} == {b"abc"}


def test_resp() -> None:
    with Server(resp_store(), "resp") as server:
        done = bench(
            server,
            "--protocol",
            "resp",
            "--requests",
            "100",
            "--json",
            "--preload",
            "--keys",
            "50",
            "--warmup",
            "0.05",
        )
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)["results"]
    assert [(r["test"], r["ops"], r["misses"]) for r in results] == [("get", 100, 0), ("set", 100, 0)]


def test_open_loop_reports_rate_and_delay() -> None:
    with Server(imds_store()) as server:
        done = bench(
            server, *("--rate", "500", "--requests", "50", "--json", "--tests", "set", "--processes", "2")
        )
    assert (done.returncode, done.stderr) == (0, "")
    (result,) = json.loads(done.stdout)["results"]
    assert (result["ops"], result["rate"], result["unsent"]) == (50, 500.0, 0)
    assert result["send_delay_p99_us"] >= 0
    # each process sends 25, one every 4 ms, the second one 2 ms after the first
    assert result["seconds"] >= 0.002 + 24 * 0.004


def test_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    store = Server(imds_store())
    store._listener.close()
    store._listener = socket.socket(socket.AF_UNIX)
    store._listener.bind(path)
    store._listener.listen()
    with store as server:
        done = bench(server, "--unix", path, "--requests", "50", "--tests", "set")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(server.seen) == 51


def test_preload_only() -> None:
    with Server(imds_store()) as server:
        done = bench(server, "--preload-only", "--tests", "get,zadd", "--keys", "7")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("loaded sets and strings in ")
    workload = Workload((("get", 1),), keys=7, sets=2, members=5)
    assert server.seen[1:] == [list(tokens) for tokens in fill(workload, ("sets", "strings"))]


def test_no_server() -> None:
    port = free_port()
    done = bench(port, "--requests", "10")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"imds-benchmark: no server at 127.0.0.1:{port}: Connection refused\n"


@pytest.mark.parametrize(
    ("protocol", "answer", "hint"),
    [
        ("imds", b"-ERR unknown command\r\n", "perhaps --protocol resp?"),
        ("resp", b"\x00\x00\x00\x04\x00\x00\x00\x01", "perhaps --protocol imds?"),
    ],
)
def test_wrong_protocol(protocol: str, answer: bytes, hint: str) -> None:
    with Server(lambda _tokens: answer, protocol) as server:
        done = bench(server, "--protocol", protocol, "--requests", "10")
    assert (done.returncode, done.stdout) == (1, "")
    assert hint in done.stderr


def test_a_server_that_only_answers_errors() -> None:
    with Server(lambda _tokens: encode_error("LOADING the shard is reading its log")) as server:
        done = bench(server, "--requests", "10")
    assert done.returncode == 1
    assert done.stderr.endswith(" answers: LOADING the shard is reading its log\n")


def test_errors_are_shown_and_fail_the_run() -> None:
    store = imds_store()

    def answer(tokens: list[bytes]) -> bytes | None:
        return encode_error("OOM full") if tokens[0] == b"set" else store(tokens)

    with Server(answer) as server:
        done = bench(server, "--requests", "30", "--connections", "2")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].split()[-3:] == ["30", "30", "0"]
    assert done.stderr == "imds-benchmark: set: OOM full (x 30)\n"


def test_errors_of_the_preload_fail_the_run() -> None:
    store = imds_store()

    def answer(tokens: list[bytes]) -> bytes | None:
        return encode_error("OOM full") if tokens[0] == b"set" else store(tokens)

    with Server(answer) as server:
        done = bench(server, "--preload", "--processes", "2", "--requests", "30")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "imds-benchmark: preload: the server answers: OOM full\n"


def test_results_before_a_failure_are_printed() -> None:
    dead = threading.Event()
    store = imds_store()

    def answer(tokens: list[bytes]) -> bytes | None:
        if tokens[0] == b"zadd":
            dead.set()
        return None if dead.is_set() else store(tokens)

    with Server(answer) as server:
        done = bench(
            server,
            "--requests",
            "30",
            "--connections",
            "2",
            "--tests",
            "get,zadd,set",
            "--preload",
            "--keys",
            "9",
        )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].split()[0] == "get"
    assert "preload" in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_prints_what_there_is_and_leaves_no_process(signum: signal.Signals) -> None:
    with Server(imds_store()) as server:
        process = subprocess.Popen(
            [
                *COMMAND,
                "--port",
                str(server.port),
                "--seconds",
                "100",
                "--processes",
                "2",
                "--tests",
                "set,get",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.many_seen.wait(30)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout.splitlines()[-1].split()[0] == "set"
    assert stderr.splitlines()[-1] == "imds-benchmark: interrupted"
    assert not any(child.is_running() for child in children)


def test_interrupt_during_the_preload() -> None:
    with Server(imds_store()) as server:
        process = subprocess.Popen(
            [*COMMAND, "--port", str(server.port), "--preload-only", "--keys", "100000000"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.many_seen.wait(30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "imds-benchmark: interrupted\n"


def test_a_load_process_that_dies_ends_the_run() -> None:
    with Server(imds_store()) as server:
        process = subprocess.Popen(
            [*COMMAND, "--port", str(server.port), "--seconds", "100", "--processes", "2"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.many_seen.wait(30)
        children = psutil.Process(process.pid).children()
        children[0].kill()
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr == "imds-benchmark: a load process died (exit code -9)\n"
    assert not any(child.is_running() for child in children)


def test_load_processes_end_when_the_parent_is_killed() -> None:
    with Server(imds_store()) as server:
        process = subprocess.Popen(
            [*COMMAND, "--port", str(server.port), "--processes", "2", "--requests", "100000000"],
        )
        assert server.many_seen.wait(30)
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:
            child.kill()
        assert not alive


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tests", "get,foo"], "no test 'foo', there are: get, set"),
        (["--mix", "get:0"], "above 0"),
        (["--tests", "get", "--mix", "get"], "exclude each other"),
        (["--connections", "2", "--processes", "3"], "--processes must not exceed --connections"),
        (["--pipeline", "0"], "'0' must be a whole number above 0"),
        (["--keys", "1e3"], "'1e3' must be a whole number above 0"),
        (["--seconds", "0"], "must be above 0"),
        (["--rate", "-1"], "must be a number from 0"),
        (["--warmup", "nan"], "must be a number from 0"),
        (["--protocol", "http"], "invalid choice"),
        (["--conn", "5"], "unrecognized arguments"),
    ],
)
def test_wrong_options(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--plot", "x.png"])
    assert ended.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_plot_draws_milliseconds_over_nines(monkeypatch: pytest.MonkeyPatch) -> None:
    figure, axes = MagicMock(), MagicMock()
    pyplot = MagicMock(subplots=lambda **_: (figure, axes))
    modules = {"matplotlib": MagicMock(), "matplotlib.pyplot": pyplot}
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    latency = Histogram()
    for microseconds in range(1, 1001):
        latency.record(microseconds * 1000)
    benchmark.plot({"get": latency}, "out.png", "title")
    ((nines, times), label) = axes.plot.call_args
    assert label == {"label": "get"}
    drawn: dict[float, Any] = dict(zip((round(n, 1) for n in nines), times, strict=True))
    assert drawn[1.0] == pytest.approx(0.9, rel=0.01)
    assert drawn[2.0] == pytest.approx(0.99, rel=0.01)
    assert drawn[5.0] == 1.0
    figure.savefig.assert_called_once_with("out.png", dpi=120)
