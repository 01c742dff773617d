"""One shard's log on disk: what a crash may do to it, what else may, and that the two are told apart."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imds.protocol import encode_request
from imds.shard import aof as aof_module
from imds.shard import segment as segment_module
from imds.shard.aof import (
    FORMAT,
    MAGIC,
    MARK_EVERY,
    SEGMENT_HEADER,
    SUSPECT,
    Aof,
    AofBroken,
    AofDamaged,
    AofSyncFailed,
    AofWriteError,
    create_log,
    create_segment,
    segment_name,
)
from imds.shard.manifest import MANIFEST, Manifest, write_manifest
from imds.shard.record import HEADER, RecordEncoder, each_effect
from imds.shard.segment import CLOCK, FILL, MARK, ROOM, encode_mark, end_of_records, read_mark
from imds.storage import Storage

START = SEGMENT_HEADER.size
EFFECTS = [encode_request([b"set", b"key%d" % i, b"value" * i]) for i in range(5)]


class Fast(Storage):
    """The real files without the waiting for the disk."""

    def fsync(self, fd):
        pass

    def fdatasync(self, fd):
        pass

    def fsync_dir(self, path):
        pass


FAST = Fast()


@pytest.fixture(autouse=True)
def no_clocks(monkeypatch):
    """Leave out what would move every offset by the same amount; test_clock.py has them in."""
    monkeypatch.setattr(aof_module, "CLOCK_EVERY", 1 << 62)


def opened(directory, policy="no", storage=FAST):
    return Aof(directory, shard=0, generation=1, policy=policy, storage=storage)


def loaded(directory, policy="no", storage=FAST, chunk=1 << 20):
    """Return the log in ``directory``, made if need be, after loading it; and its effects."""
    if not any(directory.iterdir()):
        create_log(FAST, directory, shard=0, generation=1)
    aof = opened(directory, policy, storage)
    return aof, load(aof, chunk)


def load(aof, chunk=1 << 20):
    effects, counts = [], []
    try:
        for done, total, records in aof.load(
            lambda records: effects.extend(bytes(records[a:b]) for _, a, b in each_effect(records)), chunk
        ):
            assert 0 <= done <= total
            assert records == len(effects)
            counts.append(done)
    except BaseException:
        aof.close()
        raise
    assert counts == sorted(counts)
    assert counts
    return effects


def encoded(aof, effects):
    encoder = RecordEncoder(aof.seed, aof.sequence)
    for effect in effects:
        encoder.add(effect)
    return encoder.pending()


def append(aof, effects):
    aof.append(encoded(aof, effects))
    aof.sequence += len(effects)  # as the encoder counts, so that the next call continues


def write(directory, effects):
    """Append effects to the log in ``directory`` in one session; return the segment's path."""
    aof, _ = loaded(directory)
    append(aof, effects)
    aof.close()
    return aof.segments()[-1]


def read(directory, chunk=1 << 20):
    """Return the effects in a log and how many bytes loading cut off."""
    aof, effects = loaded(directory, chunk=chunk)
    aof.close()
    return effects, aof.torn_bytes


def held(aof):
    """Return how many bytes the files of a log hold, without its room."""
    return sum(ends(path)[-1] for path in aof.segments())


def picture(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -- the format, and a plain life of it ------------------------------------------------------------------


def test_header_bytes(tmp_path):
    create_segment(FAST, tmp_path, shard=5, generation=7, number=3, sequence=9)
    head = (tmp_path / "00000003.aof").read_bytes()
    assert len(head) == 64
    assert head[:8] == MAGIC == b"imds-aof"
    assert head[8:12] == b"\0\0\0\1"
    assert head[12:16] == b"\0\0\0\5"
    assert head[16:24] == b"\0" * 7 + b"\7"
    assert head[32:40] == b"\0" * 7 + b"\x09"
    assert head[40:48] == b"\0" * 7 + b"\3"
    assert head[48:56] == bytes(8)
    with pytest.raises(FileExistsError):
        create_segment(FAST, tmp_path, shard=5, generation=7, number=3, sequence=9)
    assert ((tmp_path / "00000003.aof").stat().st_mode & 0o777) == 0o600


def test_each_segment_has_its_own_seed(tmp_path):
    seeds = set()
    for number in range(3):
        create_segment(FAST, tmp_path, shard=0, generation=1, number=number)
        seeds.add((tmp_path / segment_name(number)).read_bytes()[24:32])
    assert len(seeds) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=60), max_size=4), max_size=4), st.integers(1, 90))
def test_effects_come_back(tmp_path_factory, sessions, chunk):
    directory = tmp_path_factory.mktemp("log")
    expected = []
    for effects in sessions:
        aof, found = loaded(directory, chunk=chunk)
        assert found == expected
        assert aof.sequence == len(expected) + 1
        append(aof, effects)
        aof.close()
        expected += effects
    assert read(directory, chunk) == (expected, 0)


def test_record_larger_than_the_chunk_is_read_once(tmp_path):
    effects = [b"small", b"x" * 100_000, b"small too"]
    write(tmp_path, effects)

    sizes = []

    class Counting(Fast):
        def read(self, fd, size, offset):
            data = super().read(fd, size, offset)
            sizes.append(len(data))
            return data

    aof, found = loaded(tmp_path, storage=Counting(), chunk=64)
    aof.close()
    assert found == effects
    assert sum(sizes) < 102_000  # every byte once, however small the chunk,
    assert len(sizes) < 10  # and in one piece


def test_progress_yields_between_chunks(tmp_path):
    write(tmp_path, EFFECTS * 100)
    aof = opened(tmp_path)
    steps = list(aof.load(lambda records: None, chunk=1000))
    aof.close()
    size = aof.disk_bytes()
    assert len(steps) >= size // 1000
    assert steps[-1] == (size, size, 500)


