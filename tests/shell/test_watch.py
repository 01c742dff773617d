"""--stat: what a row says, and a server that goes away."""

import csv
import io
import json
import signal
import threading

import pytest
from fake_server import FakeServer

from imds.protocol import ERROR
from imds.shell.watch import parse_info, row

INFO = """# Clients\r
connected_clients:3\r
\r
# Memory\r
used_memory:1000\r
# Stats\r
total_commands_processed:{requests}\r
keyspace_hits:{hits}\r
keyspace_misses:{misses}\r
evicted_keys:7\r
# Server\r
shards:2\r
# Shards\r
shard0:state=up,keys=4\r
shard1:state=loading,keys=1\r
# Keyspace\r
db0:keys=5,expires=1\r
"""


def sample(moment=0.0, requests=0, hits=0, misses=0):
    return parse_info(INFO.format(requests=requests, hits=hits, misses=misses), moment)


def test_what_info_says():
    first = row(sample(requests=50), None)
    assert first == {
        "keys": 5,
        "memory": 1000,
        "clients": 3,
        "requests": 50,
        "requests_per_second": None,
        "hit_percent": None,
        "evicted": 7,
        "shards_up": 1,
        "shards": 2,
    }
    assert row(parse_info("", 0.0), None)["keys"] == 0
    assert row(parse_info("db0:what\nused_memory:x\n", 0.0), None)["memory"] == 0


@pytest.mark.parametrize(
    ("now", "rate", "hits"),
    [
        (sample(2.0, requests=150, hits=30, misses=10), 50, 75.0),
        (sample(2.0, requests=50), 0, None),
        (sample(2.0, requests=10, hits=4), None, 100.0),  # the counts have started anew
    ],
)
def test_rates(now, rate, hits):
    shown = row(now, sample(requests=50))
    assert (shown["requests_per_second"], shown["hit_percent"]) == (rate, hits)


class TestRows:
    OPTIONS = ("--stat", "--interval", "0.05", "--duration", "0.12")

    def test_of_a_real_server(self, run, real):
        real.set("a", "b")
        code, out, err = run(*self.OPTIONS, "--json")
        assert (code, err) == (0, b"")
        rows = [json.loads(line) for line in out.splitlines()]
        assert len(rows) >= 2
        assert (rows[0]["keys"], rows[0]["shards"], rows[0]["shards_up"]) == (1, 2, 2)
        assert rows[0]["requests_per_second"] is None
        assert rows[-1]["requests_per_second"] is not None

    def test_for_people_and_tables(self, run, real):
        _, out, _ = run(*self.OPTIONS)
        heading, *rows = out.decode().splitlines()
        assert heading.split()[:3] == ["keys", "memory", "clients"]
        assert all(line.split()[-1] == "2/2" for line in rows)
        _, out, _ = run(*self.OPTIONS, "--csv")
        names, first, *_ = csv.reader(io.StringIO(out.decode()))
        assert dict(zip(names, first, strict=True))["shards"] == "2"

    def test_a_server_that_goes_away_and_comes_back(self, run):
        """The first connection ends in the middle; on the next an error passes; then Ctrl-C is pressed."""

        def serve(peer):
            peer.read()
            peer.reply(INFO.format(requests=peer.number, hits=0, misses=0).encode())
            peer.read()
            if peer.number == 1:
                peer.reply(b"LOADING the shard is reading its log", ERROR)
                peer.read()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                peer.read()

        with FakeServer(serve) as fake:
            found = run("--stat", "--interval", "0", "--json", options=("-p", str(fake.port)))
        code, out, err = found
        assert code == 0
        assert [json.loads(line)["requests"] for line in out.splitlines()] == [0, 1]
        assert err.splitlines() == [
            b"imds-cli: the server closed the connection",
            b"imds-cli: LOADING the shard is reading its log",
        ]

    def test_a_server_that_is_not_there(self, run, real, free_port):
        code, out, err = run("--stat", options=("-p", free_port))
        assert (code, out) == (3, b"")
        assert b"cannot connect" in err

    def test_a_server_that_stays_away(self, run):
        def serve(peer):
            if peer.number == 0:
                peer.read()
                peer.reply(INFO.encode())
            peer.read()

        with FakeServer(serve) as fake:
            code, out, err = run(*self.OPTIONS, options=("-p", str(fake.port)))
        assert (code, len(out.splitlines())) == (3, 2)  # a heading and a row
        assert set(err.splitlines()) == {b"imds-cli: the server closed the connection"}
