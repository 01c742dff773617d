"""imds.serve: a private server, and what becomes of it with its parent."""

import contextlib
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import imds


def wait_until(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def processes_of(directory):
    """Return every process whose command line or open files tell that it serves ``directory``."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(directory) in (process.info["cmdline"] or []):
            found.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.children()
    return found


@pytest.fixture(scope="module")
def server():
    with imds.serve(shards=2, unix=True) as server:
        yield server


class TestServing:
    def test_commands(self, server):
        with server.client() as client, server.client(encoding="utf-8") as text:
            client.set("a", "é")
            assert client.get("a") == "é".encode()
            assert text.get("a") == "é"
            assert len(client.stats()) == 2
        assert server.running
        assert f"ready on 127.0.0.1:{server.port} and unix:{server.unix}, 2 shards" in server.log()
        assert server.url == f"imds+unix://{server.unix}"
        assert server.url in repr(server)

    def test_its_port_serves_too(self, server):
        with imds.Client(port=server.port) as client:
            assert client.set("b", 1)

    def test_nothing_is_left_after_the_block(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        with imds.serve(unix=True) as server:
            directory = server.directory
            assert directory.is_relative_to(tmp_path)
            found = processes_of(directory)
            assert len(found) >= 3  # supervisor, router, shard
        assert not any(process.is_running() for process in found)
        assert not list(tmp_path.iterdir())
        assert not server.running
        server.stop()  # the second time does nothing

    def test_a_given_directory_keeps_the_data(self, tmp_path):
        for value in (None, b"kept"):
            with imds.serve(directory=tmp_path / "d") as server, server.client() as client:
                assert client.get("a") == value
                client.set("a", "kept")
                assert server.url == f"imds://127.0.0.1:{server.port}"

    def test_options_and_no_environment(self, monkeypatch):
        monkeypatch.setenv("IMDS_CAPACITY", "1")
        monkeypatch.setenv("IMDS_SHARDS", "7")
        with imds.serve(max_clients=1) as server, server.client() as one, server.client() as two:
            assert one.set("a", 1)
            assert one.set("b", 1)
            assert len(one.stats()) == 1
            with pytest.raises(imds.ImdsError):
                two.get("a")

    def test_dropped_it_ends(self):
        server = imds.serve()
        supervisor = psutil.Process(server.pid)
        del server
        gc.collect()
        assert not supervisor.is_running()


class TestFailures:
    def test_start_shows_the_log(self):
        with pytest.raises(imds.ServeError, match=r"(?s)exit code 2 while starting:\n.*--shards: '0' is not"):
            imds.serve(shards=0)
        with pytest.raises(imds.ServeError, match="unrecognized arguments: --colour red"):
            imds.serve(colour="red")

    def test_directory_in_use(self, server, tmp_path):
        with pytest.raises(imds.ServeError, match="exit code 1 while starting"):
            imds.serve(directory=server.directory)
        assert server.running

    def test_no_time(self):
        with pytest.raises(imds.ServeError, match="not ready in 0 s"):
            imds.serve(timeout=0)

    def test_a_server_that_ends_otherwise_says_so_at_its_end(self):
        server = imds.serve()
        assert psutil.Process(server.pid).is_running()
        psutil.Process(server.pid).kill()
        wait_until(lambda: not server.running, "the server ends")
        with pytest.raises(imds.ServeError, match="exit code -9"):
            server.stop()
        directory = server.directory
        assert not directory.exists()

    def test_another_exception_keeps_its_place(self):
        with pytest.raises(ZeroDivisionError) as caught, imds.serve() as server:  # noqa: PT012
            psutil.Process(server.pid).kill()
            raise ZeroDivisionError
        assert "exit code -9" in caught.value.__notes__[0]

    def test_kill(self):
        with imds.serve() as server:
            server.kill()
            assert not server.running
            assert not server.directory.exists()


PARENT = """
import imds, os, sys, threading, time
def start():
    global server
    server = imds.serve(shards=2, unix=True)
thread = threading.Thread(target=start)  # whose end must not be taken for the parent's
thread.start()
thread.join()
print(server.pid, server.directory, flush=True)
{then}
"""


class TestParent:
    @pytest.mark.parametrize(
        ("then", "code"),
        [
            pytest.param("os.kill(os.getpid(), 9)", -9, id="killed"),
            pytest.param("sys.exit(3)", 3, id="exit"),
            pytest.param("os._exit(0)", 0, id="exit without cleaning up"),
            pytest.param("raise ZeroDivisionError", 1, id="exception"),
            pytest.param("os.fork() or time.sleep(4); os._exit(0)", 0, id="a forked child lives on"),
        ],
    )
    def test_its_end_is_the_servers(self, then, code):
        command = [sys.executable, "-c", PARENT.format(then=then)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as parent:
            pid, directory = parent.stdout.readline().split()
            try:
                server = psutil.Process(int(pid))
                found = [server, *server.children()]
            except psutil.NoSuchProcess:  # it was fast
                found = []
            assert parent.wait(20) == code
            wait_until(lambda: not any(process.is_running() for process in found), "its processes end")
            wait_until(lambda: not Path(directory).parent.exists(), "its directory is removed")

    def test_a_forked_process_cannot_stop_it(self):
        with imds.serve() as server:
            if os.fork() == 0:
                server.stop()
                server.kill()
                os._exit(0 if not server.running else 1)
            _, status = os.wait()
            assert status == 0
            assert server.running
            with server.client() as client:
                assert client.get("a") is None

    def test_pidfd_missing(self, monkeypatch):
        """Where the system cannot tell of a process's end, the parent's number is looked at."""
        from imds import embedded

        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.setattr(embedded, "PAUSE", 0.01)
        parents = iter([7, 7, 1])
        monkeypatch.setattr(os, "getppid", lambda: next(parents))
        embedded.wait_for_end(7)
        assert next(parents, None) is None