def test_load_left_early_then_closed(tmp_path):
    write(tmp_path, EFFECTS * 100)
    before = len(list(Path("/proc/self/fd").iterdir()))
    aof = opened(tmp_path)
    steps = aof.load(lambda records: None, chunk=100)
    next(steps)
    steps.close()
    aof.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_apply_cannot_follow_is_damage(tmp_path):
    path = write(tmp_path, EFFECTS)
    before = picture(tmp_path)

    def refuse(records):
        raise ValueError("record 1 is no write")

    with pytest.raises(AofDamaged, match=r"byte 64: .*record 1 is no write") as caught:
        list(opened(tmp_path).load(refuse))
    assert caught.value.path == path
    assert picture(tmp_path) == before


def test_unknown_policy(tmp_path):
    with pytest.raises(ValueError, match="always, everysec, no"):
        opened(tmp_path, "sometimes")


# -- torn tails ------------------------------------------------------------------------------------------


def ends(path):
    """Return where each record and each mark of a segment ends, the header first."""
    data = path.read_bytes()
    found = [START]
    while data[found[-1] : found[-1] + HEADER.size].strip(FILL):
        length = HEADER.unpack_from(data, found[-1])[1]
        found.append(found[-1] + HEADER.size + (0 if length in (MARK, CLOCK) else length))
    return found


def empty(directory, segments=(1,)):
    """Make a log's directory without its segments."""
    directory.mkdir()
    write_manifest(FAST, directory, Manifest(0, 1, None, segments))
    return directory


def test_cut_at_every_byte(tmp_path, caplog):
    source = tmp_path / "source"
    source.mkdir()
    path = write(source, EFFECTS)
    data, marks = path.read_bytes(), ends(path)
    for size in range(START):
        directory = empty(tmp_path / f"cut-{size}")
        (directory / path.name).write_bytes(data[:size])
        refused(directory, 0, "header is cut short")
    for size in range(START, len(data)):
        directory = empty(tmp_path / f"cut-{size}")
        (directory / path.name).write_bytes(data[:size])
        caplog.clear()
        effects, torn = read(directory)
        whole = [mark for mark in marks if mark <= size]
        assert effects == EFFECTS[: max(0, len(whole) - 1)]
        good = whole[-1]
        tail = data[good:size].rstrip(FILL)
        assert torn == len(tail)
        saved = directory / f"{path.name}.torn-{good}"
        if torn:
            assert saved.read_bytes() == tail
            assert str(directory / path.name) in caplog.text
            assert f"{torn} bytes at offset {good}" in caplog.text
        else:
            assert not saved.exists()
            assert not caplog.records
        write(directory, [b"after"])
        assert read(directory) == ([*effects, b"after"], 0)


def test_every_byte_flipped(tmp_path):
    """Whatever bit is wrong: the log is refused as it is, or all that is lost is the last mark."""
    source = tmp_path / "source"
    source.mkdir()
    path = write(source, EFFECTS)
    data, stops = path.read_bytes(), ends(path)
    directory = empty(tmp_path / "flipped")
    manifest = (directory / MANIFEST).read_bytes()
    for byte, bit in product(range(len(data)), (0, 7)):
        flipped = bytearray(data)
        flipped[byte] ^= 1 << bit
        (directory / path.name).write_bytes(flipped)
        if byte >= stops[-2]:
            assert read(directory) == (EFFECTS, HEADER.size)
            saved = directory / f"{path.name}.torn-{stops[-2]}"
            assert saved.read_bytes() == flipped[stops[-2] :]
            saved.unlink()
        else:
            with pytest.raises(AofDamaged) as caught:
                read(directory)
            record = max((stop for stop in stops if stop <= byte), default=0)
            assert caught.value.offset == record if byte >= START else caught.value.offset < START
            assert caught.value.path == directory / path.name
            assert picture(directory) == {MANIFEST: manifest, path.name: bytes(flipped)}


def test_every_byte_flipped_that_no_mark_speaks_for(tmp_path):
    """As a power cut may leave it, with whole records after the hole: what is before the hole counts."""
    source = tmp_path / "source"
    source.mkdir()
    path = write(source, EFFECTS)
    stops = ends(path)[:-1]
    data = path.read_bytes()[: stops[-1]]
    directory = empty(tmp_path / "flipped")
    for byte in range(START, len(data)):
        flipped = bytearray(data)
        flipped[byte] ^= 1
        (directory / path.name).write_bytes(flipped)
        record = max(stop for stop in stops if stop <= byte)
        assert read(directory) == (EFFECTS[: stops.index(record)], len(data) - record)
        saved = directory / f"{path.name}.torn-{record}"
        assert saved.read_bytes() == flipped[record:]
        saved.unlink()


@pytest.mark.parametrize(
    "tail", [b"\0", b"\0" * 19, b"\0" * 5000, b"\xff" * 300, b"garbage" * 100, FILL * 9 + b"!"]
)
@pytest.mark.parametrize("room", [0, 1, 2 * ROOM])
def test_tail_of_garbage_is_torn(tmp_path, tail, room):
    path = write(tmp_path, EFFECTS)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(tail + FILL * room)
    assert read(tmp_path) == (EFFECTS, len(tail))
    assert path.stat().st_size == size
    assert (tmp_path / f"{path.name}.torn-{size}").read_bytes() == tail


