"""Another number of shards: the same data, each key in its new shard, whatever interrupts the move."""

import errno
import logging
import os
import random
import shutil

import pytest
from failing_storage import Crash, FailingStorage, FastStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from test_datadir import synced_before_commit

from imds import reshard as reshard_module
from imds.datadir import DataDir, DataDirError
from imds.hashslots import SlotMap
from imds.protocol import encode_request, split_request
from imds.reshard import ShardLogs, effect_key, reshard
from imds.shard.record import each_effect

FAST = FastStorage()


class Model:
    """What a log means, for four commands, in plain dicts."""

    def __init__(self):
        self.data = {}

    def apply(self, tokens):
        name, key, *rest = tokens
        if name == b"set":
            (self.data[key],) = rest
        elif name == b"del":
            self.data.pop(key, None)
        elif name == b"zadd":
            self.data.setdefault(key, {})[rest[1]] = float(rest[0])
        else:
            assert name == b"zrem"
            members = self.data.get(key, {})
            members.pop(rest[0], None)
            if not members:
                self.data.pop(key, None)


def random_effects(seed, count, keys=40):
    """Return effects as a shard would log them: a key's kind fits what is done to it."""
    rng = random.Random(seed)
    model = Model()
    effects = []
    for _ in range(count):
        key = rng.choice([b"key%d", b"{tag%d}x", b"\xff\0%d"]) % rng.randrange(keys)
        old = model.data.get(key)
        kinds = [b"set", b"del"] if isinstance(old, bytes) else [b"set", b"del", b"zadd", b"zadd", b"zrem"]
        name = rng.choice(kinds)
        member = b"m%d" % rng.randrange(9)
        score = repr(rng.uniform(-9, 9)).encode()
        value = rng.randbytes(rng.randrange(60))
        effect = {
            b"set": [name, key, value],
            b"del": [name, key],
            b"zadd": [name, key, score, member],
            b"zrem": [name, key, member],
        }[name]
        model.apply(effect)
        effects.append(effect)
    return effects, model.data


def fill(path, shards, effects):
    """Make a data directory and log ``effects`` in it."""
    with (
        DataDir.open(path, shards, FAST) as datadir,
        ShardLogs(datadir, datadir.generation, datadir.slots) as logs,
    ):
        logs.load(lambda records: None, lambda done: None)
        for effect in effects:
            logs.add(effect[1], encode_request(effect))


def contents(path, shards=None):
    """Replay a data directory; check that every key is in its shard. Return (data, shard count, records)."""
    model = Model()
    records = 0
    with DataDir.open(path, None, FAST) as datadir:
        if shards:
            assert datadir.shards == shards
        for shard in range(datadir.shards):

            def apply(batch, shard=shard, slots=datadir.slots):
                nonlocal records
                for _, start, end in each_effect(batch):
                    tokens, stop = split_request(batch, start)
                    assert stop == end
                    assert slots.shard_of(tokens[1]) == shard
                    model.apply(tokens)
                    records += 1

            aof = ShardLogs(datadir, datadir.generation, datadir.slots).logs[shard]
            for _ in aof.load(apply):
                pass
            aof.close()
        return model.data, datadir.shards, records


def move(path, shards, storage=FAST):
    with DataDir.open(path, None, storage) as datadir:
        moved = reshard(datadir, shards)
        assert datadir.shards == shards
    return moved


# -- the move --------------------------------------------------------------------------------------------


def test_four_to_seven_to_two_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(reshard_module, "_CHUNK", 1000)
    monkeypatch.setattr(reshard_module, "_FLUSH", 500)
    path = tmp_path / "data"
    effects, data = random_effects(seed=4721, count=3000)
    fill(path, 4, effects)
    assert contents(path, 4) == (data, 4, 3000)
    with DataDir.open(path, None, FAST) as datadir:
        seed = datadir.slots.seed
    for generation, shards in enumerate((7, 2, 1), 2):
        size = sum(found.stat().st_size for found in path.rglob("*.aof"))
        moved = move(path, shards)
        assert (moved.records, moved.bytes, moved.torn_bytes) == (3000, size, 0)
        assert contents(path) == (data, shards, 3000)
        with DataDir.open(path, None, FAST) as datadir:
            assert datadir.generation == generation
            assert datadir.slots.owners == SlotMap.even(shards, seed).owners
            assert datadir.slots.seed == seed
        assert [found.name for found in path.glob("gen-*")] == [f"gen-{generation:06d}"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 30), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 60))
