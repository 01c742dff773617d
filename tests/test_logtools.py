"""imds-aof check, repair, stat, dump and digest: on whole logs, torn ones, and damage of every kind."""

import json
import random
import shutil
from itertools import islice
from pathlib import Path

import pytest
from failing_storage import Crash, FailingStorage, FastStorage
from rewriting import rewrite
from test_reshard import Model, contents, fill, random_effects

from imds import aof_tool, logtools, rebuild
from imds.aof_tool import DONE, FAILED, PARTLY, main
from imds.datadir import DataDir
from imds.protocol import encode_request, split_request
from imds.shard.aof import SUSPECT, Aof
from imds.shard.examine import LogReport, examine
from imds.shard.manifest import MANIFEST
from imds.shard.record import HEADER, RecordEncoder, each_effect
from imds.shard.segment import FILL, ROOM, SEGMENT_HEADER

FAST = FastStorage()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(logtools, "Storage", FastStorage)
    monkeypatch.setattr(rebuild, "Storage", FastStorage)


@pytest.fixture
def made(tmp_path):
    """A directory of two shards with some data; return its path."""
    effects, _ = random_effects(1, 400)
    fill(tmp_path / "data", 2, effects)
    return tmp_path / "data"


def log(path, shard=0):
    return path / "gen-000001" / f"shard-{shard:03d}"


def segment(path, shard=0):
    return log(path, shard) / "00000001.aof"


def everything(path):
    """Return all that is in a directory: names and bytes."""
    return {
        one.relative_to(path): one.read_bytes() if one.is_file() else None
        for one in sorted(path.rglob("*"))
        if one.name != "LOCK"
    }


def rewritten(path, shard=0):
    """Give a shard's log a base and two segments, the second of them with a few records."""
    aof = Aof(log(path, shard), shard=shard, generation=1, policy="no", storage=FAST)
    for _ in aof.load(lambda records: None):
        pass
    sequence = aof.sequence
    rewrite(aof)
    encoder = RecordEncoder(aof.seed, sequence)
    for key in late_keys(path, shard):
        encoder.add(encode_request([b"set", key, b"x"]))
    aof.append(encoder.pending())
    aof.close()


def late_keys(path, shard=0):
    with DataDir.open(path) as datadir:
        mine = (b"late%d" % n for n in range(99) if datadir.slots.shard_of(b"late%d" % n) == shard)
        return list(islice(mine, 3))


def flip(path, at, size=1):
    data = bytearray(path.read_bytes())
    for place in range(at, at + size):
        data[place] ^= 0x55
    path.write_bytes(data)


def places(path):
    """Return (offset, end, number) of each record of a segment."""
    header = SEGMENT_HEADER.size
    data = path.read_bytes()
    found, at = [], header
    while at + HEADER.size <= len(data):
        _, length, number = HEADER.unpack_from(data, at)
        end = at + HEADER.size + (length if length < 0xFFFF_FFFE else 0)
        if length < 0xFFFF_FFFE:
            found.append((at, end, number))
        at = end
    return found


# -- check ---------------------------------------------------------------------------------------------


