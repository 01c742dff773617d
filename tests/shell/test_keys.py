"""--scan and --bigkeys, on a real server, and on one that answers otherwise."""

import json
import sys

import pytest
from fake_server import FakeServer

from imds.protocol import ERROR, LIST, encode_list
from imds.shell.keys import Kind

ODD = b"\xff\n"


@pytest.fixture
def keys(real):
    """Two hundred keys of each kind, and an odd one."""
    with real.pipeline() as pipe:
        for number in range(200):
            pipe.set(f"string:{number}", "x" * number)
            for member in range(number % 7 + 1):
                pipe.zadd(f"zset:{number}", member, f"m{member}")
        pipe.set(ODD, "y" * 1000)


class TestScan:
    def test_every_key_as_its_bytes(self, run, keys):
        code, out, err = run("--scan", "--count", "7")
        assert (code, err) == (0, b"")
        everything = [f"{kind}:{n}".encode() for kind in ("string", "zset") for n in range(200)]
        found = out.replace(ODD + b"\n", b"").splitlines()
        assert set(found) == set(everything)
        assert out.count(ODD + b"\n") >= 1

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--pattern", "string:1?"], {f"string:1{n}" for n in range(10)}),
            (["--pattern", "*:19?", "--type", "zset"], {f"zset:19{n}" for n in range(10)}),
            (["--pattern", "nothing"], set()),
        ],
    )
    def test_some_keys(self, run, keys, options, expected):
        code, out, _ = run("--scan", *options)
        assert (code, set(out.decode().split())) == (0, expected)

    def test_forms(self, run, keys, monkeypatch):
        pattern = ("--pattern", "[\udcff]*")
        assert set(run("--scan", "--json", *pattern)[1].splitlines()) == {b'{"base64": "/wo="}'}
        assert set(run("--scan", "--csv", "--pattern", "zset:7")[1].splitlines()) == {b'"zset:7"'}
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
        assert set(run("--scan", *pattern)[1].splitlines()) == {b'"\\xff\\n"'}
        assert set(run("--scan", "--raw", *pattern)[1].split(b"\n")) == {b"\xff", b""}

    def test_a_shard_that_is_down(self, run):
        def serve(peer):
            pages = [(LIST, encode_list([b"5", b"a"])), (ERROR, b"SHARDDOWN shard 1 is down")]
            for status, payload in pages:
                peer.read()
                peer.reply(payload, status)
            peer.read()

        with FakeServer(serve) as fake:
            found = run("--scan", options=("-p", str(fake.port)))
        assert found == (2, b"a\n", b"imds-cli: SHARDDOWN shard 1 is down\n")


class TestBigkeys:
    def test_the_largest_of_each_kind(self, run, keys):
        code, out, err = run("--bigkeys", "--json", "--top", "3", "--count", "7")
        assert (code, err) == (0, b"")
        found = json.loads(out)
        assert found["string"]["largest"] == [
            {"key": {"base64": "/wo="}, "bytes": 1000},
            {"key": "string:199", "bytes": 199},
            {"key": "string:198", "bytes": 198},
        ]
        assert [key["members"] for key in found["zset"]["largest"]] == [7, 7, 7]
        assert found["string"]["keys"] >= 201  # a scan may return a key twice
        assert found["zset"]["members"] >= sum(number % 7 + 1 for number in range(200))

    def test_for_people_and_tables(self, run, keys):
        code, out, _ = run("--bigkeys", "--pattern", "string:19[89]", "--top", "1")
        heading, largest, none = out.decode().splitlines()
        assert (code, heading) == (0, "string: 2 keys, 397 B, 198.5 bytes on average")
        assert (largest, none) == ("  199 bytes  string:199", "zset: none")
        code, out, _ = run("--bigkeys", "--pattern", "*:6", "--csv")
        assert out == b'"string","6","string:6"\n"zset","7","zset:6"\n'

    def test_an_empty_server(self, run, real):
        assert run("--bigkeys") == (0, b"string: none\nzset: none\n", b"")

    def test_a_key_that_changes_its_kind_meanwhile(self, run):
        def serve(peer):
            while tokens := peer.read():
                if tokens[0] == b"scan":
                    peer.reply(encode_list([b"0", b"a", b"b", b"gone"]), LIST)
                elif tokens[0] == b"type":
                    peer.reply(b"none" if tokens[1] == b"gone" else b"string")
                elif tokens[0] == b"strlen" and tokens[1] == b"a":
                    peer.reply(b"WRONGTYPE no string", ERROR)
                else:
                    peer.reply(b"3")

        with FakeServer(serve) as fake:
            code, out, err = run("--bigkeys", "--csv", options=("-p", str(fake.port)))
        assert (code, out, err) == (0, b'"string","3","b"\n', b"")


def test_a_key_that_is_seen_twice_is_listed_once():
    kind = Kind("bytes", top=2)
    for size, key in [(1, b"a"), (5, b"b"), (5, b"b"), (3, b"c")]:
        kind.add(size, key)
    assert sorted(kind.largest) == [(3, b"c"), (5, b"b")]