@pytest.mark.parametrize("room", [1, 19, 20, 5000, 2 * ROOM])
def test_room_is_no_tail(tmp_path, room, caplog):
    path = write(tmp_path, EFFECTS[:2])
    with path.open("ab") as file:
        file.write(FILL * room)
    assert read(tmp_path) == (EFFECTS[:2], 0)
    assert not caplog.records
    write(tmp_path, EFFECTS[2:])
    assert read(tmp_path) == (EFFECTS, 0)
    assert path.stat().st_size == ends(path)[-1]  # the room is gone with the end of the session


def test_more_than_room_is_torn(tmp_path):
    path = write(tmp_path, EFFECTS)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(FILL * (2 * ROOM + 7))
    assert read(tmp_path) == (EFFECTS, 7)
    assert path.stat().st_size == size


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 3))
def test_any_garbage_is_torn(tmp_path_factory, garbage, count):
    directory = tmp_path_factory.mktemp("log")
    path = write(directory, EFFECTS[:count])
    with path.open("ab") as file:
        file.write(garbage)
    assert read(directory) == (EFFECTS[:count], len(garbage.rstrip(FILL)))


def test_torn_twice_at_the_same_place_keeps_both_tails(tmp_path):
    path = write(tmp_path, EFFECTS[:1])
    size = path.stat().st_size
    for tail in (b"one", b"two", b"three"):
        with path.open("ab") as file:
            file.write(tail)
        assert read(tmp_path) == (EFFECTS[:1], len(tail))
    assert (tmp_path / f"{path.name}.torn-{size}").read_bytes() == b"one"
    assert (tmp_path / f"{path.name}.torn-{size}.2").read_bytes() == b"two"
    assert (tmp_path / f"{path.name}.torn-{size}.3").read_bytes() == b"three"


def test_header_of_zeros_is_damage(tmp_path):
    """A header is on the disk before the manifest names its file: no crash takes it."""
    path = write(tmp_path, [])
    path.write_bytes(bytes(START))
    refused(tmp_path, 0, "does not begin as a segment")


def test_a_tail_is_safe_before_it_is_cut(tmp_path):
    """The order on disk, by name: save, sync the copy and its name, cut, sync the log."""
    path = write(tmp_path, EFFECTS)
    with path.open("ab") as file:
        file.write(b"torn")
    steps = []

    class Noting(Fast):
        def open(self, path, flags):
            self.last = super().open(path, flags)
            steps.append(("open", path.name))
            return self.last

        def write(self, fd, data):
            steps.append("write")
            return super().write(fd, data)

        def fsync(self, fd):
            steps.append("sync the copy" if fd == self.last else "sync the log")

        def fsync_dir(self, path):
            steps.append("sync the name")

        def truncate(self, fd, size):
            steps.append("cut")
            super().truncate(fd, size)

    aof, _ = loaded(tmp_path, storage=Noting())
    aof.close()
    saved = next(step for step in steps if step[0] == "open" and ".torn-" in step[1])
    rest = steps[steps.index(saved) + 1 :]
    assert saved[1].startswith(f"{path.name}.torn-")
    assert rest[:5] == ["write", "sync the copy", "sync the name", "cut", "sync the log"]
    assert rest[5:] == ["sync the name"], "of the manifest, whatever was cut"


def test_crash_while_cutting(tmp_path):
    """Stop the repair of a tail before each of its operations: the next load finishes it."""

    class Stop(Exception):
        pass

    class Stopping(Fast):
        def __init__(self, at):
            self.left = at

        def step(self):
            self.left -= 1
            if self.left < 0:
                raise Stop

    for name in ("open", "read", "write", "truncate", "fsync", "fsync_dir", "close"):

        def stepped(self, *args, name=name):
            self.step()
            return getattr(Fast, name)(self, *args)

        setattr(Stopping, name, stepped)

    for at in range(100):
        directory = tmp_path / str(at)
        directory.mkdir()
        path = write(directory, EFFECTS)
        good = path.stat().st_size
        with path.open("ab") as file:
            file.write(b"torn")
        storage = Stopping(at)
        try:
            aof, _ = loaded(directory, storage=storage)
        except Stop:
            pass
        else:
            aof._storage = FAST
            aof.close()
            break
        assert read(directory)[0] == EFFECTS
        assert path.stat().st_size == good
        tails = [data for name, data in picture(directory).items() if "torn" in name]
        assert b"torn" in tails
    else:
        pytest.fail("no load came to its end")
    assert at > 8


# -- a segment that is being read while somebody appends to it ---------------------------------------------


def records_end(path, storage=FAST):
    fd = os.open(path, os.O_RDONLY)
    try:
        return end_of_records(storage, fd, path)
    finally:
        os.close(fd)


def test_the_end_of_records_is_before_the_room(tmp_path):
    aof, _ = loaded(tmp_path)
    path = aof.segments()[-1]
    assert records_end(path) == START
    append(aof, EFFECTS)
    assert records_end(path) == held(aof) < aof.disk_bytes()
    aof.flush()
    append(aof, [b"x" * MARK_EVERY])
    aof.flush()
    append(aof, EFFECTS)  # and a mark
    assert len(marks(path)) == 1
    assert records_end(path) == held(aof)
    aof.close()
    assert records_end(path) == path.stat().st_size


def test_the_end_of_records_behind_a_mark_at_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "CLOCK_EVERY", 1)
    aof, _ = loaded(tmp_path)
    append(aof, EFFECTS)
    path = aof.segments()[-1]
    assert records_end(path) == held(aof)
    aof.close()


class Live(Fast):
    """Shows a file at ``stages``, one for each reading, the last one for ever."""

    def __init__(self, *stages):
        self.stages = list(stages)

    def size(self, file):
        return len(self.stages[0])

    def read(self, fd, size, offset):
        data = self.stages[0][offset : offset + size]
        if size > HEADER.size and len(self.stages) > 1 and offset + size >= len(self.stages[0]):
            self.stages.pop(0)
        return data


