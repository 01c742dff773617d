"""imds-cli in the test's own process, and a real server for it."""

import io
import socket
import sys

import pytest
from interrupts import heeded

import imds
from imds.cli import main


@pytest.fixture(scope="session")
def shared_server():
    """One server for all tests that want a real one."""
    with imds.serve(shards=2) as server:
        yield server


@pytest.fixture
def real(shared_server):
    """The real server, empty, as a client of it."""
    with shared_server.client() as client:
        client.execute("flushall")
        yield client


@pytest.fixture
def server(real, shared_server):
    """The server that ``run`` asks."""
    return shared_server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("IMDS_HOST", "IMDS_PORT", "IMDS_UNIX", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMDS_HISTORY", str(tmp_path / "state" / "history"))


@pytest.fixture
def run(server, capfdbinary):
    """Run imds-cli: ``run(*words, stdin=...)`` returns (exit code, stdout, stderr)."""

    def run(*words, stdin=b"", options=("-p", str(server.port))):
        with pytest.MonkeyPatch.context() as patch, heeded():
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            try:
                code = main([*options, *words])
            except SystemExit as leave:
                code = leave.code
        return code, *capfdbinary.readouterr()

    return run


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])
