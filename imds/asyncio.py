"""The asyncio client: the blocking one's methods, each awaited.

::

    async with imds.asyncio.Client() as client:
        await client.set("greeting", "hello")
        await client.get("greeting")            # b"hello"

The rules are those of imds/client.py. A call that is cancelled or out of time closes its connection, so that
its reply cannot reach another. A client belongs to the event loop that uses it; used by another one later
(by a second ``asyncio.run``), or in a forked process, it makes new connections.
"""

from __future__ import annotations

import asyncio
import builtins
import os
import time
from collections.abc import AsyncIterator
from itertools import count as _count
from math import inf
from types import TracebackType
from typing import Any, AnyStr, Self, Unpack, cast, overload

from imds.methods import AllCommands, Awaited, DataCommands, Request
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT
from imds.replies import ConnectionError, ImdsError, ReplyReader, Response, TimeoutError, Token, to_frame
from imds.session import (
    ClientOptions,
    Exchange,
    Options,
    PipelineQueue,
    TransactionQueue,
    greeted,
    parse_url,
    results,
)

__all__ = ["Client", "Pipeline", "Transaction"]


class Client(AllCommands[AnyStr], Awaited[AnyStr]):
    """A client of one server; see :class:`imds.Client`, whose options it takes."""

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
        self._pool = _Pool(self.options)

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

    async def execute(self, *tokens: Token) -> Response:
        """Send any command, once, and return its reply as it came, an error too."""
        return (await self.exchange(to_frame(tokens), 1))[0]

    def pipeline(self) -> Pipeline[AnyStr]:
        """Return a :class:`Pipeline` that collects commands to send them together."""
        return Pipeline(self)

    def transaction(self, *watched: Token) -> Transaction[AnyStr]:
        """Return a :class:`Transaction`, which fails if another client changes one of the watched keys."""
        return Transaction(self, watched)

    async def scan_iter(
        self, *, match: Token | None = None, count: int | None = None, type: str | None = None
    ) -> AsyncIterator[AnyStr]:
        """Yield every key; see :meth:`scan`. A key that is there all the time is not left out."""
        cursor = "0"
        while True:
            cursor, found = await self.scan(cursor, match=match, count=count, type=type)
            for key in found:
                yield key
            if cursor == "0":
                return

    async def zscan_iter(
        self, key: Token, *, match: Token | None = None, count: int | None = None
    ) -> AsyncIterator[tuple[AnyStr, float]]:
        """Yield every (member, score) of a sorted set; see :meth:`zscan`."""
        cursor = "0"
        while True:
            cursor, found = await self.zscan(key, cursor, match=match, count=count)
            for pair in found:
                yield pair
            if cursor == "0":
                return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<imds.asyncio.Client of {self.address}>"

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

    async def connect(self) -> None:
        """Connect now, unless there is a connection, to learn early whether the server is there."""
        self._pool.release(await self._pool.acquire(self._deadline()))

    async def close(self) -> None:
        """Close the connections that no call uses at the moment. Another call would make a new one."""
        await self._pool.close()

    async def exchange(self, requests: bytes | bytearray, count: int, wait: float = 0.0) -> list[Response]:
        """Send ``count`` request frames, once, and return their replies in order.

        ``wait`` is how many seconds longer than usual each reply may take.
        """
        connection = await self._pool.acquire(self._deadline())
        return await self._converse(connection, requests, count, wait)

    async def _run(self, request: Request[Any]) -> Any:
        frame = to_frame(request.tokens)
        deadline = self._deadline(request.wait)
        for attempt in _count():
            sent = False
            try:
                connection = await self._pool.acquire(deadline)
                sent = True
                replies = await self._converse(connection, frame, 1, request.wait, deadline)
                return request.read(replies[0])
            except ImdsError as error:
                pause = self.options.pause(error, attempt, request.repeatable or not sent)
                if pause is None or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _converse(
        self,
        connection: _Connection,
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
            replies = await connection.exchange(requests, count, patience, deadline)
        except BaseException as error:  # a cancelled call too leaves replies under way
            self._pool.discard(connection)
            if isinstance(error, OSError) and not isinstance(error, ImdsError):
                raise ConnectionError(f"lost the connection to {self.address}: {error}") from error
            raise
        if not keep:
            self._pool.release(connection)
        return replies

    def _deadline(self, wait: float = 0.0) -> float:
        return inf if self.timeout is None else time.monotonic() + self.timeout + wait


class Pipeline(PipelineQueue[AnyStr]):
    """Commands that are sent together; see :class:`imds.Pipeline`. ``execute`` is awaited."""

    def __init__(self, client: Client[AnyStr]) -> None:
        self._reader = client.reader
        self._client: Client[AnyStr] = client
        self._discard()

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send what is queued and return the results in order; the queue is empty afterwards."""
        frames, requests = self._take()
        if not requests:
            return []
        wait = max(request.wait for request in requests)
        return results(requests, await self._client.exchange(frames, len(requests), wait), raise_on_error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.execute()
        else:
            self._discard()


class Transaction(TransactionQueue[AnyStr]):
    """Commands on keys of one slot that run all at once; see :class:`imds.client.Transaction`.

    ::

        async with client.transaction("stock") as trade:
            if int(await trade.now.get("stock")) > 0:
                trade.decr("stock").incr("{stock}sold")
                await trade.execute()
    """

    def __init__(self, client: Client[AnyStr], watched: tuple[Token, ...]) -> None:
        self._reader = client.reader
        self._client: Client[AnyStr] = client
        self._watched = watched
        self._held: _Held[AnyStr] | None = None
        self._discard()

    @property
    def now(self) -> _Held[AnyStr]:
        """What runs commands at once. Raises RuntimeError outside of a block that watches keys."""
        if self._held is None:
            raise RuntimeError("only inside of `async with client.transaction(KEY)`, before it is executed")
        return self._held

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Run what is queued and return the results in order; nothing is watched afterwards.

        Raises WatchError where a watched key has changed, ServerError where nothing was carried out.
        """
        frames, requests = self._take()
        if not requests:
            return []
        client, held = self._client, self._held
        self._held = None
        connection = held.take() if held else await client._pool.acquire(client._deadline())
        replies = await client._converse(connection, self._frame(frames), len(requests) + 2)
        return results(requests, self._replies(replies), raise_on_error)

    async def __aenter__(self) -> Self:
        if self._watched:
            frame = to_frame(("watch", *self._watched))
            held = _Held(self._client, await self._client._pool.acquire(self._client._deadline()))
            if error := (await held.once(frame)).error():
                self._client._pool.release(held.take())
                raise error
            self._held = held
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
        try:
            await self.execute()
        finally:
            held, self._held = self._held, None
            if held is not None and not held.lost:
                if error is None:
                    await self._client._converse(held.take(), to_frame(("unwatch",)), 1)
                else:  # whatever it was, the server forgets a closed connection's keys
                    self._client._pool.discard(held.take())


class _Held(DataCommands[AnyStr], Awaited[AnyStr]):
    """Runs commands on one connection, which it keeps."""

    def __init__(self, client: Client[AnyStr], connection: _Connection) -> None:
        self._client: Client[AnyStr] = client
        self._reader = client.reader
        self._connection: _Connection | None = connection

    @property
    def lost(self) -> bool:
        return self._connection is None

    def take(self) -> _Connection:
        """Return the connection, which is the caller's then."""
        connection, self._connection = self._connection, None
        if connection is None:
            raise ConnectionError("the connection that watched is lost")
        return connection

    async def _run(self, request: Request[Any]) -> Any:
        return request.read(await self.once(to_frame(request.tokens), request.wait))

    async def once(self, frame: bytes, wait: float = 0.0) -> Response:
        connection = self.take()  # for good, unless all goes well
        replies = await self._client._converse(connection, frame, 1, wait, keep=True)
        self._connection = connection
        return replies[0]


class _Pool:
    """At most ``max_connections`` connections, of which those that were used last are used next."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.connects = 0
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._begin()

    def _begin(self) -> None:
        self._all: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._places = asyncio.Semaphore(self._options.max_connections)

    async def acquire(self, deadline: float) -> _Connection:
        """Return a connection on which nothing is under way; give it back by release or discard."""
        owner = os.getpid(), asyncio.get_running_loop()
        if owner != self._owner:
            self._begin()  # the old connections belong to a loop that is over, or to another process
            self._owner = owner
        if self._places.locked():
            left = deadline - time.monotonic()
            try:
                async with asyncio.timeout(None if left == inf else left):
                    await self._places.acquire()
            except builtins.TimeoutError:
                raise TimeoutError(f"no connection was free; all {len(self._all)} are in use") from None
        else:
            await self._places.acquire()
        try:
            while self._idle:
                connection = self._idle.pop()
                if not connection.broken:
                    return connection
                self._all.discard(connection)
            connection = await connect(self._options, deadline)
        except BaseException:
            self._places.release()
            raise
        self.connects += 1
        self._all.add(connection)
        return connection

    def release(self, connection: _Connection) -> None:
        if connection in self._all:  # and not of another loop
            self._idle.append(connection)
            self._places.release()

    def discard(self, connection: _Connection) -> None:
        connection.abort()
        if connection in self._all:
            self._all.discard(connection)
            self._places.release()

    async def close(self) -> None:
        """Close what is idle."""
        idle, self._idle = self._idle, []
        for connection in idle:
            self._all.discard(connection)
            connection.abort()
        if idle:
            await asyncio.sleep(0)  # the loop closes sockets in its next turn


async def connect(options: Options, deadline: float) -> _Connection:
    """Return a new connection that has been greeted. Raises ConnectionError, TimeoutError, ServerError."""
    loop = asyncio.get_running_loop()
    left = deadline - time.monotonic()
    tls: dict[str, Any] = {"ssl": options.ssl} if options.ssl is not None else {}
    try:
        async with asyncio.timeout(None if left == inf else left):
            if options.unix is not None:
                if tls:
                    tls["server_hostname"] = ""
                _, connection = await loop.create_unix_connection(_Connection, os.fspath(options.unix), **tls)
            else:
                _, connection = await loop.create_connection(_Connection, options.host, options.port, **tls)
    except (OSError, UnicodeError) as error:
        kind = TimeoutError if isinstance(error, builtins.TimeoutError) else ConnectionError
        reason = getattr(error, "strerror", None) or str(error) or "timed out"
        raise kind(f"cannot connect to {options.address}: {reason}") from error
    if frames := options.greeting():
        try:
            left = max(0.0, deadline - time.monotonic())
            greeted(await connection.exchange(b"".join(frames), len(frames), left, deadline))
        except BaseException as error:
            connection.abort()
            if isinstance(error, OSError) and not isinstance(error, ImdsError):
                raise ConnectionError(f"lost the connection to {options.address}: {error}") from error
            raise
    return connection


class _Connection(asyncio.Protocol):
    """One connection, used by one exchange at a time. ``broken`` when it may not be used again."""

    def __init__(self) -> None:
        self.broken = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: float | None = None
        self._deadline = inf

    async def exchange(
        self, requests: bytes | bytearray, count: int, timeout: float | None, deadline: float | None = None
    ) -> list[Response]:
        """Send ``count`` requests and return as many replies.

        ``timeout`` bounds the wait for each reply, ``deadline`` (of the monotonic clock) that for the first.
        Raises OSError when the connection breaks, ConnectionError for what is no reply, TimeoutError.
        """
        assert self._transport is not None
        assert self._exchange is None
        exchange = self._exchange = Exchange(count)
        waiter = self._waiter = self._loop.create_future()
        self._timeout = timeout
        self._deadline = deadline if deadline is not None else _deadline(timeout)
        if self._deadline != inf:
            self._timer = self._loop.call_later(self._deadline - time.monotonic(), self._expire)
        try:
            if self.broken:
                raise exchange.ended()
            self._transport.write(requests)
            await waiter
        finally:
            self._exchange = self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return exchange.replies

    def abort(self) -> None:
        self.broken = True
        if self._transport is not None and not self._loop.is_closed():
            self._transport.abort()

    def _expire(self) -> None:
        left = self._deadline - time.monotonic()
        if left > 0:  # a reply has come since, and put it off
            self._timer = self._loop.call_later(left, self._expire)
        else:
            self._fail(TimeoutError(f"no reply in {self._timeout} s"))

    def _fail(self, error: Exception) -> None:
        self.broken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # a reply that nobody asked for
            self.abort()
            return
        try:
            if self._exchange.feed(data):
                self._deadline = _deadline(self._timeout)
        except ConnectionError as error:
            self._fail(error)
            return
        if self._exchange.done and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def eof_received(self) -> None:
        if self._exchange is not None:
            self._fail(self._exchange.ended())
        self.broken = True

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or (self._exchange or Exchange(1)).ended())


def _deadline(timeout: float | None) -> float:
    return inf if timeout is None else time.monotonic() + timeout
