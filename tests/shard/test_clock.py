"""The times in a log: where they are written, what they cost, and that they survive a rewrite."""

import pytest
from rewriting import rewrite
from test_aof import FAST, append, encoded, loaded

from imds.protocol import encode_request
from imds.shard import aof as aof_module
from imds.shard.record import HEADER
from imds.shard.rewrite import open_file
from imds.shard.segment import CLOCK, FILL, SEGMENT_HEADER, encode_mark, read_mark

EFFECTS = [encode_request([b"set", b"key%d" % number, b"value"]) for number in range(3)]


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the time of day."""
    now = [1000.0]
    monkeypatch.setattr(aof_module, "time", lambda: now[0])
    return now


def clocks(directory, aof):
    """Return (times, records) of the log's files, in their order."""
    found = []
    manifest, sequence = aof._manifest, 1
    for name in manifest.names():
        fd, reader = open_file(FAST, directory, manifest, name, sequence, 0)
        for _ in reader.read(lambda records: None):
            pass
        FAST.close(fd)
        assert reader.damage is None
        sequence = reader.sequence if name.endswith(".aof") else manifest.base.sequence
        found.append((reader.clock, reader.records))
    return found


def test_a_clock_is_no_mark_and_a_mark_no_clock():
    assert read_mark(encode_mark(7, 12345, CLOCK), 7, CLOCK) == 12345
    assert read_mark(encode_mark(7, 12345, CLOCK), 7) is None
    assert read_mark(encode_mark(7, 12345), 7, CLOCK) is None
    assert read_mark(encode_mark(7, 12345, CLOCK), 8, CLOCK) is None
    assert read_mark(encode_mark(7, 12345, CLOCK)[:-1], 7, CLOCK) is None


def test_a_second_of_appends_has_one(tmp_path, clock):
    aof, _ = loaded(tmp_path)
    before = aof.stats()["aof_bytes"]
    for effect in EFFECTS:
        append(aof, [effect])
        clock[0] += 0.25
    size = len(EFFECTS) * HEADER.size + sum(map(len, EFFECTS)) + HEADER.size
    assert aof.stats()["aof_bytes"] - before == size
    assert clocks(tmp_path, aof) == [(1000_000_000, 3)]
    clock[0] = 1001.5
    append(aof, EFFECTS)
    assert clocks(tmp_path, aof) == [(1001_500_000, 6)]
    aof.close()
    again, effects = loaded(tmp_path)
    assert effects == EFFECTS * 2
    assert again.clock == 1001_500_000
    again.close()


def test_a_clock_set_back_is_written_too(tmp_path, clock):
    aof, _ = loaded(tmp_path)
    append(aof, EFFECTS)
    clock[0] -= 500
    append(aof, EFFECTS)
    assert clocks(tmp_path, aof) == [(500_000_000, 6)]
    aof.close()


def test_a_refused_append_takes_its_clock_along(tmp_path, clock, monkeypatch):
    aof, _ = loaded(tmp_path)

    def full(storage, fd, data, offset):
        storage.write_at(fd, data[:10], offset)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(aof_module, "write_all_at", full)
        with pytest.raises(aof_module.AofWriteError):
            aof.append(encoded(aof, EFFECTS))
    assert clocks(tmp_path, aof) == [(0, 0)]
    append(aof, EFFECTS)
    assert clocks(tmp_path, aof) == [(1000_000_000, 3)]
    aof.close()


def test_a_base_has_the_last_time_of_what_it_was_made_of(tmp_path, clock):
    aof, _ = loaded(tmp_path)
    append(aof, EFFECTS)
    clock[0] += 5
    append(aof, EFFECTS)
    rewrite(aof)
    assert clocks(tmp_path, aof) == [(1005_000_000, 3), (0, 0)]
    aof.close()
    again, _ = loaded(tmp_path)
    assert again.clock == 1005_000_000
    again.close()


def test_cut_in_a_clock_is_a_torn_tail(tmp_path, clock):
    aof, _ = loaded(tmp_path)
    append(aof, EFFECTS)
    aof.close()
    path = aof.segments()[-1]
    whole = path.read_bytes()
    for size in range(SEGMENT_HEADER.size, SEGMENT_HEADER.size + HEADER.size + 1):
        path.write_bytes(whole[:size])
        again, effects = loaded(tmp_path)
        torn = (
            whole[SEGMENT_HEADER.size : size].rstrip(FILL)
            if (size - SEGMENT_HEADER.size) % HEADER.size
            else b""
        )
        assert (effects, again.torn_bytes) == ([], len(torn))
        again.close()