def test_the_end_of_records_that_are_being_written(tmp_path):
    """The last record half-written, or missing while the one behind it is there: both came later."""
    path = write(tmp_path, EFFECTS)
    data, stops = path.read_bytes()[: ends(path)[-2]], ends(path)
    whole = data + FILL * 5000
    for at in range(stops[2], stops[3]):
        half = data[:at] + FILL * (len(whole) - at)
        assert records_end(path, Live(half, whole)) == stops[2]
        taken_back = data[: stops[2]] + FILL * (len(half) - stops[2])
        assert records_end(path, Live(half, half, taken_back)) == stops[2]
        hole = data[:at] + FILL * (stops[3] - at) + data[stops[3] :] + FILL * 5000
        assert records_end(path, Live(hole, whole)) == stops[2]
        # What stays like that is damage, or a torn tail, and to be copied as it is.
        assert records_end(path, Live(hole)) == len(hole)
    assert records_end(path, Live(data[: stops[2]] + FILL * 5000)) == stops[2]


# -- damage elsewhere ------------------------------------------------------------------------------------


def refused(directory, offset, *words):
    before = picture(directory)
    with pytest.raises(AofDamaged) as caught:
        read(directory)
    assert caught.value.offset == offset
    for word in words:
        assert word in str(caught.value)
    assert picture(directory) == before


@pytest.mark.parametrize("junk", [0, 1, 7, 21, 300])
@pytest.mark.parametrize("fill", [0, 255, None])
def test_mark_after_damage_is_found_anywhere(tmp_path, monkeypatch, junk, fill):
    """Also where the search's windows meet: they are made as small as they can be."""
    monkeypatch.setattr(segment_module, "WINDOW", 16)
    path = write(tmp_path, EFFECTS)
    data, stops = path.read_bytes(), ends(path)
    filling = random.Random(junk).randbytes(junk) if fill is None else bytes([fill]) * junk
    for shift in range(16):
        path.write_bytes(data[: stops[2]] + b"\xee" * shift + filling + data[stops[3] :])
        says = stops[-2] - stops[3] + stops[2] + shift + len(filling)
        refused(tmp_path, stops[2], str(path), f"up to byte {stops[-2]} was safe, says byte {says}")


def test_zeros_in_the_middle(tmp_path):
    path = write(tmp_path, EFFECTS)
    data, stops = path.read_bytes(), ends(path)
    path.write_bytes(data[: stops[1]] + bytes(stops[3] - stops[1]) + data[stops[3] :])
    refused(tmp_path, stops[1], f"says byte {stops[-2]}")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_missing_records(tmp_path, count):
    path = write(tmp_path, EFFECTS)
    data, marks = path.read_bytes(), ends(path)
    path.write_bytes(data[: marks[1]] + data[marks[1 + count] :])
    refused(tmp_path, marks[1], f"sequence number {2 + count}, expected 2")


def test_record_twice(tmp_path):
    """The second one was never confirmed to be on the disk."""
    path = write(tmp_path, EFFECTS)
    data, stops = path.read_bytes(), ends(path)
    path.write_bytes(data + data[stops[4] :])
    assert read(tmp_path) == (EFFECTS, len(data) - stops[4])


# -- marks -----------------------------------------------------------------------------------------------


def marks(path):
    """Return (offset, position) of each mark in a segment."""
    data = path.read_bytes()
    seed = SEGMENT_HEADER.unpack_from(data)[4]
    found = [(stop, read_mark(data[stop:], seed)) for stop in ends(path)]
    return [(stop, position) for stop, position in found if position is not None]


def test_mark_bytes():
    mark = encode_mark(5, 0x0102030405)
    assert mark[8:] == b"\xff\xff\xff\xff" + b"\0\0\0\1\2\3\4\5"
    assert len(mark) == HEADER.size
    assert read_mark(mark, 5) == read_mark(mark + b"tail", 5) == 0x0102030405
    assert read_mark(mark, 6) is None
    for size in range(len(mark)):
        assert read_mark(mark[:size], 5) is None
    for byte in range(len(mark)):
        assert read_mark(mark[:byte] + bytes([mark[byte] ^ 1]) + mark[byte + 1 :], 5) is None


def test_close_marks_what_it_has_synced(tmp_path):
    path = write(tmp_path, EFFECTS)
    size = path.stat().st_size - HEADER.size
    assert marks(path) == [(size, size)]


def test_opening_and_closing_writes_nothing(tmp_path):
    write(tmp_path, EFFECTS)
    before = picture(tmp_path)
    for policy in ("no", "always", "everysec"):
        aof, _ = loaded(tmp_path, policy)
        aof.close()
        assert picture(tmp_path) == before


def test_marks_speak_of_what_was_synced_before_them(tmp_path):
    """Under always: now and then, each about all that came before it."""
    aof, _ = loaded(tmp_path, "always")
    path, effects = aof.segments()[-1], [b"x" * 500] * 40
    for effect in effects:
        append(aof, [effect])
        aof.sync()
    found = marks(path)
    assert found
    assert all(offset == position for offset, position in found)
    spoken_for = [START, *(position for _, position in found)]
    gaps = [end - start for start, end in zip(spoken_for, [*spoken_for[1:], held(aof)], strict=True)]
    assert all(MARK_EVERY <= gap < MARK_EVERY + 600 for gap in gaps[:-1])
    assert gaps[-1] < MARK_EVERY + 600
    aof.close()
    assert read(tmp_path, chunk=1000) == (effects, 0)


