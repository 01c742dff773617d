"""scripts/shard_stats.py: table, JSON, rates, totals, and shards that are not up."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_server import FakeServer, honest
from interrupts import heeded

from imds.protocol import ERROR

SCRIPT = Path(__file__).parents[1] / "scripts" / "shard_stats.py"
_spec = importlib.util.spec_from_file_location("shard_stats", SCRIPT)
shard_stats = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shard_stats)

UP = {
    "shard": 0,
    "state": "up",
    "pid": 4001,
    "uptime_seconds": 90061.5,
    "keys": 30000,
    "used_bytes": 5 << 20,
    "rss_bytes": 30 << 20,
    "cpu_seconds": 1.25,
    "cpu_percent": 12.5,
    "ops": 400,
    "hits": 100,
    "misses": 20,
    "evictions": 0,
    "links": 1,
    "readonly": False,
    "aof_bytes": 64,
    "aof_torn_bytes": 0,
    "restarts": 0,
}
OTHER = {**UP, "shard": 1, "pid": 4002, "keys": 10000, "ops": 1200, "restarts": 2, "uptime_seconds": 59}
DOWN = {"shard": 2, "state": "down", "reason": "died 6 times in 60 s", "restarts": 6}
SILENT = {"shard": 3, "state": "silent"}


def cells(text):
    """Return the table's rows as dicts by heading."""
    heading, *lines = text.splitlines()
    names = [name.strip() for name in heading.replace("cpu %", "cpu_%").split()]
    units = (" B", " KiB", " MiB")
    for unit in units:
        lines = [line.replace(unit, unit.strip()) for line in lines]
    return [dict(zip(names, line.replace("1d ", "1d+").split(), strict=False)) for line in lines]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("IMDS_HOST", "IMDS_PORT", "IMDS_UNIX"):
        monkeypatch.delenv(name, raising=False)


def test_table():
    text = shard_stats.table([UP, OTHER])
    first, second, total = cells(text)[:3]
    assert first == {
        "shard": "0", "state": "up", "keys": "30,000", "data": "5.0MiB", "rss": "30.0MiB", "cpu_%": "12.5",
        "ops": "400", "hits": "100", "misses": "20", "evicted": "0", "aof": "64B", "torn": "0B",
        "pid": "4001", "uptime": "1d+01:01:01", "restarts": "0",
    }  # fmt: skip
    assert (second["uptime"], second["restarts"]) == ("0:00:59", "2")
    assert (total["shard"], total["keys"], total["ops"], total["data"]) == (
        "all",
        "40,000",
        "1,600",
        "10.0MiB",
    )
    assert (total["state"], total["pid"], total["uptime"]) == ("-", "-", "-")
    assert text.splitlines()[-1] == "imbalance (largest / mean): keys 1.50, ops 1.50"


def test_missing_values_are_dashes():
    rows = [UP, DOWN, SILENT, {}]
    table = cells(shard_stats.table(rows))
    assert [row["state"] for row in table[:4]] == ["up", "down", "silent", "-"]
    assert {table[1][name] for name in ("keys", "rss", "ops", "pid", "uptime")} == {"-"}
    assert table[1]["restarts"] == "6"
    assert table[4]["keys"] == "30,000"
    text = shard_stats.table(rows)
    assert "shard 2: died 6 times in 60 s" in text
    assert "takes no writes" in shard_stats.table([{**UP, "readonly": True}])


def test_nothing_to_sum():
    assert shard_stats.summary([DOWN, SILENT]) == {"restarts": 6}
    assert "imbalance" not in shard_stats.table([{**UP, "keys": 0, "ops": 0}])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), ((1 << 20) - 1, "1024.0 KiB"),
     (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB"), (1 << 52, "4096.0 TiB")],
)  # fmt: skip
def test_size(value, text):
    assert shard_stats.size(value) == text


def test_rates_need_the_same_process():
    now = [{**UP, "ops": 600}, {**OTHER, "pid": 5000, "ops": 3}, dict(DOWN)]
    shard_stats.add_rates(now, [UP, OTHER, DOWN], 2.0)
    assert [row.get("ops_per_second") for row in now] == [100.0, None, None]
    assert shard_stats.summary(now)["ops_per_second"] == 100.0
    assert [row["ops/s"] for row in cells(shard_stats.table(now))[:3]] == ["100.0", "-", "-"]


@pytest.mark.parametrize(("rows", "code"), [([UP, OTHER], 0), ([UP, DOWN], 1), ([SILENT], 1)])
def test_exit_code_says_whether_all_are_up(rows, code, capsys):
    with FakeServer(honest(rows)) as server:
        assert shard_stats.main(["-p", str(server.port), "--json"]) == code
        sample = json.loads(capsys.readouterr().out)
        assert sample["shards"] == rows
        assert sample["total"] == shard_stats.summary(rows)
        assert shard_stats.main(["-p", str(server.port)]) == code
        assert capsys.readouterr().out == shard_stats.table(rows) + "\n"


def test_errors(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    assert shard_stats.main(["-p", str(free), "--watch", "1"]) == 3
    assert f"cannot connect to 127.0.0.1:{free}" in capsys.readouterr().err

    def refuse(peer):
        while peer.read():
            peer.reply(b"NOAUTH log in first", ERROR)

    with FakeServer(refuse) as server:
        assert shard_stats.main(["-p", str(server.port)]) == 2
    assert capsys.readouterr().err == "shard_stats: NOAUTH log in first\n"
    for value in ("0", "x", "nan"):
        with pytest.raises(SystemExit, match="64"):
            shard_stats.main(["--watch", value])


def test_watch_as_a_script():
    """Sample after sample with rates; a server that goes away and comes back does not end it."""
    rows = [dict(UP)]

    def counting(peer):
        rows[0]["ops"] += 1000
        honest(rows)(peer)

    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    with FakeServer(counting) as server:
        command = [sys.executable, SCRIPT, "-p", str(server.port), "--watch", "0.1", "--json"]
        with heeded():
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        with process:
            first, second = (json.loads(process.stdout.readline()) for _ in range(2))
            assert "ops_per_second" not in first["shards"][0]
            assert second["shards"][0]["ops_per_second"] == 0
            server.close()
            while "cannot connect" not in process.stderr.readline():
                assert process.poll() is None
            with FakeServer(counting, port=server.port):
                while json.loads(process.stdout.readline())["shards"][0]["ops"] == second["shards"][0]["ops"]:
                    pass
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
