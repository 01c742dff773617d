"""Transactions in a shard: what a router asks by ``_watch``, ``_unwatch`` and ``_exec``.

::

    _watch ROUTER CLIENT key ...        the version of these keys, from now on
    _unwatch ROUTER CLIENT key ...      OK
    _exec ROUTER CLIENT n  key version ... (n times)  frame ...
                                        a list with one element for each frame: status word and payload of its
                                        reply; missing if a key has changed

An ``_exec`` is one request of a batch, so nothing runs in between, and what it did is undone with the batch.
Its effects are one record of the log: after a crash, a power cut too, all of them are there, or none. If they
are too large for one, nothing is done. Its watches end with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from imds.protocol import (
    LIST,
    MAX_RESPONSE,
    MISSING,
    OK,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
)
from imds.shard.record import MAX_EFFECT
from imds.shard.watches import Watches

SHORT = 128  # bytes of a reply that is given however long the others are

_DONE = encode_response(OK, b"OK")
_CHANGED = encode_response(MISSING)
_TOO_LARGE = encode_error(
    f"EXECABORT Transaction discarded because its effects are more than {MAX_EFFECT} bytes."
)
_TOO_LONG = encode_error("ERR the replies to this transaction are too long together")[4:]


class Store(Protocol):
    """What runs requests in the midst of a batch: see ``UnifiedStore``."""

    def run(self, frame: bytes, /) -> bytes: ...
    def together(self, act: Callable[[], bytes], /) -> bytes | None: ...


class Transactions:
    """Answers the hooks. ``store`` returns the shard's."""

    def __init__(self, store: Callable[[], Store], watches: Watches) -> None:
        self._store = store
        self._watches = watches
        self.max_response = MAX_RESPONSE - (64 << 10)

    def on_watch(self, arguments: list[bytes]) -> bytes:
        """Start to watch."""
        router, client, *keys = arguments
        self._expire(keys)
        return encode_response(OK, self._watches.watch(router, client, keys))

    def on_unwatch(self, arguments: list[bytes]) -> bytes:
        """End it."""
        router, client, *keys = arguments
        self._watches.unwatch(router, client, keys)
        return _DONE

    def on_exec(self, arguments: list[bytes]) -> bytes:
        """Run a transaction, unless a watched key has changed."""
        router, client, count, *words = arguments
        frames_at = 2 * int(count)
        keys, versions = words[:frames_at:2], words[1:frames_at:2]
        self._expire(keys)
        self._watches.look()
        unchanged = all(map(self._watches.unchanged, keys, versions))
        self._watches.unwatch(router, client, keys)
        if not unchanged:
            return _CHANGED
        return self._store().together(lambda: self._run(words[frames_at:])) or _TOO_LARGE

    def _run(self, frames: list[bytes]) -> bytes:
        run = self._store().run
        replies = []
        size = 0
        for frame in frames:
            reply = run(frame)[4:]
            if len(reply) > SHORT and size + len(reply) > self.max_response:
                reply = _TOO_LONG
            size += len(reply) + 4
            replies.append(reply)
        return encode_response(LIST, encode_list(replies))

    def _expire(self, keys: list[bytes]) -> None:
        """Have those removed, and logged, of which the time is over, though nobody has looked at them."""
        run = self._store().run
        for key in keys:
            run(encode_request([b"exists", key]))
