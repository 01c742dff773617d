"""The pytest plugin: the fixtures ``imds_server`` and ``imds_client``.

::

    def test_greeting(imds_client):
        imds_client.set("greeting", "hello")
        assert imds_client.get("greeting") == b"hello"

What stays true:

* A test finds no key, no connection and no changed option of an earlier one, also where that one failed or
  stopped the server.
* One server is for all tests of the process, started by the first that asks for it and emptied for each. So
  a test costs a few milliseconds, and every worker of pytest-xdist has a server of its own.
* Where no test asks for a fixture, nothing of imds but this file is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from imds.client import Client
    from imds.embedding import Server


class _Keeper:
    """The server of all tests of this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._server: Server | None = None

    def fresh(self) -> Server:
        """Return the server as it was when it started, or another one where that cannot be."""
        from imds.replies import ImdsError

        if self._server is not None and self._server.running:  # its port might be another's by now
            try:
                self._reset()
                return self._server
            except ImdsError:  # a test may have killed parts of it
                pass
        self.end()
        self._start()
        assert self._server is not None
        return self._server

    def _start(self) -> None:
        from imds.embedding import serve

        self._server = serve(**self._options)
        self._client = self._server.client(retries=0)
        self._values = self._client.config_get()

    def _reset(self) -> None:
        # First the connections: what they have sent by then is carried out before the keys are removed.
        pipe = self._client.pipeline()
        values = pipe.client_kill().flushall().config_get().execute()[-1]
        for name, value in self._values.items():
            if values[name] != value:
                self._client.config_set(name, value)

    def end(self) -> None:
        """Stop the server, if there is one. What a test has killed of it is that test's to judge."""
        from imds.replies import ImdsError

        server, self._server = self._server, None
        if server is not None:
            self._client.close()
            with suppress(ImdsError):
                server.stop()


@pytest.fixture(scope="session")
def imds_options() -> dict[str, Any]:
    """The options of :func:`imds.serve` for ``imds_server``. Define it anew in your ``conftest.py``."""
    return {}


@pytest.fixture(scope="session")
def _imds_keeper(imds_options: dict[str, Any]) -> Iterator[_Keeper]:
    keeper = _Keeper(imds_options)
    yield keeper
    keeper.end()


@pytest.fixture
def imds_server(_imds_keeper: _Keeper) -> Server:
    """A private :class:`imds.embedding.Server` that holds no key; a test may stop or kill it."""
    return _imds_keeper.fresh()


@pytest.fixture
def imds_client(imds_server: Server) -> Iterator[Client[bytes]]:
    """An :class:`imds.Client` of ``imds_server``; ``imds_server.client(encoding="utf-8")`` makes others."""
    with imds_server.client() as client:
        yield client
