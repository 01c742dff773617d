"""``bzpopmin`` and ``bzpopmax``: clients that wait until there is something to take.

The queue of those who wait is the shard's (imds/shard/waiting.py); the router knows who they are::

    bzpopmin k 5  --> shard  _block ROUTER number min k     at once [k, member, score], or missing: it waits
                  <-- shard  notice: popped number k member score
    5 s are over  --> shard  _cancel ROUTER number          OK: and no notice will come

What stays true:

* A client that waits holds up nobody but itself: what it has sent behind waits, its link's replies go on.
* What a shard has given reaches the client, also if its time is over meanwhile. If the client is gone by
  then, it is put back. Lost is only what a connection that breaks swallows, or a process that dies in that
  moment.
* When a shard is back after its death, those who wait for its keys are put into its queue again, in the order
  in which they came to this router.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from imds.protocol import LIST, MISSING, decode_list, decode_response, encode_error, encode_request
from imds.router.kernel import Client
from imds.router.replies import NONE, listed
from imds.router.request import CROSS_SLOT, Request, unheard

if TYPE_CHECKING:
    from imds.router.requests import Requests

AGAIN_AFTER = 0.1  # seconds until a shard that was not there, or loading, is asked again
PASSING = (b"LOADING", b"SHARDDOWN", b"RETRY", b"READONLY")  # errors that a client that waits is spared
LONGEST = 1e9  # seconds

_BAD_TIMEOUT = encode_error("ERR timeout is not a float or out of range")
_NEGATIVE_TIMEOUT = encode_error("ERR timeout is negative")


@dataclass(eq=False, slots=True)
class Waiter:
    """A client that waits."""

    number: int
    request: Request
    frame: bytes  # of its _block
    shard: int
    deadline: float
    asked: bool = False  # an answer of the shard is under way
    waits: bool = False  # it has been told to wait
    over: bool = False  # its time is over, or its client gone
    again_at: float = math.inf


class Blocking:
    """The handlers of the blocking commands, and who waits."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._waiters: dict[int, Waiter] = {}  # by number, in order
        self._last = 0
        self._draining = False
        requests.handlers |= {
            "bzpopmin": partial(self._bzpop, b"min"),
            "bzpopmax": partial(self._bzpop, b"max"),
        }

    def __bool__(self) -> bool:
        return bool(self._waiters)

    def _bzpop(self, end: bytes, request: Request) -> bytes | None:
        requests, tokens = self._requests, request.tokens
        slots = {requests.slots.slot_of(key) for key in tokens[1:-1]}
        if len(slots) > 1:
            return CROSS_SLOT
        try:
            timeout = float(tokens[-1])
        except ValueError:
            return _BAD_TIMEOUT
        if timeout < 0:
            return _NEGATIVE_TIMEOUT
        if not timeout < LONGEST:
            return _BAD_TIMEOUT
        self._last += 1
        waiter = Waiter(
            self._last,
            request,
            encode_request([b"_block", requests.number, b"%d" % self._last, end, *tokens[1:-1]]),
            requests.slots.owners[slots.pop()],
            time.monotonic() + timeout if timeout else math.inf,
        )
        request.session.waits = waiter
        self._waiters[waiter.number] = waiter
        self._block(waiter)
        return None

    # -- with the shard ---------------------------------------------------------------------------

    def _block(self, waiter: Waiter) -> None:
        waiter.asked = True
        waiter.again_at = math.inf
        self._requests.ask(waiter.shard, waiter.frame, True, partial(self._blocked, waiter))

    def _blocked(self, waiter: Waiter, reply: bytes, _lost: bool) -> None:
        decoded = decode_response(reply)
        assert decoded is not None
        status, payload, _ = decoded
        waiter.asked = False
        if status == LIST:
            self._give(waiter, reply)
        elif status == MISSING:
            waiter.waits = True
            if waiter.over or self._draining:
                self._cancel(waiter)
        elif waiter.waits and payload.partition(b" ")[0] in PASSING:
            waiter.again_at = time.monotonic() + AGAIN_AFTER
            if waiter.over or self._draining:
                self._end(waiter, NONE)
        else:
            self._end(waiter, reply)

    def on_popped(self, shard: int, number: bytes, items: list[bytes]) -> None:
        """A shard has popped ``items``, key, member and score, for the client of that number."""
        waiter = self._waiters.get(int(number))
        if waiter is None or waiter.shard != shard:
            self._put_back(shard, items)
        else:
            self._give(waiter, listed(items))

    def _give(self, waiter: Waiter, reply: bytes) -> None:
        if waiter.request.session.ended:
            decoded = decode_response(reply)
            assert decoded is not None
            self._put_back(waiter.shard, [item or b"" for item in decode_list(decoded[1])])
            reply = NONE
        self._end(waiter, reply)

    def _put_back(self, shard: int, items: list[bytes]) -> None:
        key, member, score = items
        self._requests.ask(shard, encode_request([b"zadd", key, b"nx", score, member]), True, unheard)

    def _cancel(self, waiter: Waiter) -> None:
        """End the waiting; until the shard knows that, it may still give something."""
        waiter.over = True
        if waiter.asked:
            return
        if waiter.again_at < math.inf:  # the shard does not know of it
            self._end(waiter, NONE)
            return
        waiter.asked = True
        frame = encode_request([b"_cancel", self._requests.number, b"%d" % waiter.number])
        self._requests.ask(waiter.shard, frame, False, partial(self._cancelled, waiter))

    def _cancelled(self, waiter: Waiter, _reply: bytes, _lost: bool) -> None:
        if waiter.number in self._waiters:
            self._end(waiter, NONE)

    def _end(self, waiter: Waiter, reply: bytes) -> None:
        del self._waiters[waiter.number]
        self._requests.answer(waiter.request, reply)
        self._requests.wake(waiter.request.client)

    # -- from the router --------------------------------------------------------------------------

    def on_raised(self, shard: int) -> None:
        """A shard is back: it knows nobody who waits."""
        for waiter in [one for one in self._waiters.values() if one.shard == shard]:
            if not waiter.asked:
                self._block(waiter)

    def on_time(self) -> None:
        """End what has waited long enough, and ask again what could not be asked."""
        now = time.monotonic()
        for waiter in list(self._waiters.values()):
            if now >= waiter.deadline and not waiter.over:
                self._cancel(waiter)
            elif now >= waiter.again_at:
                self._block(waiter)

    def leave(self, client: Client) -> None:
        """The client is gone, or will at least send nothing more."""
        waiter = client.owner.session.waits
        if isinstance(waiter, Waiter) and not waiter.over:
            self._cancel(waiter)

    def drain(self) -> None:
        """The router stops: nobody waits any longer."""
        self._draining = True
        for waiter in list(self._waiters.values()):
            if not waiter.over:
                self._cancel(waiter)
