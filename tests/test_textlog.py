"""imds-aof import: what the older text log meant is what the data directory holds afterwards."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reshard import Model, contents

from imds import textlog
from imds.aof_tool import DONE, FAILED, PARTLY, main
from imds.datadir import DataDir
from imds.shard.aof import Aof, AofWriteError
from imds.textlog import BadLine, parse_line


def run(tmp_path, text, *arguments):
    """Import ``text`` into tmp_path/data; return the exit code."""
    source = tmp_path / "old.aof"
    source.write_bytes(text)
    return main(["import", str(source), "--dir", str(tmp_path / "data"), *arguments])


# -- lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        (b"SET k v", [b"set", b"k", b"v"]),
        (b"set k v", [b"set", b"k", b"v"]),
        (b"SeT k two  words ", [b"set", b"k", b"two  words "]),
        (b"SET k ", [b"set", b"k", b""]),
        (b"SET k  v", [b"set", b"k", b" v"]),
        (b"SET \xff\0\xfe \x80\r\x81", [b"set", b"\xff\0\xfe", b"\x80\r\x81"]),
        (b"DEL k", [b"del", b"k"]),
        (b"ZADD z 1 m", [b"zadd", b"z", b"1.0", b"m"]),
        (b"zadd z -2.5e3 a member", [b"zadd", b"z", b"-2500.0", b"a member"]),
        (b"ZADD z +inf m", [b"zadd", b"z", b"inf", b"m"]),
        (b"ZADD z 0.1 m", [b"zadd", b"z", b"0.1", b"m"]),
        (b"ZREM z m", [b"zrem", b"z", b"m"]),
        (b"ZREM z a member", [b"zrem", b"z", b"a member"]),
    ],
)
def test_lines(line, tokens):
    assert parse_line(line) == tokens


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"GET k", "unknown command 'get'"),
        (b" SET k v", "unknown command ''"),
        (b"\xff\xfe", r"unknown command '\xff\xfe'"),
        (b"SETk v", "unknown command 'setk'"),
        (b"SET", "too few fields, the rule is SET key value"),
        (b"SET k", "too few fields"),
        (b"SET ", "too few fields"),
        (b"DEL", "too few fields, the rule is DEL key"),
        (b"DEL a b", "too many fields, the rule is DEL key"),
        (b"ZADD z 1", "too few fields, the rule is ZADD key score member"),
        (b"ZREM z", "too few fields, the rule is ZREM key member"),
        (b"ZADD z one m", "score 'one' is not a number"),
        (b"ZADD z nan m", "score 'nan' is not a number"),
        (b"ZADD z -NaN m", "not a number"),
        (b"ZADD z 1_0 m", "not a number"),
        (b"ZADD z  m", "not a number"),
        (b"ZADD z \t1 m", "not a number"),
        (b"ZADD z 1\x0b m", "not a number"),
        (b"ZADD z 0x10 m", "not a number"),
    ],
)
def test_bad_lines(line, reason):
    with pytest.raises(BadLine) as caught:
        parse_line(line)
    assert reason in str(caught.value)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(b"ZADD ".__add__))
def test_any_line_is_tokens_or_bad(line):
    try:
        tokens = parse_line(line)
    except BadLine as error:
        said = str(error)
    else:
        said = ""
        assert tokens[0] in (b"set", b"del", b"zadd", b"zrem")
        assert b" " not in tokens[1]
    assert said.isprintable()


# -- files -----------------------------------------------------------------------------------------------


def test_import(tmp_path, capsys):
    text = (
        b"SET plain value\r\n"
        b"SET with some spaces in it\n"
        b"\n"
        b"  \r\n"
        b"set bytes \xff\x00\xfe\n"
        b"SET gone x\n"
        b"DEL gone\n"
        b"ZADD board 2 second best\n"
        b"ZADD board 1.5 first\n"
        b"ZADD board 9 nobody\n"
        b"ZREM board nobody\n"
        b"DEL never\n"
        b"SET last line has no end"
    )
    assert run(tmp_path, text, "--shards", "3") == DONE
    data, shards, records = contents(tmp_path / "data")
    assert data == {
        b"plain": b"value",
        b"with": b"some spaces in it",
        b"bytes": b"\xff\x00\xfe",
        b"board": {b"second best": 2.0, b"first": 1.5},
        b"last": b"line has no end",
    }
    assert (shards, records) == (3, 11)
    out = capsys.readouterr()
    assert out.out == (
        f"11 commands imported from {tmp_path / 'old.aof'} to {tmp_path / 'data'} (3 shards), "
        "0 lines skipped\n"
    )
    assert out.err == ""


def test_bad_lines_are_named_and_skipped(tmp_path, capsys):
    text = b"SET a 1\nGET a\n\nSET b\nZADD z x m\nSET c 3\n"
    assert run(tmp_path, text, "--shards", "2") == PARTLY
    assert contents(tmp_path / "data")[0] == {b"a": b"1", b"c": b"3"}
    out = capsys.readouterr()
    source = tmp_path / "old.aof"
    assert out.err.splitlines() == [
        f"{source}:2: skipped: unknown command 'get'",
        f"{source}:4: skipped: too few fields, the rule is SET key value",
        f"{source}:5: skipped: score 'x' is not a number",
    ]
    assert "2 commands imported" in out.out
    assert "3 lines skipped" in out.out


def test_sorted_set_commands_on_a_string_are_bad(tmp_path, capsys):
    """The server would not have taken them, and a log with them would not replay."""
    text = b"SET k v\nZADD k 1 m\nZREM k m\nDEL k\nZADD k 2 m\nSET k w\n"
    assert run(tmp_path, text, "--shards", "1") == PARTLY
    assert contents(tmp_path / "data")[::2] == ({b"k": b"w"}, 4)
    assert capsys.readouterr().err.count("holds a string at this place") == 2
    # Also when the string was there before.
    assert run(tmp_path, b"ZADD k 1 m\nZADD z 1 m\n") == PARTLY
    assert contents(tmp_path / "data")[0] == {b"k": b"w", b"z": {b"m": 1.0}}


def test_into_an_existing_directory(tmp_path, capsys):
    assert run(tmp_path, b"SET a 1\nSET b 1\nZADD z 1 m\n", "--shards", "3") == DONE
    assert run(tmp_path, b"SET a 2\nDEL b\nZADD z 3 n\n") == DONE
    assert run(tmp_path, b"SET c 3\n", "--shards", "3") == DONE
    assert contents(tmp_path / "data") == ({b"a": b"2", b"z": {b"m": 1.0, b"n": 3.0}, b"c": b"3"}, 3, 7)
    capsys.readouterr()
    assert run(tmp_path, b"SET a 9\n", "--shards", "4") == FAILED
    out = capsys.readouterr()
    assert "has 3 shards" in out.err
    assert out.out == ""
    assert contents(tmp_path / "data")[0][b"a"] == b"2"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.just(b"SET"), st.sampled_from([b"a", b"b"]), st.binary(max_size=9))
        | st.tuples(st.just(b"DEL"), st.sampled_from([b"a", b"b", b"z"]))
        | st.tuples(
            st.just(b"ZADD"), st.just(b"z"), st.sampled_from([b"1", b"-2.5", b"inf"]), st.binary(max_size=9)
        )
        | st.tuples(st.just(b"ZREM"), st.just(b"z"), st.binary(max_size=2)),
        max_size=20,
    ).map(lambda rows: [row for row in rows if not row[-1].endswith(b"\r") and b"\n" not in row[-1]])
)
def test_against_a_model(tmp_path_factory, rows):
    tmp_path = tmp_path_factory.mktemp("import")
    model = Model()
    for name, *rest in rows:
        model.apply([name.lower(), *rest])
    assert run(tmp_path, b"".join(b" ".join(row) + b"\n" for row in rows), "--shards", "2") == DONE
    assert contents(tmp_path / "data") == (model.data, 2, len(rows))


def test_lines_over_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(textlog, "MAX_REQUEST", 100)
    text = (
        b"SET a "
        + b"x" * 35
        + b"\nSET b "
        + b"x" * 36
        + b"\nSET c "
        + b"x" * 500
        + b"\nSET d 4\nSET e "
        + b"y" * 300
    )
    assert run(tmp_path, text, "--shards", "1") == PARTLY
    assert contents(tmp_path / "data")[0] == {b"a": b"x" * 35, b"d": b"4"}
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(": ")[0].split(":")[1] for error in errors] == ["2", "3", "5"]
    assert all("too long" in error for error in errors)


@pytest.mark.parametrize("size", range(95, 110))
def test_lines_about_as_long_as_what_is_read_at_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(textlog, "MAX_REQUEST", 100)
    assert (
        run(tmp_path, b"#" * size + b"\r\nSET d 4\n" + b" " * size + b"\nSET e 5", "--shards", "1") == PARTLY
    )
    assert contents(tmp_path / "data")[0] == {b"d": b"4", b"e": b"5"}


# -- what goes wrong -------------------------------------------------------------------------------------


def test_source_that_is_not_there_makes_no_directory(tmp_path, capsys):
    assert main(["import", str(tmp_path / "none"), "--dir", str(tmp_path / "data")]) == FAILED
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_directory_in_use(tmp_path, capsys):
    with DataDir.open(tmp_path / "data", 1):
        assert run(tmp_path, b"SET a 1\n") == FAILED
    assert "in use by another imds server" in capsys.readouterr().err


def test_foreign_directory(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("x")
    assert run(tmp_path, b"SET a 1\n") == FAILED
    assert "mine" in capsys.readouterr().err


def test_damaged_log_is_left_alone(tmp_path, capsys):
    run(tmp_path, b"SET a 1\nSET a 2\n", "--shards", "1")
    segment = tmp_path / "data" / "gen-000001" / "shard-000" / "00000001.aof"
    data = bytearray(segment.read_bytes())
    data[90] ^= 1
    segment.write_bytes(data)
    assert run(tmp_path, b"SET b 1\n") == FAILED
    assert f"{segment} is damaged at byte 84" in capsys.readouterr().err
    assert segment.read_bytes() == data


def test_full_disk(tmp_path, monkeypatch, capsys):
    def full(self, records):
        raise AofWriteError(self.directory, errno.ENOSPC)

    monkeypatch.setattr(Aof, "append", full)
    assert run(tmp_path, b"SET a 1\n", "--shards", "1") == FAILED
    out = capsys.readouterr()
    assert os.strerror(errno.ENOSPC) in out.err
    assert out.out == ""


def test_synced_before_it_says_done(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "imds.storage.Storage.fdatasync",
        lambda self, fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()),
    )
    monkeypatch.setattr("builtins.print", lambda *args, **named: synced.append("said"))
    text = b"".join(b"SET key%d v\n" % number for number in range(50))
    assert run(tmp_path, text, "--shards", "2") == DONE
    assert synced.pop() == "said"
    assert {path.parent.name for path in synced} == {"shard-000", "shard-001"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["import"],
        ["export", "x"],
        ["import", "x", "--shards", "0"],
        ["import", "x", "--shards", "129"],
        ["import", "x", "--shards", "two"],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: imds-aof" in capsys.readouterr().err


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["import", "--help"])
    assert caught.value.code == 0
    assert "0 all imported" in capsys.readouterr().out


def test_as_a_command(tmp_path):
    (tmp_path / "old").write_bytes(b"SET a 1\nnonsense\n")
    command = [sys.executable, "-m", "imds.aof_tool", "import", "old", "--dir", "data", "--shards", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == PARTLY
    assert done.stdout == "1 commands imported from old to data (2 shards), 1 lines skipped\n"
    assert "old:2: skipped: unknown command 'nonsense'" in done.stderr
    assert contents(tmp_path / "data") == ({b"a": b"1"}, 2, 1)
