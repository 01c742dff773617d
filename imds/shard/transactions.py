"""Transactions in a shard: what a router asks by ``_watch``, ``_unwatch`` and ``_exec``.

::

    _watch ROUTER CLIENT key ...        the version of these keys, from now on
    _unwatch ROUTER CLIENT key ...      OK
    _exec ROUTER CLIENT n  key version ... (n times)  frame ...
                                        a list with one element for each frame: status word and payload of its
                                        reply; missing if a key has changed

An ``_exec`` is one request of a batch, so nothing runs in between, and what it did is undone with the batch.
Its watches end with it.
"""

from __future__ import annotations

from collections.abc import Callable

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
from imds.shard.watches import Watches

SHORT = 128  # bytes of a reply that is given however long the others are

_DONE = encode_response(OK, b"OK")
_CHANGED = encode_response(MISSING)
_TOO_LONG = encode_error("ERR the replies to this transaction are too long together")[4:]


class Transactions:
    """Answers the hooks. ``run`` executes one request frame in the batch and returns its reply frame."""

    def __init__(self, run: Callable[[bytes], bytes], watches: Watches) -> None:
        self._run = run
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
        replies = []
        size = 0
        for frame in words[frames_at:]:
            reply = self._run(frame)[4:]
            if len(reply) > SHORT and size + len(reply) > self.max_response:
                reply = _TOO_LONG
            size += len(reply) + 4
            replies.append(reply)
        return encode_response(LIST, encode_list(replies))

    def _expire(self, keys: list[bytes]) -> None:
        """Have those removed, and logged, of which the time is over, though nobody has looked at them."""
        for key in keys:
            self._run(encode_request([b"exists", key]))