def test_no_mark_without_a_sync(tmp_path):
    aof, _ = loaded(tmp_path, "no")
    path = aof.segments()[-1]
    for _ in range(40):
        append(aof, [b"x" * 500])
        aof.sync()
    assert marks(path) == []
    aof.flush()
    size = held(aof)
    append(aof, [b"one"])
    append(aof, [b"two"])
    assert marks(path) == [(size, size)]
    aof.close()


def test_failed_append_takes_its_mark_back(tmp_path):
    class Full(Fast):
        full = False

        def write_at(self, fd, data, offset):
            if self.full:
                super().write_at(fd, data[:30], offset)
                raise OSError(errno.ENOSPC, "full")
            return super().write_at(fd, data, offset)

    storage = Full()
    aof, _ = loaded(tmp_path, "always", storage)
    path = aof.segments()[-1]
    append(aof, [b"x" * MARK_EVERY])
    aof.sync()
    size = held(aof)
    storage.full = True
    with pytest.raises(AofWriteError):
        append(aof, [b"no"])
    assert aof.disk_bytes() == size
    storage.full = False
    append(aof, [b"yes"])
    assert marks(path) == [(size, size)]
    aof.close()
    assert read(tmp_path) == ([b"x" * MARK_EVERY, b"yes"], 0)


def test_record_of_another_log_is_no_record(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
        path = write(directory, EFFECTS)
    data = (ours / path.name).read_bytes()
    marks = ends(ours / path.name)
    foreign = path.read_bytes()[marks[3] :]
    (ours / path.name).write_bytes(data[: marks[3]] + foreign)
    assert read(ours) == (EFFECTS[:3], len(foreign))


# -- segments --------------------------------------------------------------------------------------------


def two_segments(directory, sequence=0):
    """Write EFFECTS over two segments, three and two of them."""
    first = write(directory, EFFECTS[:3])
    create_segment(FAST, directory, shard=0, generation=1, number=2, sequence=sequence)
    write_manifest(FAST, directory, Manifest(0, 1, None, (1, 2)))
    return first, directory / segment_name(2)


def test_segments_continue(tmp_path):
    two_segments(tmp_path)
    assert read(tmp_path) == (EFFECTS[:3], 0)
    write(tmp_path, EFFECTS[3:])
    assert read(tmp_path, chunk=50) == (EFFECTS, 0)
    aof, _ = loaded(tmp_path)
    assert aof.sequence == 6
    assert aof.stats()["aof_bytes"] == aof.disk_bytes()
    aof.close()


def unmarked(path):
    """Take the mark at the end of a segment away, as if it had not been closed in peace."""
    data = path.read_bytes()
    stops = ends(path)
    path.write_bytes(data[: stops[-2]])
    return stops[:-1]


def test_a_tail_may_be_torn_over_two_segments(tmp_path):
    """Where nothing was synced since before the damage: all that comes after it goes, and is kept aside."""
    first, second = two_segments(tmp_path)
    write(tmp_path, EFFECTS[3:])
    stops, later = unmarked(first), unmarked(second)
    data, rest = first.read_bytes(), second.read_bytes()
    for damaged in (data[:-1], data[: stops[2]], data[:-1] + b"!", data[: stops[2]] + bytes(100)):
        first.write_bytes(damaged)
        second.write_bytes(rest)
        cut = damaged[stops[2] :].rstrip(FILL)
        if cut:
            assert read(tmp_path) == (EFFECTS[:2], len(cut) + len(rest) - START)
            assert (tmp_path / f"{first.name}.torn-{stops[2]}").read_bytes() == cut
            (tmp_path / f"{first.name}.torn-{stops[2]}").unlink()
        else:  # the hole is where the one segment should go over into the other
            assert read(tmp_path) == (EFFECTS[:2], len(rest) - START)
        assert (tmp_path / f"{second.name}.torn-{START}").read_bytes() == rest[START:]
        (tmp_path / f"{second.name}.torn-{START}").unlink()
        assert second.stat().st_size == START
        assert read(tmp_path) == (EFFECTS[:2], 0)
    assert later


def test_a_mark_in_a_later_segment_speaks_for_the_earlier_ones(tmp_path):
    first, second = two_segments(tmp_path)
    write(tmp_path, EFFECTS[3:])
    stops, size = unmarked(first), ends(second)[-2]
    first.write_bytes(first.read_bytes()[:-1])
    refused(tmp_path, stops[2], "cut short", f"all of it was safe, says {second} at byte {size}")


def test_a_torn_mark_between_two_segments_costs_nothing(tmp_path):
    """A power cut may take the mark of a segment just closed, and leave synced records of the next one."""
    first, second = two_segments(tmp_path)
    write(tmp_path, EFFECTS[3:])
    unmarked(second)
    whole, rest = first.read_bytes(), second.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"!", whole[: -HEADER.size] + bytes(HEADER.size)):
        first.write_bytes(damaged)
        cut = damaged[len(whole) - HEADER.size :].rstrip(FILL)
        assert read(tmp_path) == (EFFECTS, len(cut))
        assert first.read_bytes().rstrip(FILL) == whole[: -HEADER.size].rstrip(FILL)
        assert second.read_bytes() == rest
        assert read(tmp_path) == (EFFECTS, 0)


def test_sequence_must_continue(tmp_path):
    two_segments(tmp_path, sequence=5)
    refused(tmp_path, 0, "00000002.aof", "belongs elsewhere")


def test_missing_segments(tmp_path):
    first, second = two_segments(tmp_path)
    second.rename(tmp_path / segment_name(3))
    refused(tmp_path, None, str(second), "is missing")
    (tmp_path / segment_name(3)).rename(second)
    first.unlink()
    refused(tmp_path, None, str(first), "is missing")


