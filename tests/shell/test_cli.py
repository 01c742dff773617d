"""imds-cli: tokens, output, exit codes, and a conversation at a terminal."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from fake_server import FakeServer, honest
from hypothesis import given
from hypothesis import strategies as st
from interrupts import heeded

import imds
from imds.cli import help_text, main, quote, render, split_line
from imds.client import Response
from imds.commands import COMMANDS
from imds.protocol import ERROR, LIST, MAX_REQUEST, MISSING, OK, encode_list
from imds.shell.line import quoted


@pytest.fixture
def server():
    with FakeServer(honest()) as server:
        yield server


class TestSplitLine:
    @pytest.mark.parametrize(
        ("line", "tokens"),
        [
            (b"", []),
            (b"  \t\n", []),
            (b"get foo", [b"get", b"foo"]),
            (b"  set  foo\tbar \r\n", [b"set", b"foo", b"bar"]),
            (b"set foo 'two words'", [b"set", b"foo", b"two words"]),
            (b'set foo "two words"', [b"set", b"foo", b"two words"]),
            (b"set foo ''", [b"set", b"foo", b""]),
            (b'set "" x', [b"set", b"", b"x"]),
            (b"a'b c'\"d e\"f", [b"ab cd ef"]),
            (rb"'a\n\x00'", [rb"a\n\x00"]),
            (rb'"a\n\r\t\0\x00\xff\\\"\q"', [b'a\n\r\t\0\x00\xff\\"q']),
            (rb'"\x5cn"', [b"\\n"]),
            (rb"two\ words \'x \\", [b"two words", b"'x", b"\\"]),
            ("grüße 'ü ü'".encode(), ["grüße".encode(), "ü ü".encode()]),
            (b"\xff\xfe", [b"\xff\xfe"]),
            (b'it"\'"s', [b"it's"]),
            (b'"line\nbreak"', [b"line\nbreak"]),
        ],
    )
    def test_tokens(self, line, tokens):
        assert split_line(line) == tokens

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"set foo 'bar", "no closing '"),
            (b'set foo "bar', 'no closing "'),
            (b'set foo "bar\\"', 'no closing "'),
            (b"it's", "no closing '"),
            (b"foo\\", "nothing follows"),
            (rb'"\x4"', "two hexadecimal"),
            (rb'"\xgg"', "two hexadecimal"),
        ],
    )
    def test_what_is_wrong(self, line, message):
        with pytest.raises(ValueError, match=message):
            split_line(line)

    @given(st.lists(st.binary(max_size=12) | st.text(max_size=8).map(str.encode), max_size=5))
    def test_quoted_tokens_can_be_typed_again(self, tokens):
        typed = [quoted(token.decode(errors="surrogateescape")) for token in tokens]
        assert split_line(" ".join(typed).encode()) == tokens
        shown = [quote(token) for token in tokens]
        assert all(text.isprintable() for text in shown)
        for token, text in zip(tokens, shown, strict=True):
            assert text.encode() == token or split_line(text.encode()) == [token]

    @given(st.binary(max_size=30))
    def test_any_line(self, line):
        try:
            tokens = split_line(line)
        except ValueError:
            return
        assert sum(map(len, tokens)) <= len(line)


class TestRender:
    @pytest.mark.parametrize(
        ("payload", "shown"),
        [
            (b"OK", "OK"),
            (b"two words", "two words"),
            ("grüße 🙂".encode(), "grüße 🙂"),
            (b"", '""'),
            (b"C:\\dir", "C:\\dir"),
            (b"a\nb", r'"a\nb"'),
            (b"\0\xff", r'"\x00\xff"'),
            (b"\x1b[31m", r'"\x1b[31m"'),
            (b'say "a\\b"\t', r'"say \"a\\b\"\t"'),
            (b" x", '" x"'),
            (b"(nil)", '"(nil)"'),
            (b'"x"', r'"\"x\""'),
            ("\u200b".encode(), r'"\xe2\x80\x8b"'),
        ],
    )
    def test_payload(self, payload, shown):
        assert render(Response(OK, payload)) == shown

    def test_others(self):
        assert render(Response(MISSING, b"")) == "(nil)"
        assert render(Response(ERROR, b"ERR unknown command")) == "(error) ERR unknown command"
        assert render(Response(ERROR, b"ERR \x1b[2J")) == r'(error) "ERR \x1b[2J"'
        assert render(Response(9, b"x")) == "(status 9) x"
        assert render(Response(LIST, encode_list([]))) == "(empty list)"
        assert render(Response(LIST, encode_list([b"a", None, b"\0"]))) == '1) a\n2) (nil)\n3) "\\x00"'
        lines = render(Response(LIST, encode_list([b"x"] * 10))).split("\n")
        assert (lines[0], lines[-1]) == (" 1) x", "10) x")

    def test_help_names_every_command(self):
        text = help_text([b"HELP"])
        for name, row in COMMANDS.items():
            assert row.usage in text
            assert row.summary in help_text([b"help", name.upper().encode()])
        assert "no command is called nonsense" in help_text([b"help", b"nonsense"])
        assert help_text([b"helpme"]) is None


class TestOneCommand:
    def test_exit_codes(self, run):
        assert run("set", "foo", "two words") == (0, b"OK\n", b"")
        assert run("get", "foo") == (0, b"two words\n", b"")
        assert run("get", "none") == (1, b"", b"")
        code, out, err = run("zadd", "foo", "-1", "m")
        assert (code, out) == (2, b"")
        assert err.startswith(b"(error) WRONGTYPE Operation against")
        assert run("zadd", "z", "-1", "-H") == (0, b"OK\n", b"")
        assert run("zrange", "z", "-inf", "0") == (0, b"-1.0:-H\n", b"")

    def test_bytes_are_written_as_they_are(self, run):
        word = os.fsdecode(b"\xff\x01\n")
        run("set", "k", word)
        assert run("get", "k") == (0, b"\xff\x01\n\n", b"")
        assert run("-n", "get", "k") == (0, b"\xff\x01\n", b"")

    def test_list(self, run):
        code, out, _ = run("stats")
        assert code == 0
        assert out.startswith(b'{"shard": 0')

    def test_terminal_gets_readable_output(self, run, monkeypatch):
        run("set", "k", "a\nb")
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
        assert run("get", "k") == (0, b'"a\\nb"\n', b"")
        assert run("get", "none") == (1, b"(nil)\n", b"")

    def test_nobody_there(self, run, free_port):
        code, out, err = run("get", "foo", options=("-p", free_port))
        assert (code, out) == (3, b"")
        assert re.fullmatch(
            rb"imds-cli: cannot connect to 127.0.0.1:%s: .*refused\n" % free_port.encode(), err
        )

    def test_no_answer(self, capsys):
        with FakeServer(lambda peer: peer.sock.recv(100) and peer.sock.recv(100)) as server:
            assert main(["-p", str(server.port), "--timeout", "0.2", "get", "a"]) == 3
        assert capsys.readouterr().err == "imds-cli: no reply in 0.2 s\n"

    def test_request_over_the_limit(self, run):
        code, _, err = run("set", "k", "x" * MAX_REQUEST)
        assert code == 64
        assert b"the limit is" in err

    def test_help_needs_no_server(self, run, free_port):
        code, out, _ = run("help", "zrank", options=("-p", free_port))
        assert (code, out.split(b"\n")[0]) == (0, b"zrank key member")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["-p", "x"], b"--port 'x': must be a whole number from 1 to 65535"),
            (["-p", "0"], b"--port '0'"),
            (["-p", "65536"], b"--port '65536'"),
            (["-p", "-1"], b"--port '-1'"),
            (["--timeout", "x"], b"--timeout: invalid number of seconds value: 'x'"),
            (["--timeout", "-1"], b"--timeout: invalid number of seconds"),
            (["--timeout", "nan"], b"--timeout: invalid number of seconds"),
            (["--por", "1"], b"unrecognized arguments|arguments"),
        ],
    )
    def test_bad_value(self, run, options, message):
        code, out, err = run(options=options)
        assert (code, out) == (64, b"")
        assert re.search(message, err)

    def test_bad_environment(self, run, monkeypatch):
        monkeypatch.setenv("IMDS_PORT", "many")
        code, _, err = run("get", "a", options=())
        assert code == 64
        assert b"IMDS_PORT 'many'" in err

    def test_environment_is_the_default(self, run, server, monkeypatch, tmp_path, free_port):
        monkeypatch.setenv("IMDS_PORT", str(server.port))
        monkeypatch.setenv("IMDS_HOST", "localhost")
        assert run("set", "a", "tcp", options=())[0] == 0
        path = str(tmp_path / "s")
        with FakeServer(honest(), unix=path):
            monkeypatch.setenv("IMDS_UNIX", path)
            assert run("get", "a", options=())[0] == 1
            assert run("get", "a", options=("-p", str(server.port)))[1] == b"tcp\n"
            monkeypatch.delenv("IMDS_UNIX")
            assert run("get", "a", options=("--unix", path))[0] == 1
        assert run("get", "a", options=("-p", free_port))[0] == 3

    def test_url(self, run, server, tmp_path, monkeypatch):
        monkeypatch.setenv("IMDS_PORT", "many")  # which is not looked at
        url = f"imds://127.0.0.1:{server.port}"
        assert run("set", "a", "tcp", options=("--url", url))[0] == 0
        assert run("get", "a", options=("-u", f"{url}?encoding=utf-8&timeout=2"))[1] == b"tcp\n"
        path = str(tmp_path / "s")
        with FakeServer(honest(), unix=path):
            assert run("get", "a", options=("--url", f"imds+unix://{path}"))[0] == 1
        for options, message in (
            (("--url", "http://localhost"), b"is not imds://"),
            (("--url", url, "--port", "1"), b"--url says where"),
            (("--url", "imds://localhost:many"), b"many"),
        ):
            code, out, err = run("get", "a", options=options)
            assert (code, out) == (64, b"")
            assert message in err

    def test_version_and_help(self, run):
        assert run("--version") == (0, f"imds-cli {imds.__version__}\n".encode(), b"")
        code, out, _ = run("--help")
        assert code == 0
        for word in (b"exit codes", b"IMDS_PORT", b"--unix", b"--timeout"):
            assert word in out


class TestPipe:
    def test_lines(self, run):
        lines = b"set foo 'a b'\n\nget foo\nget none\nnonsense\nhelp zrem\nzadd z 1 m"
        code, out, err = run(stdin=lines)
        assert out.splitlines()[:4] == [b"OK", b"a b", b"(nil)", b"(error) ERR unknown command"]
        assert out.splitlines()[-1] == b"OK"
        assert (code, err) == (2, b"")
        assert run(stdin=b"get none\nexit\nnonsense\n") == (0, b"(nil)\n", b"")

    def test_line_that_cannot_be_read(self, run):
        code, out, err = run(stdin=b"get 'a\nset a 1\n")
        assert (code, out, err) == (64, b"OK\n", b"imds-cli: line 1: no closing '\n")

    def test_connection_lost(self, capsys, monkeypatch):
        def one_reply(peer):
            peer.read()
            peer.reply(b"1")
            peer.read()

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"get a\nget b\nget c\n")))
        with FakeServer(one_reply) as server:
            assert main(["-p", str(server.port)]) == 3
        out, err = capsys.readouterr()
        assert out == "1\n"
        assert err == "imds-cli: the server closed the connection\n"

    def test_reader_that_has_seen_enough(self, server):
        """No traceback when the output's reader goes away."""
        command = [sys.executable, "-m", "imds.cli", "-p", str(server.port)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        with subprocess.Popen(command, **pipes, text=True, env=buffered) as process:
            process.stdin.write("set a 1\n")
            process.stdin.flush()
            assert process.stdout.readline() == "OK\n"
            process.stdout.close()
            process.stdin.write("get a\n")
            process.stdin.close()
            assert process.stderr.read() == ""
            assert process.wait() == 0


class Terminal:
    """imds-cli at a pseudo-terminal."""

    def __init__(self, port, term="dumb", options=(), **environment):
        self.fd, self.inner = pty.openpty()
        # The leader of a new session that opens a terminal by name is controlled by it, as Ctrl-C needs.
        shell = ["/bin/sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.inner)]
        command = [*shell, sys.executable, "-m", "imds.cli", "-p", str(port), *options]
        # no position of the cursor is asked for, which this terminal would not answer
        plain = {"TERM": term, "PYTHONUTF8": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment = {**os.environ, **plain, **environment}
        with heeded():
            self.process = subprocess.Popen(command, env=environment, start_new_session=True)

    def type(self, text):
        os.write(self.fd, text.encode())

    def until(self, ending):
        """Return what appears up to ``ending``."""
        seen, deadline = b"", time.monotonic() + 20
        while not seen.endswith(ending.encode()):
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], seen
            seen += os.read(self.fd, 1)
        return seen.decode().replace("\r\n", "\n")

    def shows(self, text):
        """Wait until ``text`` has appeared, whatever moved the cursor in between; blanks do not count."""
        seen, deadline = b"", time.monotonic() + 20
        while "".join(text.split()) not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]|\s", b"", seen).decode():
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], seen
            seen += os.read(self.fd, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self.inner)