def test_whole(made, capsys):
    before = everything(made)
    assert main(["check", "--dir", str(made)]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(" keys, " in line for line in lines)
    assert main(["check", "--dir", str(made), "--shard", "1"]) == DONE
    assert capsys.readouterr().out == lines[1] + "\n"
    assert everything(made) == before


def test_what_is_no_data_directory(tmp_path, made, capsys):
    for verb in ("check", "repair", "stat", "dump"):
        assert main([verb, "--dir", str(tmp_path)]) == FAILED
        assert "is no data directory" in capsys.readouterr().err
        assert main([verb, "--dir", str(made), "--shard", "2"]) == FAILED
        assert "has 2 shards" in capsys.readouterr().err
    assert main(["digest", str(tmp_path / "none")]) == FAILED
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data"]


def test_a_directory_in_use_is_left_alone(made, capsys):
    with DataDir.open(made):
        assert main(["check", "--dir", str(made)]) == FAILED
    assert "in use" in capsys.readouterr().err


def test_a_torn_tail_is_told_and_left(made, capsys):
    path = segment(made)
    path.write_bytes(path.read_bytes()[:-30])
    before = everything(made)
    assert main(["check", "--dir", str(made)]) == PARTLY
    assert "torn tail of" in capsys.readouterr().out
    assert main(["repair", "--dir", str(made)]) == DONE
    assert "left to the next start" in capsys.readouterr().out
    assert everything(made) == before


def test_room_is_nothing_to_tell(made, tmp_path, capsys):
    """A server that was killed leaves it: whole logs, and behind a base it is damage."""
    assert main(["check", "--dir", str(made)]) == DONE
    said = capsys.readouterr().out
    with segment(made).open("ab") as file:
        file.write(FILL * ROOM)
    before = everything(made)
    assert main(["check", "--dir", str(made)]) == DONE
    assert capsys.readouterr().out == said
    assert main(["digest", str(made)]) == DONE
    assert main(["stat", "--dir", str(made)]) == DONE
    assert "damage" not in capsys.readouterr().out
    assert everything(made) == before
    with segment(made).open("ab") as file:
        file.write(FILL * (ROOM + 7))
    assert main(["check", "--dir", str(made)]) == PARTLY
    assert "torn tail of 7 bytes" in capsys.readouterr().out
    damage = [piece for piece in examine(FAST, LogReport(log(made)), 0, 1) if piece.kind == "damage"]
    assert [piece.end - piece.start for piece in damage] == [2 * ROOM + 7]
    segment(made).write_bytes(before[segment(made).relative_to(made)])
    rewritten(made)
    with (log(made) / "00000001.base").open("ab") as file:
        file.write(FILL)
    assert main(["check", "--dir", str(made), "--shard", "0"]) == FAILED
    assert "00000001.base" in capsys.readouterr().out


def test_damage_before_room_is_damage(made, capsys):
    _start, end, _number = places(segment(made))[-1]
    flip(segment(made), end - 1)
    with segment(made).open("ab") as file:
        file.write(FILL * ROOM)
    assert main(["check", "--dir", str(made)]) == FAILED
    assert f"{segment(made)}" in capsys.readouterr().out


def test_a_failed_sync_is_told(made, capsys):
    (log(made) / SUSPECT).touch()
    assert main(["check", "--dir", str(made)]) == PARTLY
    assert "a sync has failed" in capsys.readouterr().out


def test_damage_is_told_with_its_place_and_what_is_around(made, capsys):
    at, end, _ = places(segment(made))[10]
    flip(segment(made), at + HEADER.size + 5)
    before = everything(made)
    assert main(["check", "--dir", str(made)]) == FAILED
    out = capsys.readouterr().out
    assert f"{segment(made)} is damaged at byte {at}" in out
    assert f"bytes {at} to {end} ({end - at}) cannot be read" in out
    assert "at least 1 are lost" in out
    assert everything(made) == before


def test_what_needed_the_lost_is_counted(made, capsys):
    key = late_keys(made, 0)[0]
    aof = Aof(log(made), shard=0, generation=1, policy="no", storage=FAST)
    for _ in aof.load(lambda records: None):
        pass
    encoder = RecordEncoder(aof.seed, aof.sequence)
    for effect in (
        [b"set", b"lost", b"x"],
        [b"setrange", b"lost", b"1", b"y"],
        [b"pexpireat", b"lost", b"5"],
    ):
        encoder.add(encode_request(effect))
    encoder.add(encode_request([b"set", key, b"kept"]))
    aof.append(encoder.pending())
    aof.close()
    at, _, _ = places(segment(made))[-4]
    flip(segment(made), at)
    assert main(["check", "--dir", str(made)]) == FAILED
    assert "at least 1 are lost, 2 do not follow without these" in capsys.readouterr().out


# -- repair --------------------------------------------------------------------------------------------


def model_of(effects):
    model = Model()
    for tokens in effects:
        model.apply(tokens)
    return model.data


def effects_of(path):
    data = path.read_bytes()
    return [(number, split_request(data[at + HEADER.size : end])[0]) for at, end, number in places(path)]


def test_a_dry_run_changes_nothing(made, capsys):
    flip(segment(made), places(segment(made))[10][0] + 30)
    before = everything(made)
    assert main(["repair", "--dir", str(made), "--dry-run"]) == FAILED
    assert "would keep" in capsys.readouterr().out
    assert everything(made) == before


def test_repair_with_prefix_is_the_state_before_the_damage(made, capsys):
    effects = effects_of(segment(made))
    other, _, _ = contents(copy_of(made))
    flip(segment(made), places(segment(made))[10][0] + 30)
    damaged = everything(made)
    assert main(["repair", "--dir", str(made), "--prefix"]) == DONE
    data, shards, _ = contents(made)
    kept = model_of([tokens for _, tokens in effects[:10]])
    mine = {tokens[1] for _, tokens in effects}
    assert {key: data[key] for key in data if key in mine} == kept
    assert {key: data[key] for key in data if key not in mine} == {
        k: other[k] for k in other if k not in mine
    }
    assert shards == 2
    copied = made / "repaired" / "gen-000001-shard-000.1"
    assert {one.name: one.read_bytes() for one in copied.iterdir()} == {
        path.name: data for path, data in damaged.items() if path.parent.name == "shard-000"
    }
    assert main(["check", "--dir", str(made)]) == DONE


def copy_of(path):
    target = path.parent / "copy"
    shutil.copytree(path, target)
    return target


def test_repair_steps_over_damage(made):
    """Only the damaged record is gone; a second repair has nothing to do."""
    effects = effects_of(segment(made))
    whole, _, _ = contents(copy_of(made))
    number, tokens = effects[-1]
    key = tokens[1]
    before = model_of([tokens for _, tokens in effects[:-1]]).get(key)
    at, _, _ = places(segment(made))[-1]
    flip(segment(made), at + HEADER.size + 3)
    assert main(["repair", "--dir", str(made)]) == DONE
    data, _, _ = contents(made)
    assert data == {**{k: v for k, v in whole.items() if k != key}, **({key: before} if before else {})}
    after = everything(made)
    assert main(["repair", "--dir", str(made)]) == DONE
    assert everything(made) == after
    with DataDir.open(made) as datadir:
        aof = Aof(datadir.shard_dir(0), shard=0, generation=1, policy="no")
        for _ in aof.load(lambda records: None):
            pass
        aof.close()
    assert aof.sequence >= number


@pytest.mark.parametrize("what", ["missing", "garbage", "stale"])
def test_a_manifest_can_be_made_anew(made, what):
    stale = (log(made) / MANIFEST).read_bytes()
    rewritten(made)
    whole, _, _ = contents(copy_of(made))
    manifest = log(made) / MANIFEST
    if what == "missing":
        manifest.unlink()
    elif what == "garbage":
        manifest.write_bytes(b"{}")
    else:
        manifest.write_bytes(stale)
    assert main(["check", "--dir", str(made)]) == FAILED
    assert main(["repair", "--dir", str(made)]) == DONE
    assert contents(made)[0] == whole


def test_headers_bases_and_whole_files(made, capsys):
    rewritten(made)
    whole, _, _ = contents(copy_of(made))
    base = log(made) / "00000001.base"
    for number, harm in enumerate(("header", "base", "missing base", "short header")):
        path = made.parent / f"harm{number}"
        shutil.copytree(made, path)
        harmed = path / base.relative_to(made)
        if harm == "header":
            flip(harmed, 9)
        elif harm == "base":
            flip(harmed, harmed.stat().st_size // 2)
        elif harm == "missing base":
            harmed.unlink()
        else:
            harmed.write_bytes(harmed.read_bytes()[:40])
        assert main(["check", "--dir", str(path)]) == FAILED
        assert main(["repair", "--dir", str(path), "--prefix"]) == FAILED
        assert "no earlier state" in capsys.readouterr().err
        assert main(["repair", "--dir", str(path)]) == DONE, harm
        data, _, _ = contents(path)
        assert all(data[key] == b"x" for key in late_keys(path))
        if harm == "header":
            assert data == whole
        else:
            assert set(data) <= set(whole)


def test_random_damage_is_always_repaired(tmp_path):
    """Whatever was done to a log: repaired it loads, and every value was once written, under its key."""
    effects, _ = random_effects(3, 300)
    fill(tmp_path / "data", 1, effects)
    source = segment(tmp_path / "data")
    values = {(tokens[1], tokens[-1]) for tokens in effects if tokens[0] == b"set"}
    rng = random.Random(5)
    for number in range(25):
        path = tmp_path / f"data{number}"
        shutil.copytree(tmp_path / "data", path)
        data = bytearray(source.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            at, size = rng.randrange(len(data)), rng.choice((1, 8, 300, 4000))
            fill_with = rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size), b""))
            data[at : at + size] = fill_with
        segment(path).write_bytes(data)
        assert main(["repair", "--dir", str(path)]) == DONE
        assert main(["check", "--dir", str(path)]) in (DONE, PARTLY)
        found, _, _ = contents(path)
        assert {(k, v) for k, v in found.items() if isinstance(v, bytes)} <= values