def test_any_counts(tmp_path_factory, seed, counts, size):
    path = tmp_path_factory.mktemp("any") / "data"
    effects, data = random_effects(seed, size, keys=8)
    fill(path, counts[0], effects)
    for shards in counts[1:]:
        assert move(path, shards).records == size
        assert contents(path) == (data, shards, size)


def test_uneven_map_is_followed(tmp_path):
    path = tmp_path / "data"
    with DataDir.open(path, 3, FAST) as datadir:
        uneven = bytes((slot * 7 // 11) % 3 for slot in range(16384))
        datadir.commit(1, SlotMap(uneven, 3, datadir.slots.seed))
    effects, data = random_effects(seed=1, count=200)
    fill(path, 3, effects)
    assert contents(path, 3)[0] == data
    move(path, 3)
    assert contents(path, 3)[0] == data


def test_written_on_after_the_move(tmp_path):
    path = tmp_path / "data"
    effects, _ = random_effects(seed=2, count=100)
    fill(path, 2, effects)
    move(path, 3)
    more = [[b"set", b"key%d" % number, b"again"] for number in range(40)]
    fill(path, 3, more)
    model = Model()
    for effect in effects + more:
        model.apply(effect)
    assert contents(path, 3) == (model.data, 3, 140)


def test_torn_tail_is_cut_reported_and_kept(tmp_path, caplog):
    path = tmp_path / "data"
    effects, data = random_effects(seed=3, count=50)
    fill(path, 2, effects)
    segment = path / "gen-000001" / "shard-001" / "00000001.aof"
    good = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b"half a record")
    assert move(path, 3).torn_bytes == 13
    assert contents(path, 3) == (data, 3, 50)
    assert f"{segment}: torn tail: 13 bytes at offset {good}" in caplog.text
    kept = path / "torn" / f"gen-000001-shard-001-00000001.aof.torn-{good}"
    assert kept.read_bytes() == b"half a record"


def test_damage_stops_the_move(tmp_path):
    path = tmp_path / "data"
    effects, data = random_effects(seed=3, count=50)
    fill(path, 2, effects)
    segment = path / "gen-000001" / "shard-001" / "00000001.aof"
    good = segment.read_bytes()
    segment.write_bytes(good[:70] + bytes([good[70] ^ 1]) + good[71:])
    with pytest.raises(DataDirError, match=f"cannot move the keys to 3 shards: .*{segment}.*byte 64"):
        move(path, 3)
    assert [found.name for found in path.glob("gen-*")] == ["gen-000001"]
    segment.write_bytes(good)
    assert contents(path, 2) == (data, 2, 50)


@pytest.mark.parametrize(
    "effect",
    [b"", b"\0\0\0\1\0\0\0\5flush", b"\0\0\0\2\0\0\0\3del\0\0\0\x09k", b"\0\0\0\2\xff\xff\xff\xffdelk"],
)
def test_effect_without_a_key_stops_the_move(tmp_path, effect):
    with pytest.raises(DataDirError, match="no key"):
        effect_key(effect)
    path = tmp_path / "data"
    with DataDir.open(path, 1, FAST) as datadir:
        with ShardLogs(datadir, 1, datadir.slots) as logs:
            logs.load(lambda records: None, lambda done: None)
            logs.add(b"", effect)
        with pytest.raises(DataDirError, match="no key"):
            reshard(datadir, 2)
    assert [found.name for found in path.glob("gen-*")] == ["gen-000001"]


@given(st.lists(st.binary(max_size=9), min_size=2, max_size=5), st.binary(max_size=9))
def test_effect_key_is_token_one(tokens, tail):
    frame = encode_request(tokens)
    for buffer in (frame, memoryview(frame), frame + tail):
        assert effect_key(buffer) == tokens[1]


@given(st.binary(max_size=40))
def test_effect_key_of_garbage(garbage):
    try:
        key = effect_key(garbage)
    except DataDirError:
        return
    assert key in garbage


# -- interrupted -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A data directory with 2 shards, one of them with a torn tail."""
    path = tmp_path_factory.mktemp("template") / "data"
    effects, data = random_effects(seed=77, count=60, keys=10)
    fill(path, 2, effects)
    with (path / "gen-000001" / "shard-000" / "00000001.aof").open("ab") as file:
        file.write(b"torn")
    return path, data


def interrupted(template, tmp_path, error):
    """Run the move once for each of its operations, hit there by ``error`` or a crash; yield each outcome."""
    source, data = template
    for at in range(1, 2000):
        path = tmp_path / f"{at}"
        shutil.copytree(source, path)
        storage = FailingStorage(at, error)
        outcome = None
        try:
            move(path, 3, storage)
        except (Crash, DataDirError, OSError) as caught:
            outcome = caught
        finally:
            storage.release()
        yield path, storage, outcome
        found, shards, records = contents(path)
        assert found == data, f"operation {at}: {storage.calls[at - 1]}"
        assert records == 60
        assert shards in (2, 3)
        assert len(list(path.glob("gen-*"))) == 1
        assert not (path / "manifest.json.new").exists()
        saved = [tail.read_bytes() for tail in path.rglob("*torn-*")]
        assert b"torn" in saved
        shutil.rmtree(path)
        if outcome is None and len(storage.calls) < at:
            return
    pytest.fail("the move never came to its end")


def test_crash_at_every_operation(template, tmp_path, monkeypatch):
    monkeypatch.setattr(reshard_module, "_FLUSH", 400)
    seen = set()
    for path, storage, outcome in interrupted(template, tmp_path, None):
        seen.update(name for name, _ in storage.calls)
        committed = ("rename", path / "manifest.json.new") in storage.calls[: storage.at - 1]
        with DataDir.open(path, None, FAST) as datadir:
            assert datadir.shards == (3 if committed else 2)
        assert (outcome is None) == (len(storage.calls) < storage.at)
    assert {
        "mkdir",
        "write",
        "truncate",
        "fsync",
        "fdatasync",
        "fsync_dir",
        "rename",
        "unlink",
        "rmdir",
    } <= seen


def test_error_at_every_operation(template, tmp_path, monkeypatch):
    monkeypatch.setattr(reshard_module, "_FLUSH", 400)
    error = OSError(errno.ENOSPC, "No space left on device")
    told = set()
    for path, storage, outcome in interrupted(template, tmp_path, error):
        before, hit = storage.calls[: storage.at - 1], storage.calls[storage.at - 1 : storage.at]
        if hit and hit[0][0] == "fdatasync" and hit[0] not in before:
            assert isinstance(outcome, DataDirError)  # a log that is not synced is never made the data
        if isinstance(outcome, DataDirError):
            told.add(str(outcome).replace(str(path), "DIR"))
            if "gen-000002" in str(storage.calls[storage.at - 1]):
                # The room is given back at once.
                assert not (path / "gen-000002").exists()
    assert told
    for text in told:
        assert "No space left on device" in text
        assert "\n" not in text


def test_everything_is_synced_before_the_commit(template, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(template[0], path)
    storage = FailingStorage(at=1 << 30)
    move(path, 3, storage)
    synced_before_commit(storage.calls, path)
    removed = [where for name, where in storage.calls if name == "unlink" and "gen-000001" in str(where)]
    assert len(removed) == 4  # each shard's log and its manifest
    commit = storage.calls.index(
        ("fsync_dir", path), storage.calls.index(("rename", path / "manifest.json.new"))
    )
    assert storage.calls.index(("unlink", removed[0])) > commit


def test_old_generation_that_cannot_be_removed_is_left_to_the_next_start(tmp_path, caplog):
    path = tmp_path / "data"
    effects, data = random_effects(seed=5, count=20)
    fill(path, 2, effects)

    class Sticky(FastStorage):
        def unlink(self, path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    move(path, 3, Sticky())
    assert "generation 1 is left to the next start" in caplog.text
    assert contents(path) == (data, 3, 20)
    assert not (path / "gen-000001").exists()


# -- what a person sees ----------------------------------------------------------------------------------


def test_says_what_it_did(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "data"
    fill(path, 2, random_effects(seed=6, count=20)[0])
    move(path, 4)
    assert f"{path}: 20 records moved to 4 shards" in caplog.text
