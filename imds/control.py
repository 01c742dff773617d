"""The control channel between the supervisor and each of its children.

A Unix stream socket pair carries messages, one JSON object a line, and file descriptors beside them: a
message with ``"fds": n`` owns the next n descriptors. The kernel delivers a descriptor no later than the
bytes that it was sent with, so the two queues stay in step. The end of the stream means that the other
side is gone: a child then stops.

::

    supervisor -> shard    link {router} + 1 fd · configure {changes} · rewrite · stop
    supervisor -> router   link {shard, restarts} + 1 fd · down {shard, reason, restarts}
                           configure {changes} · ask {router, number} + 1 fd
                           answered {number, peer, there} · drain
    shard -> supervisor    loading {done, total, records, left} · ready {keys, seconds} · refused {reason}
                           rewrite {at_once} · rewritten {error}
    router -> supervisor   ready · distrust {shard} · configure {changes}
                           ask {number} + 1 fd for each other router · answered {router, number}
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from typing import Any

Message = dict[str, Any]

_MAX_FDS = 64  # descriptors taken by one receive; more wait for the next
_CHUNK = 65536


class Channel:
    """One end of a control channel. Owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.closed = False  # the other side is gone
        self._buffer = bytearray()
        self._fds: deque[int] = deque()

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """Return our end of a new channel, and the socket to hand to the other process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, kind: str, fds: tuple[int, ...] = (), **fields: Any) -> bool:
        """Send one message; the descriptors are duplicated, the caller keeps its own.

        Returns False when the other side is gone, or has not read for so long that the socket is full.
        """
        message = {"kind": kind, "fds": len(fds), **fields}
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
        except OSError:
            return False
        return sent == len(data)

    def receive(self) -> list[tuple[Message, list[int]]]:
        """Return the messages that have arrived, each with its descriptors, which the caller then owns."""
        while True:
            try:
                data, fds, _flags, _address = socket.recv_fds(self.sock, _CHUNK, _MAX_FDS)
            except BlockingIOError:
                break
            except OSError:
                self.closed = True
                break
            self._fds.extend(fds)
            if not data:
                self.closed = True
                break
            self._buffer += data
        messages = []
        while (end := self._buffer.find(b"\n")) >= 0:
            message: Message = json.loads(bytes(self._buffer[:end]))
            del self._buffer[: end + 1]
            messages.append((message, [self._fds.popleft() for _ in range(message["fds"])]))
        return messages

    def close(self) -> None:
        """Close the socket and every descriptor that no message has claimed."""
        self.sock.close()
        while self._fds:
            os.close(self._fds.popleft())