@pytest.mark.parametrize("field", ["shard", "generation", "number"])
def test_foreign_segment(tmp_path, field):
    own = {"shard": 0, "generation": 1, "number": 1}
    empty(tmp_path / "log")
    create_segment(FAST, tmp_path / "log", **(own | {field: 2}))
    if field == "number":
        (tmp_path / "log" / segment_name(2)).rename(tmp_path / "log" / segment_name(1))
    refused(tmp_path / "log", 0, "expected (1, 0, 1, 1)")


def test_foreign_file_and_newer_format(tmp_path):
    path = write(tmp_path, EFFECTS)
    data = path.read_bytes()
    path.write_bytes(b"SET key value\n" * 10)
    refused(tmp_path, 0, "does not begin as a segment")
    path.write_bytes(data[:8] + (FORMAT + 1).to_bytes(4) + data[12:])
    refused(tmp_path, 8, f"format {FORMAT + 1}, this imds reads up to {FORMAT}")


def test_other_files_are_not_looked_at(tmp_path):
    write(tmp_path, EFFECTS)
    (tmp_path / "00000001.aof.torn-99").write_bytes(b"old")
    (tmp_path / "00000001.aof.bak").write_bytes(b"mine")
    (tmp_path / "notes").write_bytes(b"mine")
    assert read(tmp_path) == (EFFECTS, 0)


# -- a disk that does not take it ------------------------------------------------------------------------


class Full(Fast):
    """Takes ``left`` more bytes, in writes of at most ``most``, then none. The truncate may fail too."""

    def __init__(self, left=1 << 30, most=1 << 30):
        self.left = left
        self.most = most
        self.truncate_fails = False

    def write_at(self, fd, data, offset):
        length = self.size(fd)
        if not (fits := length + self.left - offset):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        took = super().write_at(fd, data[: min(self.most, fits)], offset)
        self.left -= self.size(fd) - length
        return took

    def truncate(self, fd, size):
        if self.truncate_fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(fd, size)


def test_short_writes(tmp_path):
    aof, _ = loaded(tmp_path, storage=Full(most=3))
    append(aof, EFFECTS[:3])
    append(aof, EFFECTS[3:])
    aof.close()
    assert read(tmp_path) == (EFFECTS, 0)


def test_write_that_takes_nothing_is_an_error(tmp_path):
    aof, _ = loaded(tmp_path, storage=Full(most=0))
    with pytest.raises(AofWriteError) as caught:
        append(aof, EFFECTS)
    assert caught.value.errno == errno.EIO
    aof.close()
    assert read(tmp_path) == ([], 0)


@pytest.mark.parametrize("room", [0, 40, ROOM])
def test_full_disk_at_every_byte(tmp_path, monkeypatch, room):
    monkeypatch.setattr(segment_module, "ROOM", room)
    storage = Full()
    aof, _ = loaded(tmp_path, storage=storage)
    append(aof, EFFECTS[:2])
    aof.take_back()  # the room
    records = encoded(aof, EFFECTS[2:])
    size = aof.disk_bytes()
    for left in range(len(records)):
        storage.left = left
        with pytest.raises(AofWriteError, match="No space left") as caught:
            aof.append(records)
        assert caught.value.errno == errno.ENOSPC
        assert aof.disk_bytes() == size
        assert aof.failed is None
        assert aof.stats()["aof_bytes"] == size
    storage.left = len(records)
    aof.append(records)
    assert not storage.left
    aof.close()
    assert read(tmp_path) == (EFFECTS, 0)


def test_probe_tells_whether_there_is_room(tmp_path):
    storage = Full()
    aof, _ = loaded(tmp_path, storage=storage)
    append(aof, EFFECTS[:2])
    aof.take_back()  # the room
    storage.left = 99
    assert not aof.probe(100)
    storage.left = 100
    assert aof.probe(100)
    storage.left = 1 << 20
    append(aof, EFFECTS[2:])
    aof.close()
    assert read(tmp_path) == (EFFECTS, 0)


def test_append_that_cannot_be_taken_back(tmp_path):
    storage = Full()
    aof, _ = loaded(tmp_path, "always", storage)
    append(aof, EFFECTS[:3])
    aof.sync()
    aof.take_back()  # the room
    storage.left, storage.truncate_fails = 30, True
    with pytest.raises(AofBroken):
        append(aof, EFFECTS[3:])
    storage.left, storage.truncate_fails = 1 << 20, False
    for _ in range(2):
        with pytest.raises(AofBroken):
            append(aof, EFFECTS[3:])
        with pytest.raises(AofBroken):
            aof.sync()
        with pytest.raises(AofBroken):
            aof.probe(10)
    assert isinstance(aof.failed, AofBroken)
    assert aof.stats()["aof_unsynced_bytes"] == 0  # what it had taken before is safe all the same
    with pytest.raises(AofBroken):
        aof.close()
    assert read(tmp_path) == (EFFECTS[:3], 30)


