"""The client protocol, both directions, without I/O.

::

    request    +---------+----------+-------+----------+-------+ ...
               | ntokens | length 0 | bytes | length 1 | bytes |
               +---------+----------+-------+----------+-------+ ...
                   u32       u32                u32                all integers big-endian, unsigned

    response   +--------+--------+---------+
               | length | status | payload |          length counts status and payload
               +--------+--------+---------+
                  u32      u32

    list       +-------+----------+-------+ ...       the payload of a response with status LIST;
               | count | length 0 | bytes |           length 0xFFFFFFFF is a missing element
               +-------+----------+-------+ ...

Clients of this protocol exist, so nothing here may change a byte of it.

The rules that every decoder in this file keeps: it takes a buffer and a position and returns what it
found, or None for "more bytes are needed", or raises :class:`ProtocolError` when no bytes to come could
make the input right; it allocates nothing by an announced length.

Touch a limit here, then update the README's table of limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 6677

# Status words of a response.
OK = 0  # the payload is the answer
MISSING = 1  # there is none; the payload is empty
ERROR = 2  # the payload is a text that begins with a code in capitals
LIST = 3  # the payload is a list

# A command with a million tokens is a bulk load in one request; more is a mistake or an attack.
MAX_TOKENS = 1 << 20
# A request in bytes, headers included. Large enough for any sane value, small enough that the
# buffers of a few hostile clients fit in memory.
MAX_REQUEST = 64 << 20
# A response in bytes, as a client accepts it: a list may gather many values.
MAX_RESPONSE = 1 << 30

NO_ELEMENT = 0xFFFFFFFF  # the length of a missing list element

U32 = Struct(">I")
U32U32 = Struct(">II")

Buffer = bytes | bytearray | memoryview
Response = tuple[int, bytes]


class ProtocolError(ValueError):
    """The bytes cannot be a frame of this protocol, whatever follows them."""


class FrameScan:
    """How far the search for the end of one request frame has come.

    A large frame arrives in many pieces. Looking at every token again for each piece would cost
    O(pieces x tokens), so the scan stands still at the first header that has not arrived and goes on
    from there. Offsets count from the start of the frame.

    ``need`` is the number of bytes below which another :meth:`advance` is in vain.
    """

    __slots__ = ("left", "max_request", "max_tokens", "need", "pos")

    def __init__(self, max_tokens: int = MAX_TOKENS, max_request: int = MAX_REQUEST) -> None:
        self.max_tokens = max_tokens
        self.max_request = max_request
        self.reset()

    def reset(self) -> None:
        """Stand at the start of the next frame."""
        self.left = -1  # tokens whose header has not been read; -1: ntokens itself has not
        self.pos = 0  # where the next header begins
        self.need = 4

    def advance(self, buf: Buffer, start: int, end: int) -> int | None:
        """Return the frame's length in bytes, or None while ``buf[start:end]`` is only a part of it.

        Raises ProtocolError once a count or length over the limit has been announced.
        Costs O(1) for each token header that has newly arrived.
        """
        have = end - start
        pos, left = self.pos, self.left
        if left < 0:
            if have < 4:
                return None
            (left,) = U32.unpack_from(buf, start)
            if left > self.max_tokens:
                raise ProtocolError(
                    f"ERR protocol error: {left} tokens announced, the limit is {self.max_tokens}"
                )
            pos = 4
        while left and pos + 4 <= have:
            (length,) = U32.unpack_from(buf, start + pos)
            pos += 4 + length
            left -= 1
            if pos > self.max_request:
                raise ProtocolError(
                    f"ERR protocol error: request of {pos} bytes or more announced, "
                    f"the limit is {self.max_request}"
                )
        self.pos, self.left = pos, left
        self.need = pos + 4 if left else pos
        if left or pos > have:
            return None
        self.reset()
        return pos


def encode_request(tokens: Sequence[bytes]) -> bytes:
    """Return the request frame of ``tokens``."""
    parts = [U32.pack(len(tokens))]
    for token in tokens:
        parts.append(U32.pack(len(token)))
        parts.append(token)
    return b"".join(parts)


def split_request(frame: Buffer, start: int = 0) -> tuple[list[bytes], int]:
    """Return the tokens of the whole frame at ``start`` and where the frame ends.

    The caller has made sure that the frame is whole (by :class:`FrameScan`, or a checksum).
    """
    (count,) = U32.unpack_from(frame, start)
    pos = start + 4
    tokens = []
    for _ in range(count):
        (length,) = U32.unpack_from(frame, pos)
        pos += 4
        tokens.append(bytes(frame[pos : pos + length]))
        pos += length
    return tokens, pos


def decode_request(
    buf: Buffer, start: int = 0, *, max_tokens: int = MAX_TOKENS, max_request: int = MAX_REQUEST
) -> tuple[list[bytes], int] | None:
    """Return the tokens of the request at ``start`` and where it ends, or None if it is cut short.

    Raises ProtocolError for a count or length over the limit.
    """
    if FrameScan(max_tokens, max_request).advance(buf, start, len(buf)) is None:
        return None
    return split_request(buf, start)


def encode_response(status: int, payload: bytes = b"") -> bytes:
    """Return the response frame of ``status`` and ``payload``."""
    return U32U32.pack(4 + len(payload), status) + payload


def encode_error(text: str) -> bytes:
    """Return the response frame of an error; ``text`` begins with its code in capitals."""
    return encode_response(ERROR, text.encode())


def encode_list(items: Iterable[bytes | None]) -> bytes:
    """Return the payload of a LIST response; None is a missing element."""
    parts = [b""]
    count = 0
    for item in items:
        count += 1
        if item is None:
            parts.append(U32.pack(NO_ELEMENT))
        else:
            parts.append(U32.pack(len(item)))
            parts.append(item)
    parts[0] = U32.pack(count)
    return b"".join(parts)


def decode_response(
    buf: Buffer, start: int = 0, *, max_response: int = MAX_RESPONSE
) -> tuple[int, bytes, int] | None:
    """Return status, payload and end of the response at ``start``, or None if it is cut short.

    Raises ProtocolError for a length that no response has (under 4, or over ``max_response``).
    """
    if len(buf) - start < 4:
        return None
    (length,) = U32.unpack_from(buf, start)
    if not 4 <= length <= max_response:
        raise ProtocolError(f"response of {length} bytes announced, the limit is {max_response}")
    end = start + 4 + length
    if len(buf) < end:
        return None
    (status,) = U32.unpack_from(buf, start + 4)
    return status, bytes(buf[start + 8 : end]), end


def decode_list(payload: Buffer) -> list[bytes | None]:
    """Return the elements of a LIST payload. Raises ProtocolError where it is not exactly a list."""
    try:
        (count,) = U32.unpack_from(payload, 0)
        pos = 4
        if count * 4 > len(payload) - 4:
            raise ProtocolError(f"list of {count} elements in {len(payload)} bytes")
        items: list[bytes | None] = []
        for _ in range(count):
            (length,) = U32.unpack_from(payload, pos)
            pos += 4
            if length == NO_ELEMENT:
                items.append(None)
                continue
            if length > len(payload) - pos:
                raise ProtocolError("list element runs past the end of its payload")
            items.append(bytes(payload[pos : pos + length]))
            pos += length
    except Exception as error:
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError("list payload is cut short") from None
    if pos != len(payload):
        raise ProtocolError(f"{len(payload) - pos} bytes after the end of a list")
    return items
