"""Clients that wait for a key to have something: what a router asks by ``_block`` and ``_cancel``.

::

    _block ROUTER number end key ...    [key, member, score] at once, or missing: the client waits
    _cancel ROUTER number               OK: no notice about it follows
    notice popped number key member score

What stays true:

* Who waits for a key is served in the order in which the shard was asked, whatever router that came by: at
  the end of the batch that put something there, and before a later ``_block`` can take it.
* What is popped for a client is in the same batch of the log as what made it possible, and the notice leaves
  after it, as replies do.
* A client that waits costs nothing while no key that somebody waits for is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imds.protocol import (
    LIST,
    MISSING,
    OK,
    decode_list,
    decode_response,
    encode_list,
    encode_request,
    encode_response,
)
from imds.shard.watches import touched

_DONE = encode_response(OK, b"OK")
_NONE = encode_response(MISSING)
_COMMANDS = {b"min": b"zpopmin", b"max": b"zpopmax"}


@dataclass(frozen=True, slots=True)
class Waiter:
    """One client that waits; ``number`` is its router's name for it."""

    router: bytes
    number: bytes
    end: bytes
    keys: tuple[bytes, ...]


class Waiting:
    """Answers the hooks, and serves who waits. ``run`` executes a request frame, returns its reply frame."""

    def __init__(self, run: Callable[[bytes], bytes]) -> None:
        self._run = run
        self._waiters: dict[tuple[bytes, bytes], Waiter] = {}
        self._queues: dict[bytes, dict[Waiter, None]] = {}  # by key, in order
        self._new: list[Waiter] = []  # that have begun to wait in this batch
        self._served: dict[Waiter, bytes] = {}  # in this batch, with the notice's request frame

    def __bool__(self) -> bool:
        return bool(self._waiters or self._new)

    def on_block(self, arguments: list[bytes]) -> bytes:
        """Pop from the first key that has something and for which nobody waits, or let the client wait."""
        router, number, end, *keys = arguments
        waiter = Waiter(router, number, end, tuple(dict.fromkeys(keys)))
        for key in waiter.keys:
            if key not in self._queues:
                reply, popped = self._pop(end, key)
                if popped:
                    return encode_response(LIST, encode_list([key, *popped]))
                if reply[4:8] == b"\0\0\0\2":
                    return reply
        self._waiters[router, number] = waiter
        self._new.append(waiter)
        for key in waiter.keys:
            self._queues.setdefault(key, {})[waiter] = None
        return _NONE

    def on_cancel(self, arguments: list[bytes]) -> bytes:
        """Let a client wait no longer."""
        waiter = self._waiters.get((arguments[0], arguments[1]))
        if waiter is not None:
            self._remove(waiter)
        return _DONE

    def leave(self, router: bytes) -> None:
        """A router is gone, and all its clients with it."""
        for waiter in [one for one in self._waiters.values() if one.router == router]:
            self._served.pop(waiter, None)
            self._remove(waiter)

    def serve(self, records: bytes) -> None:
        """At the end of a batch with these effects: pop for those who wait for what it touched."""
        for key in self._queues.keys() & touched(records, self._queues):
            for waiter in self._queues[key]:
                if waiter in self._served:
                    continue
                _reply, popped = self._pop(waiter.end, key)
                if not popped:
                    break
                self._served[waiter] = encode_request([b"popped", waiter.number, key, *popped])

    def end_batch(self) -> list[tuple[bytes, bytes]]:
        """The batch is in the log: return who is to be told (router, request frame of the notice)."""
        self._new.clear()
        served, self._served = self._served, {}
        for waiter in served:
            self._remove(waiter)
        return [(waiter.router, frame) for waiter, frame in served.items()]

    def undo_batch(self) -> None:
        """It is not, and nothing was popped: its requests are run once more."""
        self._served.clear()
        for waiter in self._new:
            if self._waiters.get((waiter.router, waiter.number)) is waiter:
                self._remove(waiter)
        self._new.clear()

    def _pop(self, end: bytes, key: bytes) -> tuple[bytes, list[bytes]]:
        """Return the reply frame, and member and score if there are any."""
        reply = self._run(encode_request([_COMMANDS[end], key]))
        decoded = decode_response(reply)
        assert decoded is not None
        found = decode_list(decoded[1]) if decoded[0] == LIST else []
        return reply, [item for item in found if item is not None]

    def _remove(self, waiter: Waiter) -> None:
        del self._waiters[waiter.router, waiter.number]
        for key in waiter.keys:
            queue = self._queues[key]
            del queue[waiter]
            if not queue:
                del self._queues[key]

    def check(self) -> None:
        """Assert that each waiter stands in the queues of its keys, and nobody else does. O(waiters)."""
        assert not self._served, self._served
        expected = {(key, waiter) for waiter in self._waiters.values() for key in waiter.keys}
        found = {(key, waiter) for key, queue in self._queues.items() for waiter in queue}
        assert found == expected, (found, expected)
        assert all(self._queues.values()), self._queues