def test_file_size_limit_of_the_real_system(tmp_path):
    create_log(FAST, tmp_path, shard=0, generation=1)
    program = textwrap.dedent(
        """
        import errno, pathlib, resource, sys
        from imds.shard.aof import Aof, AofWriteError
        from imds.shard.record import RecordEncoder
        aof = Aof(pathlib.Path(sys.argv[1]), shard=0, generation=1)
        for _ in aof.load(lambda records: None): pass
        encoder = RecordEncoder(aof.seed, aof.sequence)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        taken = refused = 0
        for size in [900] * 10 + [5]:
            encoder.add(b"x" * size)
            try:
                aof.append(encoder.pending())
            except AofWriteError as error:
                assert error.errno == errno.EFBIG, error
                encoder.rollback()
                refused += 1
                assert aof.probe(5) and not aof.probe(900)
            else:
                encoder.commit()
                taken += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert aof.probe(900)
        encoder.add(b"y")
        aof.append(encoder.pending())
        aof.close()
        print(taken, refused)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "6 5\n"
    assert read(tmp_path) == ([b"x" * 900] * 5 + [b"x" * 5, b"y"], 0)


# -- what is appended by a grant -------------------------------------------------------------------------


def granted(directory, policy="everysec", storage=None):
    create_log(FAST, directory, shard=0, generation=1)
    aof, _ = loaded(directory, policy, storage or Storage())
    return aof


def test_what_is_written_by_a_grant_is_like_an_append(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.01)
    aof = granted(tmp_path)
    before = aof.stats()["aof_bytes"]
    for number, effect in enumerate(EFFECTS):
        grant = aof.grant()
        assert grant.length == aof.disk_bytes()
        records = encoded(aof, [effect])
        aof.sequence += 1
        if number % 2:
            assert os.pwrite(grant.fd, records[:7], grant.end) == 7  # the disk has taken a part
            aof.take_back()
            aof.append(records)
        else:
            assert os.pwrite(grant.fd, records, grant.end) == len(records)
            aof.count(len(records), max(grant.length, grant.end + len(records)))
        before += len(records)
        assert aof.stats()["aof_bytes"] == held(aof) == before
    while aof.stats()["aof_unsynced_bytes"]:  # the thread was told of it
        assert aof.failed is None
    aof.close()
    assert read(tmp_path) == (EFFECTS, 0)


def test_what_is_written_by_a_grant_under_always_is_synced(tmp_path):
    aof = granted(tmp_path, "always")
    synced = aof.stats()["aof_fsyncs"]
    for effect in EFFECTS:
        grant = aof.grant()
        records = encoded(aof, [effect])
        aof.sequence += 1
        os.pwrite(grant.fd, records, grant.end)
        grant.sync(grant.fd)
        aof.count(len(records), grant.end + len(records), synced=True)
        synced += 1
        assert (aof.stats()["aof_unsynced_bytes"], aof.stats()["aof_fsyncs"]) == (0, synced)
    append(aof, EFFECTS)
    assert aof.grant() is None  # it has not been synced yet
    aof.sync()
    assert aof.grant() is not None
    aof.prepare_switch()
    aof.switch()
    assert aof.grant() is None  # nor has the end of the segment before
    aof.settle()
    assert aof.grant()[4:] == (START, START)
    with pytest.raises(AofSyncFailed, match="sync failed: Input/output error"):
        aof.fail_sync(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert aof.grant() is None
    assert (tmp_path / SUSPECT).exists()
    with pytest.raises(AofSyncFailed):
        append(aof, EFFECTS)
    with pytest.raises(AofSyncFailed):
        aof.close()
    assert read(tmp_path) == (EFFECTS * 2, 0)


def test_a_grant_ends_with_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "CLOCK_EVERY", 1000)
    aof = granted(tmp_path)
    append(aof, EFFECTS)
    assert aof.grant()[:4] == (aof._fd, aof.clock, aof.clock + 1000, None)
    assert aof.grant()[4:] == (held(aof), aof.disk_bytes())
    aof.close()


def test_no_grant_where_an_append_has_more_to_do(tmp_path, monkeypatch):
    for policy in ("always", "everysec"):
        (tmp_path / policy).mkdir()
        aof = granted(tmp_path / policy, policy, FAST)
        assert aof.grant() is None
        aof.close()
    (tmp_path / "more").mkdir()
    aof = granted(tmp_path / "more", "no")
    assert aof.grant() is not None
    append(aof, EFFECTS)
    aof.flush()
    monkeypatch.setattr(aof_module, "MARK_EVERY", 1)
    assert aof.grant() is None  # a mark is due
    append(aof, EFFECTS)
    assert aof.grant() is not None
    aof.failed = AofSyncFailed("a sync failed")
    assert aof.grant() is None
    aof.failed = None
    aof.suspect = True
    assert aof.grant() is None
    aof.close()
    (tmp_path / "late").mkdir()
    aof = granted(tmp_path / "late")
    assert aof.grant() is not None
    aof._syncing_since = aof_module.monotonic() - aof_module.MAX_LAG + 0.05  # the disk is late
    assert aof.grant() is None
    aof._syncing_since = None
    aof.close()


def test_killed_while_appending(tmp_path):
    create_log(FAST, tmp_path, shard=0, generation=1)
    program = textwrap.dedent(
        """
        import pathlib, sys
        from imds.shard.aof import Aof
        from imds.shard.record import RecordEncoder
        aof = Aof(pathlib.Path(sys.argv[1]), shard=0, generation=1)
        for _ in aof.load(lambda records: None): pass
        encoder = RecordEncoder(aof.seed, aof.sequence)
        while True:
            encoder.add(b"%d" % encoder.sequence * 100)
            aof.append(encoder.pending())
            encoder.commit()
            print(encoder.sequence - 1, flush=True)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    with child:
        for _ in range(300):
            last = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest = [int(line) for line in child.stdout if line.endswith("\n")]
    acknowledged = (rest or [last])[-1]
    effects, _torn = read(tmp_path)
    assert len(effects) >= acknowledged
    assert effects == [b"%d" % number * 100 for number in range(1, len(effects) + 1)]


# -- syncing ---------------------------------------------------------------------------------------------


class Syncs(Fast):
    """Counts syncs of data, may hold them up, may fail them."""

    def __init__(self):
        self.count = 0
        self.fails = False
        self.started = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()

    def fdatasync(self, fd):
        self.count += 1
        self.started.release()
        assert self.go.wait(30)
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def syncing(directory, policy):
    storage = Syncs()
    aof, _ = loaded(directory, policy, storage)
    storage.started = threading.Semaphore(0)
    storage.count = 0
    return aof, storage


def test_always_syncs_once_for_each_batch(tmp_path):
    aof, storage = syncing(tmp_path, "always")
    aof.sync()
    assert storage.count == 0
    for batch in range(3):
        append(aof, EFFECTS[:2])
        append(aof, EFFECTS[2:])
        assert storage.count == batch
        assert aof.stats()["aof_unsynced_bytes"] > 0
        aof.sync()
        assert storage.count == batch + 1
        assert aof.stats()["aof_unsynced_bytes"] == 0
        assert aof.unsynced_seconds == 0
    assert storage.count == aof.stats()["aof_fsyncs"] == 3
    aof.close()
    assert storage.count == 4  # for the mark


def test_no_syncs_at_the_end_only(tmp_path):
    aof, storage = syncing(tmp_path, "no")
    append(aof, EFFECTS)
    aof.sync()
    assert storage.count == 0
    assert aof.unsynced_seconds > 0
    aof.flush()
    assert storage.count == 1
    append(aof, EFFECTS)
    aof.close()
    aof.close()
    assert storage.count == 3  # for the data, and for the mark that says so


def test_everysec_syncs_when_there_is_something(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.01)
    aof, storage = syncing(tmp_path, "everysec")
    assert not storage.started.acquire(timeout=0.1)  # idle: nothing to sync
    for _ in range(3):
        append(aof, EFFECTS)
        aof.sync()
        assert storage.started.acquire(timeout=30)
        while aof.stats()["aof_unsynced_bytes"]:
            assert not storage.started.acquire(timeout=0.01)
    assert storage.count == 3
    thread = aof._thread
    aof.close()
    assert storage.count == 4  # for the mark
    assert thread is not None
    assert not thread.is_alive()


def test_everysec_does_not_wait_for_a_sync_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.0)
    aof, storage = syncing(tmp_path, "everysec")
    storage.go.clear()
    append(aof, EFFECTS)
    assert storage.started.acquire(timeout=30)
    append(aof, EFFECTS)  # well under MAX_LAG
    assert aof.stats()["aof_unsynced_bytes"] == held(aof) - START
    storage.go.set()
    assert storage.started.acquire(timeout=30)  # the second append has not been forgotten
    aof.close()
    assert aof.stats()["aof_unsynced_bytes"] == 0
    # The second append is not covered by the sync that had begun; and there is the mark.
    assert storage.count == 3


