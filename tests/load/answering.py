"""A small server for the tests of the load generator: it answers, refuses, stalls or hangs up as told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from imds.protocol import MISSING, OK, decode_request, encode_response

Answer = Callable[[list[bytes]], bytes | None]


def imds_store() -> Answer:
    """Return a function that answers get and set like imds, and anything else by OK."""
    data: dict[bytes, bytes] = {}

    def answer(tokens: list[bytes]) -> bytes:
        if tokens[0] == b"set":
            data[tokens[1]] = tokens[2]
        if tokens[0] != b"get":
            return encode_response(OK, b"OK")
        return encode_response(OK, data[tokens[1]]) if tokens[1] in data else encode_response(MISSING)

    return answer


def resp_store() -> Answer:
    """Return a function that answers get and set like redis, and anything else by an array."""
    data: dict[bytes, bytes] = {}

    def answer(tokens: list[bytes]) -> bytes:
        if tokens[0] == b"set":
            data[tokens[1]] = tokens[2]
            return b"+OK\r\n"
        if tokens[0] == b"get":
            value = data.get(tokens[1])
            return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)
        return b"*2\r\n$1\r\na\r\n:1\r\n"

    return answer


def decode_resp(buf: bytes, pos: int) -> tuple[list[bytes], int] | None:
    """Return the tokens of the RESP request at ``pos`` and its end, or None if it is cut short."""
    tokens: list[bytes] = []
    left = 0
    while not tokens or left:
        eol = buf.find(b"\r\n", pos)
        if eol < 0:
            return None
        number = int(buf[pos + 1 : eol])
        if buf[pos : pos + 1] == b"*":
            left = number
            pos = eol + 2
            continue
        end = eol + 2 + number
        if len(buf) < end + 2:
            return None
        tokens.append(buf[eol + 2 : end])
        pos = end + 2
        left -= 1
    return tokens, pos


class Server:
    """Answers each request by ``answer(tokens)``; None hangs up. ``seen`` holds all requests.

    A context manager; on the way out every connection is closed and every thread has ended.
    """

    def __init__(self, answer: Answer, protocol: str = "imds") -> None:
        self._answer = answer
        self._decode = decode_request if protocol == "imds" else decode_resp
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self.seen: list[list[bytes]] = []
        self.many_seen = threading.Event()  # set from the 100th request on

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def __enter__(self) -> Server:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for sock in self._socks:
            with suppress(OSError):  # its thread may have closed it
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._socks.append(sock)
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            buf = b""
            try:
                while data := sock.recv(1 << 16):
                    buf += data
                    pos = 0
                    while decoded := (self._decode(buf, pos) if pos < len(buf) else None):
                        tokens, pos = decoded
                        self.seen.append(tokens)
                        if len(self.seen) == 100:
                            self.many_seen.set()
                        reply = self._answer(tokens)
                        if reply is None:
                            return
                        sock.sendall(reply)
                    buf = buf[pos:]
            except OSError:
                return
