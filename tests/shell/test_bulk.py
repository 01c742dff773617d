"""--pipe: windows of lines, what is said of failures, and how a load goes on after a break."""

import io
import json
import signal
import subprocess
import sys
import threading

import pytest
import xxhash
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st

import imds
from imds.protocol import ERROR, MAX_REQUEST, split_request
from imds.shell.bulk import Input
from imds.shell.line import split_line

LINE = st.sampled_from(
    [b"set a 1\n", b"get 'b c'\n", b"\n", b"  \r\n", b"get 'open\n", b"\xff\xfe\n", b"exit\n"]
)


@given(st.lists(LINE, max_size=12), st.integers(1, 4), st.booleans(), st.integers(0, 12))
def test_windows_hold_each_line_once(lines, size, stop, skipped):
    text = b"".join(lines)
    source = Input(io.BytesIO(text), size, stop)
    skipped = min(skipped, len(lines))
    source.skip(skipped + 1)
    requests, bad, ended = [], [], False
    for window in source.windows():
        assert not ended
        assert len(window.places) <= size
        pos = 0
        for place in window.places:
            tokens, pos = split_request(window.frames, pos)
            requests.append((place, tokens))
        assert pos == len(window.frames)
        bad += [place for place, _ in window.failed]
        number, digest = window.end
        assert digest == xxhash.xxh64(b"".join(lines[: number - 1])).intdigest()
        assert window.read == sum(map(len, lines[: number - 1]))
    expected_requests, expected_bad = [], []
    for number, line in enumerate(lines[skipped:], skipped + 1):
        place = number, xxhash.xxh64(b"".join(lines[: number - 1])).intdigest()
        if line == b"exit\n":
            break
        try:
            if tokens := split_line(line):
                expected_requests.append((place, tokens))
        except ValueError:
            expected_bad.append(place)
            if stop:
                break
    assert (requests, bad) == (expected_requests, expected_bad)


def lines_of(count, start=0):
    return b"".join(b"set key:%d value:%d\n" % (n, n) for n in range(start, start + count))


class TestLoad:
    def test_all_lines(self, run, real):
        code, out, err = run("--pipe", "--window", "100", stdin=lines_of(2500) + b"set odd \xff\r\n\n")
        assert (code, err) == (0, b"")
        assert out.startswith(b"2,501 commands, 0 failed lines, ")
        assert (real.get("key:2499"), real.get("odd")) == (b"value:2499", b"\xff")

    def test_json(self, run, real):
        code, out, _ = run("--pipe", "--json", stdin=lines_of(10))
        found = json.loads(out)
        assert (code, found.pop("seconds") < 60) == (0, True)
        assert found == {"commands": 10, "failed": 0, "next_line": 11}

    def test_leaving(self, run, real):
        code, _, err = run("--pipe", stdin=b"set a 1\nquit\nset b 2\n")
        assert (code, err, real.get("a"), real.get("b")) == (0, b"", b"1", None)

    def test_replies_are_counted_and_not_shown(self, run, real):
        assert run("--pipe", stdin=b"get none\nset a 1\nget a\nstats\n")[1].startswith(b"4 commands, 0 ")

    FAILING = b"set a 1\nset b\nget 'open\n\xff\nset c 3\nzadd a 1 m\nset d 4\n"

    def test_failing_lines_are_named(self, run, real):
        code, out, err = run("--pipe", "--on-error", "continue", stdin=self.FAILING)
        assert (code, out[:28]) == (1, b"6 commands, 4 failed lines, ")
        assert err.decode().splitlines() == [
            "imds-cli: line 2: ERR wrong number of arguments",
            "imds-cli: line 3: no closing '",
            "imds-cli: line 4: ERR unknown command",
            "imds-cli: line 6: WRONGTYPE Operation against a key holding the wrong kind of value",
        ]
        assert [real.get(key) for key in "abcd"] == [b"1", None, b"3", b"4"]

    def test_it_stops_at_the_first_failure(self, run, real):
        code, _, err = run("--pipe", "--window", "1", stdin=self.FAILING)
        assert code == 1
        assert err.decode().splitlines() == [
            "imds-cli: line 2: ERR wrong number of arguments",
            "imds-cli: stopped; the lines before 2 are done, --resume-from 2 goes on there",
        ]
        assert [real.get(key) for key in "abcd"] == [b"1", None, None, None]
        code, _, err = run("--pipe", "--resume-from", "3", stdin=self.FAILING)
        assert err.decode().splitlines()[-1].startswith("imds-cli: stopped; the lines before 3 are done")
        code, _, err = run("--pipe", "--resume-from", "7", stdin=self.FAILING)
        assert (code, err, [real.get(key) for key in "abcd"]) == (0, b"", [b"1", None, None, b"4"])

    def test_a_line_over_the_limit(self, run, real):
        long = b"set long " + b"x" * MAX_REQUEST + b"\n"
        code, out, err = run("--pipe", "--on-error", "continue", stdin=b"set a 1\n" + long + b"set b 2\n")
        assert (code, out[:28]) == (1, b"2 commands, 1 failed lines, ")
        assert err.startswith(b"imds-cli: line 2: a request of ")
        assert real.get("b") == b"2"

    def test_nobody_there(self, run, real, free_port):
        code, _, err = run("--pipe", stdin=lines_of(3), options=("-p", free_port))
        assert code == 3
        assert err.endswith(b"refused; the lines before 1 are done, --resume-from 1 goes on there\n")

    @pytest.mark.parametrize("number", ["7", "9"])
    def test_fewer_lines_than_are_to_be_skipped(self, run, real, number):
        code, _, err = run("--pipe", "--resume-from", number, stdin=lines_of(6))
        if number == "7":  # there is nothing left to do
            assert (code, err) == (0, b"")
        else:
            assert (code, err) == (64, b"imds-cli: the input has no line 9; its last is 6\n")


