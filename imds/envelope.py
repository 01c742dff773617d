"""What travels between a router and a shard.

One envelope carries what one client's turn has for one shard, so its header is paid per turn and not per
request. All integers are big-endian and unsigned::

    to a shard    +--------+--------+-------+---------+----------------------------+
                  | length | ticket | count | dialect | count request frames       |
                  +--------+--------+-------+---------+----------------------------+
                     u32      u32      u32      u32      as the client sent them

    back          +--------+--------+-------+-------------------------------+
                  | length | ticket | count | count replies in that dialect |
                  +--------+--------+-------+-------------------------------+
                     u32      u32      u32

    notice        +--------+--------+-------+---------------+
                  | length | number |   0   | request frame |          what the shard tells unasked
                  +--------+--------+-------+---------------+
                     u32      u32      u32

``length`` counts what follows it. Tickets rise by one for each envelope of a link (modulo 2^32) and come
back in the order in which they went: the router checks each one, so that a reply can never reach the
wrong request. Notices are numbered by themselves, from 0 on each link, and stand between replies. A shard
runs an envelope only when all of it has arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from imds.protocol import Buffer

REQUEST = Struct(">IIII")
REPLY = Struct(">III")
LENGTH = 4  # bytes of the length field, which does not count itself

DIALECT_IMDS = 0  # replies are response frames of imds/protocol.py

TICKETS = 1 << 32


def seal(ticket: int, count: int, frames: bytes, dialect: int = DIALECT_IMDS) -> bytes:
    """Return the envelope that carries ``count`` request frames to a shard."""
    return REQUEST.pack(12 + len(frames), ticket, count, dialect) + frames


def notice(number: int, frame: bytes) -> bytes:
    """Return the envelope by which a shard tells a router something unasked."""
    return REPLY.pack(8 + len(frame), number % TICKETS, 0) + frame


def envelopes(buf: Buffer) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (ticket, count, dialect, start, end) of each whole request envelope's frames in ``buf``."""
    pos, size = 0, len(buf)
    while size - pos >= REQUEST.size:
        length, ticket, count, dialect = REQUEST.unpack_from(buf, pos)
        end = pos + LENGTH + length
        if end > size:
            return
        yield ticket, count, dialect, pos + REQUEST.size, end
        pos = end


def refuse(buf: Buffer, reply: bytes) -> tuple[int, bytes]:
    """Answer each request in the whole envelopes of ``buf`` by ``reply``; return (bytes used, replies)."""
    used = 0
    out = []
    for ticket, count, _dialect, _start, end in envelopes(buf):
        out.append(REPLY.pack(8 + count * len(reply), ticket, count))
        out.append(reply * count)
        used = end
    return used, b"".join(out)
