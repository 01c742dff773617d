"""Connections of the blocking client: how one is made, how requests become replies, who may use it when.

* A connection is used by one exchange at a time, and after anything went wrong never again.
* Sending and receiving are interleaved, so a server that stops reading until its replies are read is not
  waited for.
"""

from __future__ import annotations

import builtins
import os
import select
import socket
import ssl
import threading
import time
from math import ceil, inf

from imds.replies import ConnectionError, ImdsError, Response, TimeoutError
from imds.session import Exchange, Options, greeted

# What one recv asks for, and one send offers: large enough that a pipeline costs few calls.
_CHUNK = 1 << 16


class Pool:
    """At most ``max_connections`` connections, of which those that were used last are used next."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.connects = 0
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []
        self._making = 0  # connections that are being made
        self._free = threading.Condition(threading.Lock())

    def acquire(self, deadline: float) -> Connection:
        """Return a connection on which nothing is under way; give it back by release or discard."""
        with self._free:
            while True:
                while self._idle:
                    connection = self._idle.pop()
                    if connection.idle():
                        return connection
                    self._forget(connection)
                if len(self._all) + self._making < self._options.max_connections:
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not self._free.wait(None if left == inf else left):
                    raise TimeoutError(f"no connection was free; all {len(self._all)} are in use")
            self._making += 1
        connected = None
        try:
            connected = connect(self._options, deadline)
            return connected
        finally:
            with self._free:
                self._making -= 1
                if connected is not None:
                    self.connects += 1
                    self._all.add(connected)
                else:
                    self._free.notify()

    def release(self, connection: Connection) -> None:
        with self._free:
            if connection in self._all:  # and not of before a fork
                self._idle.append(connection)
                self._free.notify()

    def discard(self, connection: Connection) -> None:
        with self._free:
            self._forget(connection)
            self._free.notify()

    def _forget(self, connection: Connection) -> None:
        connection.close()
        self._all.discard(connection)

    def close(self) -> None:
        """Close what is idle."""
        with self._free:
            while self._idle:
                self._forget(self._idle.pop())
            self._free.notify_all()

    def forked(self) -> None:
        """In a child process: leave the connections to the parent, and the lock to whoever holds it there."""
        for connection in self._all:
            connection.abandon()
        self._all, self._idle, self._making = set(), [], 0
        self._free = threading.Condition(threading.Lock())


def connect(options: Options, deadline: float) -> Connection:
    """Return a new connection that has been greeted. Raises ConnectionError, TimeoutError, ServerError."""
    left = deadline - time.monotonic()
    try:
        if left <= 0:
            raise builtins.TimeoutError("timed out")
        connection = Connection(_open(options, None if left == inf else left))
    except (OSError, UnicodeError) as error:
        kind = TimeoutError if isinstance(error, builtins.TimeoutError) else ConnectionError
        reason = getattr(error, "strerror", None) or error
        raise kind(f"cannot connect to {options.address}: {reason}") from error
    frames = options.greeting()
    if frames:
        try:
            left = max(0.0, deadline - time.monotonic())
            greeted(connection.exchange(b"".join(frames), len(frames), left, deadline))
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError) and not isinstance(error, ImdsError):
                raise ConnectionError(f"lost the connection to {options.address}: {error}") from error
            raise
    return connection


def _open(options: Options, timeout: float | None) -> socket.socket:
    """Return a new non-blocking connection. Raises OSError."""
    if options.unix is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(options.unix))
        except BaseException:
            sock.close()
            raise
    else:
        sock = socket.create_connection((options.host, options.port), timeout)
        if sock.getsockname() == sock.getpeername():
            # Linux joins a socket to itself where nobody listens on a port that it then happens to pick
            # as the socket's own; kept, it would answer us by our requests and bar the server's return.
            sock.close()
            raise ConnectionRefusedError("Connection refused")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if options.ssl is not None:
        try:  # the timeout holds for each step of the handshake
            sock = options.ssl.wrap_socket(sock, server_hostname=None if options.unix else options.host)
        except BaseException:
            sock.close()
            raise
    sock.setblocking(False)
    return sock


class Connection:
    """One non-blocking socket and its poll object, which waits for input unless an exchange is sending."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._half_sent = False

    def close(self) -> None:
        self._sock.close()

    def abandon(self) -> None:
        """Close this process's end alone, without a word of TLS to the other."""
        os.close(self._sock.detach())

    def idle(self) -> bool:
        """Whether the next reply will be for the next request: nothing is under way in either direction."""
        if self._half_sent or (self._tls and self._tls.pending()):
            return False
        if not self._poll.poll(0):
            return True
        if self._tls is None:
            return False
        try:  # TLS has messages of its own, such as new session tickets
            self._tls.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    def exchange(
        self, requests: bytes | bytearray, count: int, timeout: float | None, deadline: float | None = None
    ) -> list[Response]:
        """Send ``count`` requests and return as many replies.

        ``timeout`` bounds the wait for each reply, ``deadline`` (of the monotonic clock) that for the first.
        Raises OSError when the connection breaks, ConnectionError for what is no reply, TimeoutError.
        """
        exchange = Exchange(count)
        unsent = memoryview(requests)
        if deadline is None:
            deadline = _deadline(timeout)
        while not exchange.done:
            if unsent:
                unsent = self._send_some(unsent)
            if not (self._tls and self._tls.pending()):
                left = deadline - time.monotonic()
                events = self._poll.poll(None if left == inf else max(0, ceil(left * 1000)))
                if not events:
                    raise TimeoutError(f"no reply in {timeout} s")
                if not events[0][1] & ~select.POLLOUT:
                    continue
            try:
                chunk = self._sock.recv(_CHUNK)
            except ssl.SSLWantReadError:
                continue
            if not chunk:
                raise exchange.ended()
            if exchange.feed(chunk):
                deadline = _deadline(timeout)
        self._half_sent = bool(unsent)
        return exchange.replies

    def _send_some(self, unsent: memoryview) -> memoryview:
        """Send what the socket takes of ``unsent`` and return the rest; poll for room if there is a rest."""
        try:
            unsent = unsent[self._sock.send(unsent[:_CHUNK]) :]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError:
            unsent = unsent[:0]  # the server closed; what it said before is still to be read
        self._poll.modify(self._sock, select.POLLIN | select.POLLOUT if unsent else select.POLLIN)
        return unsent


def _deadline(timeout: float | None) -> float:
    return inf if timeout is None else time.monotonic() + timeout
