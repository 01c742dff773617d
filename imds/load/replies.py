"""Counting the replies in a stream, without making objects of them.

Both counters go by the length prefixes. They take the stream cut anywhere, keep at most one unfinished
header (or error text), and skip payloads without keeping them: a reply of any size costs no memory.
"""

from __future__ import annotations

import socket

from imds.protocol import ERROR, LIST, MAX_RESPONSE, MISSING, U32U32, ProtocolError

RECV = 1 << 16
MAX_LINE = 1 << 16  # the longest RESP line or error text; more is not a reply

# The size of a whole RESP element, by its first four bytes: nearly all replies are one of these, and one
# look-up takes a quarter of the time of reading the header.
_SHORT = {b"+OK\r": 5}
_SHORT |= {(b"$%d\r\n" % n)[:4]: len(b"$%d\r\n" % n) + n + 2 for n in range(100)}
_SHORT |= {(b":%d\r\n" % n)[:4]: len(b":%d\r\n" % n) for n in range(100)}


class ImdsReplies:
    """Counts response frames of imds/protocol.py in a stream.

    ``count`` is the number of whole replies since :meth:`reset`; ``odd`` lists (position, text) of
    those that are errors, or misses where text is None.
    """

    __slots__ = ("_skip", "_tail", "count", "odd")

    def __init__(self) -> None:
        self._tail = b""  # an unfinished header or error
        self._skip = 0  # bytes of the current reply yet to come, its header having been read
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.count = 0
        self.odd: list[tuple[int, str | None]] = []

    @property
    def at_rest(self) -> bool:
        """Whether the stream stands between two replies."""
        return not self._tail and not self._skip

    def feed(self, data: bytes) -> None:
        """Count the replies that end in ``data``. Raises ProtocolError where it is no reply. O(replies)."""
        pos = 0
        if self._skip:
            if len(data) < self._skip:
                self._skip -= len(data)
                return
            pos, self._skip = self._skip, 0
            self.count += 1
        elif self._tail:
            data = self._tail + data
            self._tail = b""
        size = len(data)
        unpack = U32U32.unpack_from
        while size - pos >= 8:
            length, status = unpack(data, pos)
            if not 4 <= length <= MAX_RESPONSE or status > LIST:
                raise ProtocolError(f"no imds reply: length {length}, status {status}")
            end = pos + 4 + length
            if status == ERROR:
                if length > MAX_LINE:
                    raise ProtocolError(f"no imds reply: an error text of {length - 4} bytes")
                if end > size:
                    break
                self.odd.append((self.count, data[pos + 8 : end].decode(errors="replace")))
            elif status == MISSING:
                self.odd.append((self.count, None))
            if end > size:
                self._skip = end - size
                return
            self.count += 1
            pos = end
        self._tail = data[pos:]


class RespReplies:
    """Counts RESP2 and RESP3 replies in a stream; the same interface as :class:`ImdsReplies`.

    A null, or an empty array at the top, is a miss: it is what redis answers where imds has status 1.
    """

    __slots__ = ("_open", "_skip", "_tail", "count", "odd")

    def __init__(self) -> None:
        self._tail = b""  # an unfinished line
        self._skip = 0  # bytes of the current bulk string, its line end included
        self._open = 0  # elements that the current reply still lacks; 0 between two replies
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.count = 0
        self.odd: list[tuple[int, str | None]] = []

    @property
    def at_rest(self) -> bool:
        """Whether the stream stands between two replies."""
        return not self._tail and not self._skip and not self._open

    def feed(self, data: bytes) -> None:
        """Count the replies that end in ``data``. Raises ProtocolError where it is no reply. O(elements)."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        # One loop and no calls: a sorted set's range is twenty elements a reply.
        pos, size, left = 0, len(data), self._open
        short = _SHORT.get
        while True:
            if self._skip:
                if size - pos < self._skip:
                    self._skip -= size - pos
                    break
                pos += self._skip
                self._skip = 0
            elif (step := short(data[pos : pos + 4], size + 1)) <= size - pos:
                pos += step
                left = left or 1
            else:
                eol = data.find(b"\r\n", pos)
                if eol < 0:
                    self._keep(data[pos:])
                    break
                kind = data[pos]
                top = not left
                if top:
                    left = 1
                if kind in b"$=*~>%":
                    length = self._length(data[pos + 1 : eol])
                    if kind in b"$=":
                        if length >= 0:
                            pos = eol + 2
                            self._skip = length + 2
                            continue
                        missing = True
                    else:
                        left += max(0, length) * (2 if kind == 0x25 else 1)
                        missing = length <= 0
                    if top and missing:
                        self.odd.append((self.count, None))
                elif kind in b"-_":
                    if top:
                        text = data[pos + 1 : eol].decode(errors="replace") if kind == 0x2D else None
                        self.odd.append((self.count, text))
                elif kind not in b"+:,#(":
                    raise ProtocolError(f"no RESP reply: {data[pos : pos + 40]!r}")
                pos = eol + 2
            left -= 1
            if not left:
                self.count += 1
        self._open = left

    def _keep(self, tail: bytes) -> None:
        """Keep the begin of a line until the rest of it comes."""
        if tail and (len(tail) > MAX_LINE or tail[0] not in b"+-:,#($=_*~>%"):
            raise ProtocolError(f"no RESP reply: {tail[:40]!r}")
        self._tail = tail

    @staticmethod
    def _length(digits: bytes) -> int:
        try:
            length = int(digits)
        except ValueError:
            length = MAX_RESPONSE + 1
        if not -1 <= length <= MAX_RESPONSE:
            raise ProtocolError(f"no RESP reply: length {digits[:40]!r}")
        return length


Replies = ImdsReplies | RespReplies
COUNTERS: dict[str, type[ImdsReplies] | type[RespReplies]] = {"imds": ImdsReplies, "resp": RespReplies}


def exchange(sock: socket.socket, protocol: str, frame: bytes, count: int = 1) -> Replies:
    """Send ``frame``, which holds ``count`` requests, on a blocking socket; return what was counted.

    Raises OSError (a timeout included) and ProtocolError.
    """
    replies = COUNTERS[protocol]()
    sock.sendall(frame)
    while replies.count < count:
        data = sock.recv(RECV)
        if not data:
            raise ConnectionError("connection closed by the server")
        replies.feed(data)
    return replies
