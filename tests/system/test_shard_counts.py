"""Another number of shards: nothing is lost, hidden or changed, even if the move is killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from serving import Server, until

from imds import Client
from imds.datadir import DataDir
from imds.protocol import encode_request
from imds.reshard import ShardLogs

Contents = dict[bytes, bytes | list[tuple[bytes, float]]]


def fill(client: Client[bytes], rng: random.Random) -> Contents:
    """Write strings and sorted sets, change and remove some; return what must then be there."""
    strings: dict[bytes, bytes] = {}
    scores: dict[bytes, dict[bytes, float]] = {}
    with client.pipeline() as pipe:
        for number in range(600):
            key = b"string:%d" % rng.randrange(400)
            if number % 7 == 6:
                pipe.delete(key)
                strings.pop(key, None)
            else:
                strings[key] = b"value %d" % number
                pipe.set(key, strings[key])
            key, member = b"set:%d" % rng.randrange(20), b"member:%d" % rng.randrange(40)
            score = rng.choice((number / 4, -1.0, float("inf")))
            if number % 9 == 8:
                pipe.zrem(key, member)
                scores.get(key, {}).pop(member, None)
            else:
                scores.setdefault(key, {})[member] = score
                pipe.zadd(key, score, member)
            pipe.set(b"{one}:%d" % number, b"tagged")
            strings[b"{one}:%d" % number] = b"tagged"
    contents: Contents = dict(strings)
    for key, members in scores.items():
        if members:
            contents[key] = sorted(members.items(), key=lambda pair: (pair[1], pair[0]))
    return contents


def read(client: Client[bytes], keys: list[bytes]) -> Contents:
    """Return what the keys hold, as far as they are there."""
    with client.pipeline() as pipe:
        for key in keys:
            pipe.zrange(key) if key.startswith(b"set:") else pipe.get(key)
        return {key: value for key, value in zip(keys, pipe.execute(), strict=True) if value}


def test_everything_is_the_same_with_any_number_of_shards(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "4")
    contents = fill(one.client(), random.Random(3))
    asked = [b"string:%d" % number for number in range(400)] + [b"set:%d" % number for number in range(20)]
    asked += [key for key in contents if key.startswith(b"{one}")]
    assert read(one.client(), asked) == contents
    seed = one.slots.seed
    one.stop()
    for shards in (7, 2, 1, 4):
        one.start("--shards", str(shards))
        assert f" {shards} shard" in one.ready_line
        assert f" {len(contents)} keys loaded" in one.ready_line
        client = one.client()
        assert read(client, asked) == contents
        assert client.set(b"string:0", b"written with %d shards" % shards)
        contents[b"string:0"] = b"written with %d shards" % shards
        rows = one.stats()
        assert len(rows) == shards
        assert all(row["keys"] for row in rows), "every shard has its part"
        tagged = one.slots.shard_of(b"{one}")
        assert rows[tagged]["keys"] >= 600, "keys with one tag stay together"
        one.stop()
        assert one.slots.seed == seed
        generations = [path.name for path in one.directory.glob("gen-*")]
        assert len(generations) == 1, f"old generations were left: {generations}"


def make(directory: Path, shards: int, records: int) -> None:
    """Make a data directory with that many strings: much faster than a server could be asked to."""
    with (
        DataDir.open(directory, shards) as datadir,
        ShardLogs(datadir, datadir.generation, datadir.slots) as logs,
    ):
        logs.load(lambda records: None, lambda done: None)
        for number in range(records):
            key = b"key:%d" % number
            logs.add(key, encode_request((b"set", key, b"value:%d" % number)))


def made_after(directory: Path, begun: int) -> bool:
    """Whether a log of a generation has been made since ``begun``, in nanoseconds."""
    try:
        return any(log.stat().st_mtime_ns > begun for log in directory.glob("gen-*/shard-*/*.aof"))
    except FileNotFoundError:  # removed meanwhile
        return False


def test_a_server_killed_while_it_moves_the_keys_loses_none(server: Callable[..., Server]) -> None:
    one = server()
    count = 60_000
    make(one.directory, 3, count)
    for attempt in range(5):
        begun = time.time_ns()
        one.start("--shards", str(8 - one.slots.shards), ready=False)
        until("the move has begun", lambda begun=begun: made_after(one.directory, begun))
        time.sleep(0.1 * attempt)
        one.kill()
    one.start("--shards", "2")
    assert f" {count} keys loaded" in one.ready_line
    assert len(list(one.directory.glob("gen-*"))) == 1
    client = one.client()
    with client.pipeline() as pipe:
        for number in range(count):
            pipe.get(b"key:%d" % number)
        assert pipe.execute() == [b"value:%d" % number for number in range(count)]
    one.stop()


def test_a_stop_while_it_moves_the_keys_is_clean(server: Callable[..., Server]) -> None:
    one = server()
    make(one.directory, 2, 60_000)
    one.start("--shards", "5", ready=False)
    until("the move has begun", lambda: len(list(one.directory.glob("gen-*"))) == 2)
    one.stop()
    assert [path.name for path in one.directory.glob("gen-*")] == ["gen-000001"], "its beginnings are removed"
    one.start("--shards", "2")
    assert " 60000 keys loaded" in one.ready_line
    one.stop()