class TestTerminal:
    def test_conversation(self):
        with FakeServer(honest()) as server, Terminal(server.port) as terminal:
            assert f"connected to 127.0.0.1:{server.port}" in terminal.until("imds> ")

            def ask(line):
                terminal.type(line + "\n")
                return terminal.until("imds> ").removeprefix(line + "\n").removesuffix("\nimds> ")

            assert ask('set foo "two words\\n"') == "OK"
            assert ask("get foo") == '"two words\\n"'
            assert ask("set ü 'é'") == "OK"
            assert ask("get ü") == "é"
            assert ask("get none") == "(nil)"
            assert ask("nonsense") == "(error) ERR unknown command"
            assert ask("get 'foo") == "(error) no closing '"
            assert ask("help get").startswith("get key\n")
            assert "zrange key start_score end_score" in ask("help")

            terminal.type("get fo\x03")  # Ctrl-C clears the line and leaves the shell alone
            terminal.until("\nimds> ")
            assert ask("get none") == "(nil)"

            server.close()
            assert re.fullmatch(r"\(error\) cannot connect to .*refused; the next command .*", ask("get foo"))
            with FakeServer(honest(), port=server.port):
                assert ask("set foo 1") == "(connected again)\nOK"
                assert ask("get foo") == "1"
                terminal.type("exit\n")
                assert terminal.process.wait(20) == 0

    def test_end_of_input_leaves(self, server):
        with Terminal(server.port) as terminal:
            terminal.until("imds> ")
            terminal.type("\x04")
            assert terminal.process.wait(20) == 0

    def test_interrupt_of_a_command(self):
        """Ctrl-C while the server is silent gives the prompt back, and a late reply goes nowhere."""

        def silent_at_first(peer):
            if peer.number == 0:
                peer.sock.recv(100)
                peer.sock.recv(100)
            else:
                honest()(peer)

        with FakeServer(silent_at_first) as server, Terminal(server.port) as terminal:
            terminal.until("imds> ")
            terminal.type("get a\n")
            terminal.until("get a\r\n")
            time.sleep(0.3)
            terminal.type("\x03")
            assert "interrupted" in terminal.until("imds> ")
            terminal.type("get a\n")
            assert "(nil)" in terminal.until("imds> ")

    def test_starts_without_a_server(self, free_port):
        with Terminal(free_port) as terminal:
            assert "(error) cannot connect" in terminal.until("imds> ")


