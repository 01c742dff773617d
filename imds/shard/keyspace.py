"""What a command is made of: the operations that both stores offer, and how a command is written over them.

A command that is not on the hot path is written once, in Python (``strings.py``, ``keys.py``, ``zsets.py``,
``zalgebra.py``), for the Python store and the compiled one. What always holds:

* A command is a function of a :class:`Keyspace` and the request's tokens behind the name. It returns what it
  answers (see :func:`encode`), or raises :class:`Refused`.
* Each operation here that changes something makes room for it, logs it and notes how to undo it. A command
  that is refused, or for whose reply there is no room, is undone as a whole: it has no effect at all.
* All effects of one command are one record of the log: after a crash all of them are there, or none.
* A key whose deadline has come is not there: no operation sees it.

The effects, which are all that a log ever holds::

    set key value                    it has no deadline then
    setrange key offset bytes
    del key
    pexpireat key ms                 milliseconds since 1970
    persist key
    rename key to
    zadd key score member            score as repr() writes it, or as the client did
    zrem key member
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from imds.protocol import LIST, MAX_REQUEST, MISSING, OK, encode_error, encode_list, encode_response

Pair = tuple[float, bytes]
Item = bytes | int | float | None
Answer = Item | list[Item] | list[bytes] | list[bytes | None]

# Bytes of a key and its string together: what one request can set. Redis' limit is 512 MiB.
MAX_STRING = MAX_REQUEST - 64
# Elements of a reply that are drawn with repetition: nothing else bounds their number.
MAX_DRAWN = 1 << 20


class Refused(Exception):
    """The command answers an error: ``reply`` is its response frame."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply)
        self.reply = reply


class Keyspace(Protocol):
    """The operations of a store. They raise Refused for want of room, or for the other kind of value."""

    now: int  # milliseconds since 1970, the same for a whole batch

    @property
    def keys(self) -> int:
        """How many keys there are; some may have met their deadline and be still there."""

    def kind(self, key: bytes) -> str | None:
        """Return ``string``, ``zset`` or None.

        Alone of these, with ``deadline``, ``memory``, ``idle`` and ``recent``, it does not count as use.
        """

    def touch(self, key: bytes) -> bool:
        """Make the key the most recently used; return whether it is there."""

    def remove(self, key: bytes) -> bool:
        """Remove the key; return whether it was there."""

    def move(self, key: bytes, to: bytes) -> None:
        """Give what ``key`` holds, which is there, another key, with its deadline.

        O(1), and a string's length.
        """

    def deadline(self, key: bytes) -> int | None:
        """Return the key's deadline in milliseconds since 1970, 0 if it has none, None if there is no key."""

    def set_deadline(self, key: bytes, when: int) -> None:
        """Give the key, which is there, a deadline in the future, or none by 0.

        O(log n) of those that have one.
        """

    def memory(self, key: bytes) -> int | None:
        """Return the bytes that the key is counted with, or None."""

    def idle(self, key: bytes) -> int | None:
        """Return the seconds since the key's last use, or None. What was never used counts from the load.

        They may be up to 1/256 more than the truth, never less.
        """

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Return the next cursor and about ``count`` keys; start with 0, end at 0.

        A cursor is below 2^48. A key that is there from start to end is returned, once or more often; so it
        is with others that come and go. Across a restart of the process a scan may miss keys.
        """

    def random_key(self) -> bytes | None:
        """Return a key by chance, nearly all alike; it may have met its deadline. None if there is none."""

    def recent(self, count: int) -> list[bytes]:
        """Return the ``count`` keys that were used last, latest first, less what is over. O(count)."""

    def flush(self) -> None:
        """Remove every key. O(keys)."""

    def string(self, key: bytes) -> bytes | None:
        """Return the string, or None if there is no key."""

    def put(self, key: bytes, value: bytes, when: int = 0) -> None:
        """Make the key hold a string, whatever it held before, with this deadline; 0 for none."""

    def write_at(self, key: bytes, offset: int, data: bytes) -> int:
        """Overwrite a part of the string, which grows with zero bytes as need be; return its length.

        O(length).
        """

    def members(self, key: bytes) -> int:
        """Return how many members the sorted set has, 0 if there is no key."""

    def zscore(self, key: bytes, member: bytes) -> float | None:
        """Return the member's score, or None."""

    def zplace(self, key: bytes, score: float, member: bytes = b"") -> int:
        """Return how many pairs come before (score, member). O(log n)."""

    def zslice(self, key: bytes, start: int, stop: int) -> list[Pair]:
        """Return the pairs from rank ``start`` to before ``stop``, neither below 0.

        O(log n) and the pairs returned.
        """

    def zput(self, key: bytes, score: float, member: bytes) -> None:
        """Add the member, or move it. O(log n)."""

    def ztake(self, key: bytes, member: bytes) -> bool:
        """Remove the member; with its last one the key is gone. Return whether it was there. O(log n)."""

    def zscan(self, key: bytes, cursor: int, count: int) -> tuple[int, list[Pair]]:
        """Return the next cursor and about ``count`` pairs, as :meth:`scan` does keys."""


Function = Callable[..., Answer]
F = TypeVar("F", bound=Function)

# Every command's function, by its name.
FUNCTIONS: dict[str, Function] = {}


def command(function: F) -> F:
    """Register a command under the function's name, without the underscore that keeps it off Python's own."""
    FUNCTIONS[function.__name__.removesuffix("_")] = function
    return function


def encode(answer: Answer) -> bytes:
    """Return the response frame.

    None is missing, bytes are themselves, a number is its text, a list is a list.
    """
    if answer is None:
        return _NONE
    if isinstance(answer, list):
        return encode_response(LIST, encode_list(map(_text, answer)))
    return encode_response(OK, _text(answer) or b"")


def _text(item: Item) -> bytes | None:
    if item is None or isinstance(item, bytes):
        return item
    return b"%d" % item if isinstance(item, int) else repr(item).encode()


def error(text: str) -> Refused:
    """Return the refusal that says ``text``, which begins with a code in capitals."""
    return Refused(encode_error(text))


_NONE = encode_response(MISSING)