def test_killed_in_a_repair_the_log_is_the_old_or_the_new(made, monkeypatch):
    flip(segment(made), places(segment(made))[10][0] + 30)
    for at in range(1, 60):
        path = made.parent / f"at{at}"
        shutil.copytree(made, path)

        class Dying(FastStorage):
            left = at

            def __getattribute__(self, name):
                plain = super().__getattribute__(name)
                if name in ("open", "write", "unlink", "rename", "mkdir", "fsync"):
                    Dying.left -= 1
                    if not Dying.left:
                        raise KeyboardInterrupt
                return plain

        monkeypatch.setattr(logtools, "Storage", Dying)
        try:
            main(["repair", "--dir", str(path)])
        except KeyboardInterrupt:
            ended = False
        else:
            ended = True
        monkeypatch.setattr(logtools, "Storage", FastStorage)
        assert main(["repair", "--dir", str(path)]) == DONE
        assert main(["check", "--dir", str(path)]) == DONE
        if ended:
            break
        shutil.rmtree(path)
    else:
        pytest.fail("a repair takes more operations than were tried")
    assert at > 15


# -- the directory's own manifest ------------------------------------------------------------------------


def lose(path, what):
    """Damage the manifest of a directory; return what is left of it."""
    manifest = path / MANIFEST
    text = manifest.read_bytes()
    if what == "missing":
        manifest.unlink()
        return None
    if what == "garbage":
        text = b"\xff" * len(text)
    elif what == "seed":
        at = text.index(b'"seed": ') + 8
        text = text[:at] + (b"1" if text[at : at + 1] != b"1" else b"2") + text[at + 1 :]
    else:
        text = text.replace(b'"generation": 1', b'"generation": 7')
    manifest.write_bytes(text)
    return text