class TestEditedLines:
    """A terminal with prompt_toolkit, and what of it is there on one without."""

    def test_completion_hints_and_history(self, tmp_path):
        history = tmp_path / "state" / "history"
        with FakeServer(honest()) as server:
            with Terminal(server.port, term="xterm") as terminal:
                terminal.shows("exit leaves imds>")
                terminal.type("zadd")
                terminal.shows("[score member ...]")
                terminal.type(" z 1 m\r")
                terminal.shows("OK imds>")
                terminal.type("zran\t")
                terminal.shows("zrandmember")  # the menu
                terminal.type("k\t")
                terminal.shows("key member")
                terminal.type("z m\r")
                terminal.shows("0 imds>")
                terminal.type("auth hunter2\r")
                terminal.shows("(error) ERR unknown command imds>")
                terminal.type("\x1b[A\r")  # the line before it
                terminal.shows("0 imds>")
                terminal.type("\x04")
                assert terminal.process.wait(20) == 0
            assert history.read_text() == "zadd z 1 m\nzrank z m\n"
            assert history.stat().st_mode & 0o777 == 0o600
            with Terminal(server.port) as terminal:  # plain input has the same history
                terminal.until("imds> ")
                terminal.type("\x1b[A\n")
                assert "\n0\n" in terminal.until("imds> ")

    def test_bytes_that_are_no_text(self):
        with FakeServer(honest()) as server, Terminal(server.port, term="xterm") as terminal:
            terminal.shows("imds>")
            os.write(terminal.fd, b"set k \xff\xfe\r")
            terminal.shows("OK imds>")
            terminal.type("get k\r")
            terminal.shows(r'"\xff\xfe" imds>')

    def test_colours(self):
        with FakeServer(honest()) as server:
            with Terminal(server.port, term="xterm") as terminal:
                terminal.shows("imds>")
                terminal.type("get k\r")
                terminal.until("\x1b[90m(nil)\x1b[0m")
            with Terminal(server.port, term="xterm", NO_COLOR="1") as terminal:
                terminal.shows("imds>")
                terminal.type("get k\r")
                assert "\x1b[3" not in terminal.until("(nil)\r\n")
