"""The fixtures of the tests over real processes: ``server`` makes servers, ``shared`` is one for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that makes a server on a directory under ``tmp_path``; start it by ``start``.

    What still runs when the test is over is ended; an orphan fails the test.
    """
    made: list[Server] = []

    def make(name: str = "data") -> Server:
        made.append(Server(tmp_path / name, tmp_path / f"{name}.log"))
        return made[-1]

    yield make
    orphans = [orphan for one in made for orphan in one.end()]
    assert not orphans, f"the server left processes behind: {orphans}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a running server of 4 shards for all tests of a module; each uses keys of its own."""
    path = tmp_path_factory.mktemp("shared")
    server = Server(path / "data", path / "server.log").start("--shards", "4")
    try:
        yield server
        server.stop()
    finally:
        orphans = server.end()
    assert not orphans, f"the server left processes behind: {orphans}"