@pytest.mark.parametrize(
    ("what", "seed_is_kept"), [("missing", False), ("garbage", False), ("seed", False), ("number", True)]
)
def test_the_manifest_of_the_directory_is_made_anew(made, what, seed_is_kept, capsys):
    whole, shards, _ = contents(copy_of(made))
    with DataDir.open(made) as datadir:
        seed = datadir.slots.seed
    logs = {path: data for path, data in everything(made).items() if path.parts[0] == "gen-000001"}
    left = lose(made, what)
    assert main(["check", "--dir", str(made)]) == FAILED
    before = everything(made)
    assert main(["repair", "--dir", str(made), "--dry-run"]) == FAILED
    assert everything(made) == before
    assert main(["repair", "--dir", str(made)]) == DONE
    after = everything(made)
    copied = {path.name: data for path, data in after.items() if path.parts[0] == "repaired"}
    assert left in (None, copied.get("manifest.json.1"))
    if seed_is_kept:
        assert {path: after[path] for path in logs} == logs
    else:
        for path, data in logs.items():
            if data is not None:
                assert after[Path("repaired", f"gen-000001-{path.parts[1]}.1", path.name)] == data
    with DataDir.open(made) as datadir:
        assert (datadir.slots.seed == seed) is seed_is_kept
    assert contents(made)[:2] == (whole, shards)
    assert main(["check", "--dir", str(made)]) == DONE


def test_a_manifest_of_a_newer_version_is_not_damaged(made, capsys):
    manifest = made / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"format": 1', b'"format": 2'))
    before = everything(made)
    assert main(["repair", "--dir", str(made)]) == FAILED
    assert "reads formats up to 1" in capsys.readouterr().err
    assert everything(made) == before


def test_of_several_generations_only_a_person_can_say_which_counts(made, capsys):
    whole, _, _ = contents(copy_of(made))
    with DataDir.open(made) as datadir:
        datadir.make_generation(2, 3)
    lose(made, "missing")
    before = everything(made)
    assert main(["repair", "--dir", str(made)]) == FAILED
    told = capsys.readouterr()
    assert "name one with --generation" in told.err
    assert "generation 2, shard 2: 0 keys" in told.out
    assert everything(made) == before
    assert main(["repair", "--dir", str(made), "--generation", "3"]) == FAILED
    assert main(["repair", "--dir", str(made), "--generation", "1"]) == DONE
    assert contents(made)[0] == whole


def test_with_a_shard_missing_no_manifest_is_made(made, capsys):
    lose(made, "missing")
    shutil.rmtree(log(made, 0))
    assert main(["repair", "--dir", str(made)]) == FAILED
    assert "a shard is missing" in capsys.readouterr().err


def test_damaged_logs_and_no_manifest(made, capsys):
    """What can be read of the logs is kept, and what cannot is said."""
    whole, _, _ = contents(copy_of(made))
    lose(made, "garbage")
    at, _, _ = places(segment(made))[-1]
    flip(segment(made), at + HEADER.size + 3)
    assert main(["repair", "--dir", str(made)]) == DONE
    assert "cannot be read" in capsys.readouterr().out
    found, _, _ = contents(made)
    assert sum(found.get(key) != value for key, value in whole.items()) <= 1


