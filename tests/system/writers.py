"""Writers that know what they were promised, for tests that kill or stop a server under them."""

from __future__ import annotations

import socket
import threading
import time

from serving import Server, receive_replies, request

from imds.protocol import OK

# What an error says about its write: the server may have carried it out, or surely has not.
PERHAPS = {b"UNKNOWN"}
NOT = {b"RETRY", b"SHARDDOWN", b"LOADING", b"READONLY", b"BUSY", b"OOM"}


class Writer(threading.Thread):
    """Sets its own keys to ever new values, in pipelines, until :meth:`finish`; reconnects when it has to.

    ``sure[key]`` is the last acknowledged value, ``perhaps[key]`` the values written after it of which
    nobody knows. ``answers`` counts the codes of all replies.
    """

    def __init__(self, server: Server, name: str, keys: int = 50, depth: int = 20) -> None:
        super().__init__(name=name, daemon=True)
        self.server = server
        self.port = server.port
        self.keys = [b"%b:%d" % (name.encode(), number) for number in range(keys)]
        self.depth = depth
        self.sure: dict[bytes, bytes] = {}
        self.perhaps: dict[bytes, set[bytes]] = {key: set() for key in self.keys}
        self.answers: dict[bytes, int] = {}
        self.connects = 0
        self.failure: BaseException | None = None
        self._over = threading.Event()
        self._number = 0

    def run(self) -> None:
        try:
            while not self._over.is_set():
                try:
                    with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
                        self.connects += 1
                        while not self._over.is_set() and self._write(sock):
                            pass
                except ConnectionError:
                    pass
                time.sleep(0.02)
        except BaseException as error:
            self.failure = error
            raise

    def _write(self, sock: socket.socket) -> bool:
        """Send one pipeline of writes and note its outcome; return False where the connection is gone."""
        batch = []
        for _ in range(self.depth):
            self._number += 1
            batch.append((self.keys[self._number % len(self.keys)], b"value-%d" % self._number))
        for key, value in batch:
            self.perhaps[key].add(value)
        got: list[tuple[int, bytes]] = []
        try:
            sock.sendall(b"".join(request(b"set", key, value) for key, value in batch))
            for _ in batch:
                one = receive_replies(sock, 1)
                if not one:
                    break
                got += one
        except ConnectionError:
            pass
        for (key, value), (status, payload) in zip(batch, got, strict=False):
            code = payload.split(b" ", 1)[0]
            self.answers[code] = self.answers.get(code, 0) + 1
            if status == OK:
                self.sure[key] = value
                self.perhaps[key] = {later for later in self.perhaps[key] if _number(later) > _number(value)}
            elif code in NOT:
                self.perhaps[key].discard(value)
            else:
                assert code in PERHAPS, payload
        return len(got) == len(batch)

    def finish(self) -> None:
        """Stop writing."""
        self._over.set()
        self.join(40)
        assert not self.is_alive()
        assert self.failure is None, self.failure

    def check(self) -> None:
        """Demand of the server every acknowledged write, and none that it refused."""
        with self.server.client() as client:
            for key in self.keys:
                found = client.get(key)
                allowed = self.perhaps[key] | {self.sure.get(key)}
                assert found in allowed, f"{key!r} holds {found!r}, allowed are {allowed}"


def _number(value: bytes) -> int:
    return int(value.split(b"-")[1])
