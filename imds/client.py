"""The blocking client.

::

    with imds.Client() as client:
        client.set("greeting", "hello")
        client.zadd("scores", 12.5, "anna")
        client.get("greeting")              # b"hello"

The rules that this file keeps:

* A reply can never reach the wrong request. A connection on which anything went wrong (a timeout, an
  interrupt, bytes that are no reply, a reply too many) is closed and never used again.
* A connection that the server closed while it was idle is noticed before a request goes out, so a
  restarted server costs its idle clients no error.
* A call is sent again only if it was surely not carried out, or does no harm if it is carried out twice
  (imds/methods/base.py), and only within its time.
* Sending and receiving are interleaved. However long a pipeline is, the replies are taken while requests
  are still going out, so that a server that stops reading until its replies are read is not waited for.
* Threads may share a client: each call takes a connection for itself, of at most ``max_connections``, and
  waits for one where all are taken. A process forked from this one makes its own connections.

A timeout or a lost connection leaves open whether the request was carried out, unless the connection
could not be made at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import count as _count
from math import inf
from types import TracebackType
from typing import Any, AnyStr, Self, Unpack, overload
from weakref import WeakSet

from imds.methods import AllCommands, Blocking, DataCommands, Request
from imds.pool import Connection, Pool
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT
from imds.replies import (
    ConnectionError,
    ImdsError,
    OutcomeUnknownError,
    OutOfMemoryError,
    ReplyReader,
    Response,
    ServerError,
    TimeoutError,
    Token,
    TryAgainError,
    WatchError,
    WrongTypeError,
    parse_pairs,
    to_frame,
)
from imds.session import (
    ClientOptions,
    Options,
    PipelineQueue,
    TransactionQueue,
    parse_url,
    results,
)

__all__ = [
    "Client",
    "ConnectionError",
    "ImdsError",
    "OutOfMemoryError",
    "OutcomeUnknownError",
    "Pipeline",
    "Response",
    "ServerError",
    "TimeoutError",
    "Transaction",
    "TryAgainError",
    "WatchError",
    "WrongTypeError",
    "parse_pairs",
]


class Client(AllCommands[AnyStr], Blocking[AnyStr]):
    """A client of one server; its connections are made by the calls that need them.

    ``unix`` is the path of the server's Unix socket, instead of host and port. ``timeout`` is in seconds
    (None: for ever) and bounds each call as a whole: waiting for a connection, making it, waiting for the
    reply, trying again. In a pipeline it bounds the wait for each reply. Texts come back as bytes, or as str
    if ``encoding`` (such as ``"utf-8"``) is given. ``retries`` is how often a call is sent again.
    ``password`` (and ``user``) are for a server that asks for them, ``name`` is what it shows of this
    client, ``ssl`` is a context for TLS.
    """

    @overload
    def __init__(
        self: Client[bytes],
        host: str = ...,
        port: int = ...,
        *,
        encoding: None = ...,
        **options: Unpack[ClientOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: Client[str],
        host: str = ...,
        port: int = ...,
        *,
        encoding: str,
        **options: Unpack[ClientOptions],
    ) -> None: ...
    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        encoding: str | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        self.options = Options(host, port, encoding=encoding, **options)
        self.timeout = self.options.timeout
        self._reader: ReplyReader[AnyStr] = ReplyReader(encoding)
        self._pool = Pool(self.options)
        _clients.add(self)

    @overload
    @classmethod
    def from_url(
        cls, url: str, *, encoding: None = ..., **options: Unpack[ClientOptions]
    ) -> Client[bytes]: ...
    @overload
    @classmethod
    def from_url(cls, url: str, *, encoding: str, **options: Unpack[ClientOptions]) -> Client[str]: ...
    @classmethod
    def from_url(cls, url: str, **options: Any) -> Any:
        """Return a client of the server at ``imds://``, ``imdss://`` (TLS) or ``imds+unix://``.

        See :func:`imds.session.parse_url`. Options given here win over those of the URL.
        """
        return cls(**(parse_url(url) | options))

    def execute(self, *tokens: Token) -> Response:
        """Send any command, once, and return its reply as it came, an error too."""
        return self.exchange(to_frame(tokens), 1)[0]

    def pipeline(self) -> Pipeline[AnyStr]:
        """Return a :class:`Pipeline` that collects commands to send them together."""
        return Pipeline(self)

    def transaction(self, *watched: Token) -> Transaction[AnyStr]:
        """Return a :class:`Transaction`, which fails if another client changes one of the watched keys."""
        return Transaction(self, watched)

    def scan_iter(
        self, *, match: Token | None = None, count: int | None = None, type: str | None = None
    ) -> Iterator[AnyStr]:
        """Yield every key; see :meth:`scan`. A key that is there all the time is not left out."""
        cursor = "0"
        while True:
            cursor, found = self.scan(cursor, match=match, count=count, type=type)
            yield from found
            if cursor == "0":
                return

    def zscan_iter(
        self, key: Token, *, match: Token | None = None, count: int | None = None
    ) -> Iterator[tuple[AnyStr, float]]:
        """Yield every (member, score) of a sorted set; see :meth:`zscan`."""
        cursor = "0"
        while True:
            cursor, found = self.zscan(key, cursor, match=match, count=count)
            yield from found
            if cursor == "0":
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<imds.Client of {self.address}>"

    @property
    def reader(self) -> ReplyReader[AnyStr]:
        """What reads the replies."""
        return self._reader

    @property
    def address(self) -> str:
        """Where the server is, for people."""
        return self.options.address

    @property
    def connects(self) -> int:
        """How many connections this client has made."""
        return self._pool.connects

    def connect(self) -> None:
        """Connect now, unless there is a connection, to learn early whether the server is there."""
        self._pool.release(self._pool.acquire(self._deadline()))

    def close(self) -> None:
        """Close the connections that no call uses at the moment. Another call would make a new one."""
        self._pool.close()

    def exchange(self, requests: bytes | bytearray, count: int, wait: float = 0.0) -> list[Response]:
        """Send ``count`` request frames, once, and return their replies in order.

        ``wait`` is how many seconds longer than usual each reply may take.
        """
        return self._converse(self._pool.acquire(self._deadline()), requests, count, wait)

    def _run(self, request: Request[Any]) -> Any:
        frame = to_frame(request.tokens)
        deadline = self._deadline(request.wait)
        for attempt in _count():
            sent = False
            try:
                connection = self._pool.acquire(deadline)
                sent = True
                return request.read(self._converse(connection, frame, 1, request.wait, deadline)[0])
            except ImdsError as error:
                pause = self.options.pause(error, attempt, request.repeatable or not sent)
                if pause is None or time.monotonic() + pause >= deadline:
                    raise
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _converse(
        self,
        connection: Connection,
        requests: bytes | bytearray,
        count: int,
        wait: float = 0.0,
        deadline: float | None = None,
        keep: bool = False,
    ) -> list[Response]:
        """Exchange requests for replies on a connection of the pool, and give it back or close it.

        ``keep`` leaves it with the caller where all went well.
        """
        try:
            patience = None if self.timeout is None or wait == inf else self.timeout + wait
            replies = connection.exchange(requests, count, patience, deadline)
        except BaseException as error:  # an interrupt too leaves replies under way
            self._pool.discard(connection)
            if isinstance(error, OSError) and not isinstance(error, ImdsError):
                raise ConnectionError(f"lost the connection to {self.address}: {error}") from error
            raise
        if not keep:
            self._pool.release(connection)
        return replies

    def _deadline(self, wait: float = 0.0) -> float:
        return inf if self.timeout is None else time.monotonic() + self.timeout + wait


_clients: WeakSet[Client[Any]] = WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._pool.forked()


os.register_at_fork(after_in_child=_after_fork)


class Pipeline(PipelineQueue[AnyStr]):
    """Commands that are sent together; their replies come back in order.

    ::

        with client.pipeline() as pipe:
            pipe.set("a", 1).set("b", 2)
            pipe.get("a")
            done, done, value = pipe.execute()

    The end of a ``with`` block executes what is still queued, unless the block raised. Not a transaction:
    other clients' commands may come in between, and an error does not stop the commands after it.
    A lost connection leaves open which of them were carried out; nothing is sent again.
    """

    def __init__(self, client: Client[AnyStr]) -> None:
        self._reader = client.reader
        self._discard()
        self._client: Client[AnyStr] = client

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send what is queued and return the results in order; the queue is empty afterwards.

        All commands are carried out, whatever some of them answer. Then the first error is raised, or,
        with ``raise_on_error=False``, each error stands in the list as an exception in its place.
        """
        frames, requests = self._take()
        if not requests:
            return []
        wait = max(request.wait for request in requests)
        return results(requests, self._client.exchange(frames, len(requests), wait), raise_on_error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.execute()
        else:
            self._discard()


class Transaction(TransactionQueue[AnyStr]):
    """Commands on keys of one slot that the server runs all at once, or not at all.

    ::

        with client.transaction("stock") as trade:      # watches "stock"
            if int(trade.now.get("stock")) > 0:         # asks at once
                trade.decr("stock").incr("{stock}sold")
                trade.execute()                         # WatchError if somebody else changed it

    ``now`` runs commands at once, on the connection that watches. The end of the ``with`` block executes what
    is still queued, unless the block raised. A command that fails when it is run does not keep the others
    from running.
    """

    def __init__(self, client: Client[AnyStr], watched: tuple[Token, ...]) -> None:
        self._reader = client.reader
        self._discard()
        self._client: Client[AnyStr] = client
        self._watched = watched
        self._held: _Held[AnyStr] | None = None

    @property
    def now(self) -> _Held[AnyStr]:
        """What runs commands at once. Raises RuntimeError outside of a ``with`` block that watches keys."""
        if self._held is None:
            raise RuntimeError("only inside of `with client.transaction(KEY)`, before it is executed")
        return self._held

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Run what is queued and return the results in order; nothing is watched afterwards.

        Raises WatchError where a watched key has changed, ServerError where nothing was carried out.
        """
        frames, requests = self._take()
        if not requests:
            return []
        held, self._held = self._held, None
        connection = held.connection if held else self._client._pool.acquire(self._client._deadline())
        replies = self._client._converse(connection, self._frame(frames), len(requests) + 2)
        return results(requests, self._replies(replies), raise_on_error)

    def __enter__(self) -> Self:
        if self._watched:
            held = _Held(self._client)
            held.watch(self._watched)
            self._held = held
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
        try:
            self.execute()
        finally:
            held, self._held = self._held, None
            if held is not None and not held.lost:
                if error is None:
                    self._client._converse(held.connection, to_frame(("unwatch",)), 1)
                else:  # whatever it was, the server forgets a closed connection's keys
                    self._client._pool.discard(held.connection)


class _Held(DataCommands[AnyStr], Blocking[AnyStr]):
    """Runs commands on one connection, which it keeps."""

    def __init__(self, client: Client[AnyStr]) -> None:
        self._client: Client[AnyStr] = client
        self._reader = client.reader
        self.connection = client._pool.acquire(client._deadline())
        self.lost = False

    def watch(self, keys: tuple[Token, ...]) -> None:
        try:
            frame = to_frame(("watch", *keys))
        except BaseException:
            self._client._pool.release(self.connection)
            raise
        error = self._once(frame).error()
        if error is not None:
            self._client._pool.release(self.connection)
            raise error

    def _run(self, request: Request[Any]) -> Any:
        if self.lost:
            raise ConnectionError("the connection that watched is lost")
        return request.read(self._once(to_frame(request.tokens), request.wait))

    def _once(self, frame: bytes, wait: float = 0.0) -> Response:
        try:
            return self._client._converse(self.connection, frame, 1, wait, keep=True)[0]
        except BaseException:
            self.lost = True
            raise
