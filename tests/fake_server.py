"""A server for the tests of clients: scripted misbehaviour, or a small honest one over a dict."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable

from imds.protocol import (
    ERROR,
    LIST,
    MISSING,
    OK,
    U32,
    decode_request,
    encode_error,
    encode_list,
    encode_response,
)


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number  # of the connection, from 0
        self._inbox = bytearray()

    def read(self) -> list[bytes] | None:
        """Return the next request, or None when the client has gone."""
        while (found := decode_request(self._inbox)) is None:
            chunk = self.sock.recv(65536)
            if not chunk:
                return None
            self._inbox += chunk
        tokens, end = found
        del self._inbox[:end]
        return tokens

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reply(self, payload: bytes, status: int = OK) -> None:
        self.send(encode_response(status, payload))


class FakeServer:
    """Runs ``serve(peer)`` in a thread for each connection; what it raises, the ``with`` block raises.

    ``tls`` is the context of a server's side.
    """

    def __init__(
        self,
        serve: Callable[[Peer], None],
        *,
        unix: str | None = None,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        if unix:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(unix)
            self._listener.listen()
        else:
            self._listener = socket.create_server(("127.0.0.1", port))
            self.port = self._listener.getsockname()[1]
        self._serve = serve
        self._peers: list[Peer] = []
        self._threads: list[threading.Thread] = []
        self._failures: list[Exception] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers.append(Peer(sock, len(self._peers)))
            self._start(self._run, self._peers[-1])

    def _run(self, peer: Peer) -> None:
        try:
            if self._tls is not None:
                peer.sock = self._tls.wrap_socket(peer.sock, server_side=True)
            self._serve(peer)
        except OSError:
            pass  # the client went away, or the test is over
        except Exception as error:
            self._failures.append(error)
        finally:
            peer.sock.close()

    def close(self) -> None:
        """Close everything and wait for the threads. The second time does nothing."""
        if self._listener.fileno() < 0:
            return
        with self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)
        for peer in self._peers:
            try:
                peer.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if self._failures and kind is None:
            raise self._failures[0]


SHARD = {"shard": 0, "state": "up", "keys": 3, "ops": 40, "pid": 77}


def honest(stats: list[dict[str, object]] | None = None) -> Callable[[Peer], None]:
    """Return a server of the eight commands over one dict; sorted sets are dicts of member to score."""
    data: dict[bytes, bytes | dict[bytes, float]] = {}

    def answer(name: bytes, key: bytes = b"", *rest: bytes) -> tuple[int, bytes]:
        held = data.get(key)
        if name == b"stats":
            shards = [SHARD] if stats is None else stats
            return LIST, encode_list(json.dumps(shard).encode() for shard in shards)
        if name == b"set":
            data[key] = rest[0]
            return OK, b"OK"
        if name == b"del":
            return (OK, b"OK") if data.pop(key, None) is not None else (MISSING, b"")
        if held is not None and isinstance(held, bytes) != (name == b"get"):
            return ERROR, b"WRONGTYPE Operation against a key holding the wrong kind of value"
        if name == b"get":
            return (OK, held) if isinstance(held, bytes) else (MISSING, b"")
        if name == b"zadd":
            data.setdefault(key, {})[rest[1]] = float(rest[0])  # type: ignore[index]
            return OK, b"OK"
        pairs = sorted((score, member) for member, score in held.items()) if isinstance(held, dict) else []
        if name == b"zrange":
            low, high = map(float, rest)
            found = [b"%s:%s" % (repr(s).encode(), m) for s, m in pairs if low <= s <= high]
            return (OK, b",".join(found)) if found else (MISSING, b"")
        if name == b"zrank":
            members = [member for _, member in pairs]
            return (OK, b"%d" % members.index(rest[0])) if rest[0] in members else (MISSING, b"")
        if name == b"zrem":
            found_it = isinstance(held, dict) and held.pop(rest[0], None) is not None
            return (OK, b"OK") if found_it else (MISSING, b"")
        return ERROR, b"ERR unknown command"

    def serve(peer: Peer) -> None:
        while tokens := peer.read():
            try:
                peer.send(encode_response(*answer(tokens[0].lower(), *tokens[1:])))
            except ValueError:
                peer.send(encode_error("ERR score must be a number"))
            except (TypeError, IndexError):
                peer.send(encode_error("ERR wrong number of arguments"))

    return serve


def announce(length: int) -> bytes:
    """Return the first bytes of a response of ``length``."""
    return U32.pack(length)