def test_killed_while_a_manifest_is_made_anew(made, monkeypatch):
    """Every time the data is all there, or can be had by the old generation's number."""
    whole, _, _ = contents(copy_of(made))
    lose(made, "missing")
    for at in range(1, 300, 7):
        path = made.parent / f"at{at}"
        shutil.copytree(made, path)
        storage = FailingStorage(at)
        monkeypatch.setattr(rebuild, "Storage", lambda storage=storage: storage)
        try:
            ended = main(["repair", "--dir", str(path)]) == DONE
        except Crash:
            ended = False
        storage.release()
        monkeypatch.setattr(rebuild, "Storage", FastStorage)
        assert main(["repair", "--dir", str(path), "--generation", "1"]) == DONE
        assert contents(path)[0] == whole
        if ended:
            break
        shutil.rmtree(path)
    else:
        pytest.fail("it takes more operations than were tried")
    assert at > 15


# -- examining -----------------------------------------------------------------------------------------


def test_every_record_around_any_flipped_byte_is_found(tmp_path):
    effects, _ = random_effects(4, 12)
    fill(tmp_path / "data", 1, effects)
    path = segment(tmp_path / "data")
    whole, all_records = path.read_bytes(), places(path)
    for at in range(SEGMENT_HEADER.size, len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        report = LogReport(log(tmp_path / "data"))
        found = [
            number for piece in examine(FAST, report, 0, 1) for number, _, _ in each_effect(piece.records)
        ]
        hit = [number for start, end, number in all_records if start <= at < end]
        assert found == [number for _, _, number in all_records if number not in hit]
        (one,) = report.files
        assert len(one.damage) == 1
        assert one.damage[0].start <= at < one.damage[0].end


# -- stat, dump, digest --------------------------------------------------------------------------------


def test_stat(made, capsys):
    rewritten(made)
    assert main(["stat", "--dir", str(made), "--json"]) == DONE
    rows = json.loads(capsys.readouterr().out)
    assert [row["shard"] for row in rows] == [0, 1]
    base, last = rows[0]["files"]
    assert (base["name"], last["name"]) == ("00000001.base", "00000002.aof")
    assert last["records"] == 3
    assert sum(rows[1]["effects"].values()) == rows[1]["records"] == rows[1]["next_number"] - 1
    assert main(["stat", "--dir", str(made)]) == DONE
    assert "00000001.base" in capsys.readouterr().out
    flip(segment(made, 1), 300)
    assert main(["stat", "--dir", str(made), "--shard", "1"]) == FAILED
    assert "DAMAGED" in capsys.readouterr().out


def test_dump_is_every_effect_in_order(made, capsys):
    effects = effects_of(segment(made))
    assert main(["dump", "--dir", str(made), "--shard", "0"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    records = [line.split(" ", 5) for line in lines if line.split(" ")[3] != "#"]
    assert [int(fields[3]) for fields in records] == [number for number, _ in effects]
    assert [fields[4].encode() for fields in records] == [tokens[0] for _, tokens in effects]
    assert [int(fields[2]) for fields in records] == [at for at, _, _ in places(segment(made))]
    assert any("# 20" in line for line in lines), "no time"
    assert main(["dump", "--dir", str(made), "--shard", "0", "--first", "5", "--last", "7"]) == DONE
    lines = [line for line in capsys.readouterr().out.splitlines() if " # " not in line]
    assert [int(line.split(" ")[3]) for line in lines] == [5, 6, 7]
    flip(segment(made), 300)
    assert main(["dump", "--dir", str(made)]) == FAILED
    assert " bytes: " in capsys.readouterr().out


def test_digests_are_of_the_data_and_not_of_its_places(made, tmp_path, capsys):
    effects, _ = random_effects(1, 400)
    fill(tmp_path / "other", 3, effects)
    assert main(["digest", str(made), str(tmp_path / "other")]) == DONE
    assert "the same data" in capsys.readouterr().out
    fill(tmp_path / "other", 3, [[b"set", b"one", b"more"]])
    assert main(["digest", str(made), str(tmp_path / "other")]) == PARTLY
    assert "DIFFERENT" in capsys.readouterr().out
    flip(segment(made), 300)
    assert main(["digest", str(made)]) == FAILED
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "repair", "stat", "dump", "digest"])
def test_help_names_the_exit_codes(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert "Exit code: 0 " in capsys.readouterr().out


def test_a_number_out_of_range_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        aof_tool.main(["check", "--shard", "-1"])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