class TestState:
    def test_a_stopped_load_goes_on(self, run, real, tmp_path):
        state = tmp_path / "state"
        options = ("--pipe", "--window", "10", "--state", str(state))
        good, bad = lines_of(100), lines_of(55) + b"set\n" + lines_of(44, 56)
        code, _, err = run(*options, stdin=bad)
        assert (code, json.loads(state.read_bytes())["line"]) == (1, 56)
        assert b"--resume-from 56" in err
        assert state.stat().st_mode & 0o777 == 0o600
        real.execute("flushall")
        code, out, err = run(*options, stdin=good)  # it differs behind line 55 alone
        assert (code, err, out[:12]) == (0, b"", b"45 commands,")
        assert real.get("key:54") is None
        assert real.get("key:55") == b"value:55"
        assert not state.exists()

    def test_of_another_input(self, run, real, tmp_path):
        state = tmp_path / "state"
        run("--pipe", "--state", str(state), stdin=lines_of(5) + b"set\n")
        code, _, err = run("--pipe", "--state", str(state), stdin=lines_of(6, 1))
        assert (code, err) == (
            64,
            b"imds-cli: the input's lines before 6 are not those that %s is about\n" % bytes(state),
        )
        code, _, err = run("--pipe", "--state", str(state), stdin=lines_of(2))
        assert (code, err) == (64, b"imds-cli: the input has no line 6; its last is 2\n")

    @pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"line": "x", "digest": "0"}', b"\xff"])
    def test_what_is_no_state_file(self, run, real, tmp_path, content):
        state = tmp_path / "state"
        state.write_bytes(content)
        code, _, err = run("--pipe", "--state", str(state), stdin=lines_of(2))
        assert (code, err) == (64, b"imds-cli: %s is no state file\n" % bytes(state))
        assert real.execute("dbsize").payload == b"0"

    def test_a_place_where_it_cannot_be_written(self, run, real, tmp_path):
        state = tmp_path / "none" / "state"
        code, _, err = run("--pipe", "--state", str(state), stdin=b"set\n")
        assert code == 64
        assert b"No such file or directory" in err


class TestBreaks:
    """Whatever breaks the load, all lines before the one that is named are done."""

    @pytest.mark.parametrize("interrupted", [False, True])
    def test_in_the_middle_of_a_window(self, run, tmp_path, interrupted):
        state = tmp_path / "state"
        done = []

        def serve(peer):
            while tokens := peer.read():
                if len(done) == 25 and peer.number == 0:
                    if not interrupted:
                        return
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                done.append(tokens[1])
                peer.reply(b"OK")

        options = ("--pipe", "--window", "10", "--state", str(state))
        with FakeServer(serve) as fake:
            where = ("-p", str(fake.port))
            code, _, err = run(*options, stdin=lines_of(100), options=where)
            line = json.loads(state.read_bytes())["line"]
            assert err.decode().splitlines()[-1].endswith(f"--resume-from {line} goes on there")
            if interrupted:
                assert (code, err[:22]) == (130, b"imds-cli: interrupted;")
                assert line == len(done) + 1 == 31  # the window under way was waited for
            else:
                assert (code, line, len(done)) == (3, 21, 25)
            assert done[: line - 1] == [b"key:%d" % n for n in range(line - 1)]
            del done[line - 1 :]
            assert run(*options, stdin=lines_of(100), options=where)[0] == 0
            assert done == [b"key:%d" % n for n in range(100)]

    def test_errors_that_pass(self, run, real):
        """A shard that is down for a moment stops the load where it would lose a line."""

        def serve(peer):
            for number in range(10):
                peer.read()
                down = number == 4
                peer.reply(b"RETRY shard 0 has died" if down else b"OK", ERROR if down else 0)
            peer.read()

        with FakeServer(serve) as fake:
            code, _, err = run("--pipe", stdin=lines_of(10), options=("-p", str(fake.port)))
        assert (code, err.splitlines()[0]) == (1, b"imds-cli: line 5: RETRY shard 0 has died")
        assert b"--resume-from 5 " in err

    def test_the_server_dies_and_is_started_again(self, tmp_path):
        command = [sys.executable, "-m", "imds.cli", "--pipe", "--window", "50"]
        command += ["--state", str(tmp_path / "state")]

        def load(server):
            pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
            return subprocess.Popen([*command, "-p", str(server.port)], **pipes, stdout=subprocess.DEVNULL)

        with (
            imds.serve(shards=2, directory=tmp_path / "data") as server,
            server.client() as client,
            load(server) as process,
        ):
            process.stdin.write(lines_of(500))
            process.stdin.flush()
            while client.get("key:449") is None:
                pass
            server.kill()
            process.stdin.write(lines_of(500, 500))
            process.stdin.close()
            err = process.stderr.read()
            # the connection is lost; or a shard went first, and the router still said which line that was
            assert process.wait(30) == (1 if b"imds-cli: line " in err else 3), err
            assert b"--resume-from" in err
        with imds.serve(shards=2, directory=tmp_path / "data") as server, server.client() as client:
            with load(server) as process:
                _, err = process.communicate(lines_of(1000), 60)
                assert (process.returncode, err) == (0, b"")
            assert client.execute("dbsize").payload == b"1000"
            assert client.get("key:999") == b"value:999"