def test_everysec_holds_appends_back_when_the_disk_is_late(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.0)
    monkeypatch.setattr(aof_module, "MAX_LAG", 0.0)
    aof, storage = syncing(tmp_path, "everysec")
    storage.go.clear()
    append(aof, EFFECTS)
    assert storage.started.acquire(timeout=30)
    size = held(aof)
    appending = threading.Thread(target=append, args=(aof, EFFECTS))
    appending.start()
    appending.join(0.2)
    assert appending.is_alive()
    assert held(aof) == size
    storage.go.set()
    appending.join(30)
    assert not appending.is_alive()
    assert held(aof) > size
    aof.close()
    assert read(tmp_path) == (EFFECTS * 2, 0)


def test_failed_sync_is_final(tmp_path):
    aof, storage = syncing(tmp_path, "always")
    append(aof, EFFECTS)
    storage.fails = True
    with pytest.raises(AofSyncFailed, match="Input/output error"):
        aof.sync()
    storage.fails = False
    assert isinstance(aof.failed, AofSyncFailed)
    for again in (aof.sync, aof.flush, lambda: append(aof, EFFECTS), lambda: aof.probe(1), aof.close):
        with pytest.raises(AofSyncFailed):
            again()
    assert storage.count == 1  # it is never tried again
    assert aof.stats()["aof_unsynced_bytes"] > 0
    aof.close()


def test_failed_sync_in_the_background_is_final(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.0)
    aof, storage = syncing(tmp_path, "everysec")
    storage.fails = True
    append(aof, EFFECTS)
    aof._thread.join(30)
    assert aof.failed is not None
    assert "sync failed" in caplog.text
    storage.fails = False
    for again in (aof.sync, lambda: append(aof, EFFECTS), aof.close):
        with pytest.raises(AofSyncFailed):
            again()
    assert storage.count == 1


def test_append_that_waits_for_a_sync_hears_of_its_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.0)
    monkeypatch.setattr(aof_module, "MAX_LAG", 0.0)
    aof, storage = syncing(tmp_path, "everysec")
    storage.go.clear()
    storage.fails = True
    append(aof, EFFECTS)
    assert storage.started.acquire(timeout=30)
    heard = []

    def appending():
        try:
            append(aof, EFFECTS)
        except AofSyncFailed:
            heard.append(True)

    thread = threading.Thread(target=appending)
    thread.start()
    thread.join(0.05)
    storage.go.set()
    thread.join(30)
    assert heard == [True]
    with pytest.raises(AofSyncFailed):
        aof.close()


def test_failed_sync_at_the_end_is_told(tmp_path):
    aof, storage = syncing(tmp_path, "no")
    append(aof, EFFECTS)
    storage.fails = True
    with pytest.raises(AofSyncFailed):
        aof.close()
    aof.close()


def test_what_was_loaded_is_synced_before_it_is_served(tmp_path):
    write(tmp_path, EFFECTS)
    for policy, count in (("always", 1), ("everysec", 1), ("no", 0)):
        storage = Syncs()
        aof, _ = loaded(tmp_path, policy, storage)
        aof.close()
        assert storage.count == count
