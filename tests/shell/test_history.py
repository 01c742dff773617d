"""The history: what is kept, for whom, and what never is."""

import stat

import pytest

from imds.shell.history import LINES, History, default_path, secret


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "imds" / "history"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_lines_come_back(path):
    history = History(path)
    for line in ("get a", "get a", "set ü \udcff", "  ", ""):
        history.add(line)
    assert path.read_bytes() == "get a\nset ü ".encode() + b"\xff\n"
    assert History(path).lines == ["get a", "set ü \udcff"]


def test_a_file_of_its_owner_alone(path):
    History(path).add("get a")
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    path.chmod(0o644)
    History(path).add("get b")
    assert mode(path) == 0o600
    assert History(path).lines == ["get a", "get b"]


@pytest.mark.parametrize(
    "line",
    [
        "auth hunter2",
        "AUTH bob hunter2",
        '"auth" hunter2',
        "'au'th hunter2",
        'auth "hunter2',
        "auth 'hunter2",
        "hello 1 auth bob hunter2",
        "hello 1 AuTh bob 'hunter2",
        "config set requirepass hunter2",
        "config set tls-key-file-pass hunter2",
        "acl setuser bob >hunter2",
        " set token hunter2",
        "\tset token hunter2",
    ],
)
def test_a_secret_is_nowhere(path, line):
    history = History(path)
    history.add("get a")
    assert secret(line)
    assert not history.add(line)
    assert history.lines == ["get a"]
    assert b"hunter2" not in path.read_bytes()


def test_what_may_be_a_mistyped_secret_is_not_in_the_file(path):
    history = History(path)
    assert history.add("ahtu hunter2")
    assert history.lines == ["ahtu hunter2"]
    assert not path.exists()


@pytest.mark.parametrize(
    "line", ["help auth", "set a b", "hello 1", "config get maxmemory", "exit", "get 'a"]
)
def test_what_is_no_secret(path, line):
    assert History(path).add(line)
    assert History(path).lines == [line]


def test_a_long_file_is_cut(path):
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"get {n}\n" for n in range(2 * LINES + 1)))
    path.chmod(0o644)
    history = History(path)
    assert len(history.lines) == LINES
    assert history.lines[-1] == f"get {2 * LINES}"
    assert path.read_text().splitlines() == history.lines
    assert mode(path) == 0o600


def test_several_shells_share_the_file(path):
    one, other = History(path), History(path)
    one.add("get a")
    other.add("get b")
    one.add("get c")
    assert History(path).lines == ["get a", "get b", "get c"]


def test_without_a_file(path):
    path.parent.mkdir(parents=True)
    path.mkdir()  # a directory is in its place
    for history in (History(path), History(None)):
        assert history.add("get a")
        assert history.lines == ["get a"]


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("IMDS_HISTORY", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "state" / "imds" / "history"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert str(default_path()) == "/state/imds/history"
    monkeypatch.setenv("IMDS_HISTORY", "/elsewhere")
    assert str(default_path()) == "/elsewhere"
    monkeypatch.setenv("IMDS_HISTORY", "")
    assert default_path() is None
