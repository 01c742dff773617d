"""Transactions: ``multi`` queues, ``exec`` sends the queue to one shard in one request.

::

    watch k      -> shard  _watch ROUTER CLIENT k     -> a version; any change of k raises it
    multi           the client is captive: each request is checked and queued here
    set k 1         QUEUED
    exec         -> shard  _exec ROUTER CLIENT 1 k VERSION <frame of set k 1>
                                  -> a list with the reply to each, or missing if k has changed

What stays true:

* The keys of a transaction and those that are watched for it have one slot, so one shard runs all of it in
  one batch: nothing comes in between, and it is undone as a whole if the log does not take it.
* As in Redis, a request that cannot be queued makes ``exec`` answer EXECABORT; one that fails when it is run
  does not keep the others from running.
* A version names the shard's process, so what happened before a shard's death never seems unchanged after it.
* Whatever a client has watched is forgotten by the shard: at exec, discard, unwatch, or when the client goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from imds.commands import UNKNOWN_COMMAND, Spread
from imds.protocol import ERROR, MAX_REQUEST, decode_response, encode_error, encode_request
from imds.router.kernel import Client
from imds.router.replies import DONE, QUEUED, WRONG_ARITY, listed
from imds.router.request import CROSS_SLOT, Request, unheard

if TYPE_CHECKING:
    from imds.router.requests import Requests

_UNKNOWN_COMMAND = encode_error(UNKNOWN_COMMAND)
_NESTED = encode_error("ERR MULTI calls can not be nested")
_WATCH_INSIDE = encode_error("ERR WATCH inside MULTI is not allowed")
_EXEC_WITHOUT = encode_error("ERR EXEC without MULTI")
_DISCARD_WITHOUT = encode_error("ERR DISCARD without MULTI")
_ABORTED = encode_error("EXECABORT Transaction discarded because of previous errors.")
_NOT_ALLOWED = encode_error("ERR Command not allowed inside a transaction")
_TOO_LARGE = encode_error(f"ERR the transaction is larger than a request may be, {MAX_REQUEST} bytes")

QUEUEABLE = (Spread.KEY, Spread.KEYS, Spread.SLOT)


@dataclass(slots=True)
class Queue:
    """What a client has queued since its ``multi``."""

    slot: int | None  # of its keys, once there is one
    frames: list[bytes] = field(default_factory=list)
    size: int = 0
    write: bool = False
    failed: bool = False


@dataclass(slots=True)
class Watched:
    """The keys that a client watches, all of one slot, each with the version that it was seen in."""

    slot: int
    versions: dict[bytes, bytes] = field(default_factory=dict)


class Transactions:
    """The handlers of multi, exec, discard, watch and unwatch, and of every request in between."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        requests.handlers |= {
            "multi": self._multi,
            "exec": self._exec,
            "discard": self._discard,
            "watch": self._watch,
            "unwatch": self._unwatch,
        }

    def queue(self, request: Request) -> bytes | None:
        """Answer a request of a client that has said ``multi``: most are queued."""
        queue, command = request.session.queue, request.command
        if command is None:
            return self._fail(queue, _UNKNOWN_COMMAND)
        if not command.arity_ok(len(request.tokens)):
            return self._fail(queue, WRONG_ARITY)
        if command.name in ("multi", "exec", "discard", "watch", "unwatch", "quit"):
            return self._requests.handlers[command.name](request)
        if command.spread not in QUEUEABLE:
            return self._fail(queue, _NOT_ALLOWED)
        slots = {
            self._requests.slots.slot_of(request.tokens[position])
            for position in command.key_positions(request.tokens)
        }
        if queue.slot is not None:
            slots.add(queue.slot)
        if len(slots) > 1:
            return self._fail(queue, CROSS_SLOT)
        queue.slot = next(iter(slots), None)
        queue.size += len(request.frame) + 4
        if queue.size > MAX_REQUEST:
            queue.frames.clear()
            return self._fail(queue, _TOO_LARGE)
        if not queue.failed:
            queue.frames.append(request.frame)
        queue.write |= command.write
        return QUEUED

    @staticmethod
    def _fail(queue: Queue, reply: bytes) -> bytes:
        queue.failed = True
        return reply

    def _multi(self, request: Request) -> bytes:
        session = request.session
        if session.queue is not None:
            return _NESTED
        session.queue = Queue(session.watched.slot if session.watched else None)
        request.client.captive = True
        return DONE

    def _exec(self, request: Request) -> bytes | None:
        session = request.session
        queue, watched = session.queue, session.watched
        if queue is None:
            return _EXEC_WITHOUT
        self._end(request.client)
        if queue.failed:
            self._forget(request.client)
            return _ABORTED
        if queue.slot is None and not queue.frames:
            return listed([])
        session.watched = None  # the shard forgets them by itself
        versions = watched.versions if watched else {}
        words = [word for pair in versions.items() for word in pair]
        requests = self._requests
        words += queue.frames
        frame = encode_request([b"_exec", *requests.who(request.client), b"%d" % len(versions), *words])
        # Without a key all of it is wrong, and any shard will say how.
        shard = 0 if queue.slot is None else requests.slots.owners[queue.slot]
        requests.ask(shard, frame, queue.write, lambda reply, _lost: requests.answer(request, reply))
        requests.choke(request.client, shard)
        return None

    def _discard(self, request: Request) -> bytes:
        if request.session.queue is None:
            return _DISCARD_WITHOUT
        self._end(request.client)
        self._forget(request.client)
        return DONE

    @staticmethod
    def _end(client: Client) -> None:
        client.owner.session.queue = None
        client.captive = False

    # -- watching ---------------------------------------------------------------------------------

    def _watch(self, request: Request) -> bytes | None:
        session, requests = request.session, self._requests
        if session.queue is not None:
            return _WATCH_INSIDE
        keys = request.tokens[1:]
        slots = {requests.slots.slot_of(key) for key in keys}
        if session.watched:
            slots.add(session.watched.slot)
        if len(slots) > 1:
            return CROSS_SLOT
        slot = slots.pop()
        known = session.watched.versions if session.watched else {}
        new = [key for key in dict.fromkeys(keys) if key not in known]
        if not new:
            return DONE
        session.waits = request
        frame = encode_request([b"_watch", *requests.who(request.client), *new])
        requests.ask(requests.slots.owners[slot], frame, False, partial(self._watching, request, slot, new))
        return None

    def _watching(self, request: Request, slot: int, keys: list[bytes], reply: bytes, _lost: bool) -> None:
        session = request.session
        decoded = decode_response(reply)
        if decoded is not None and decoded[0] != ERROR:
            if session.watched is None:
                session.watched = Watched(slot)
            session.watched.versions.update(dict.fromkeys(keys, decoded[1]))
            reply = DONE
            if session.gone:
                self._forget(request.client)
        self._requests.answer(request, reply)
        self._requests.wake(request.client)

    def _unwatch(self, request: Request) -> bytes:
        if request.session.queue is not None:
            return DONE  # as in Redis: too late to matter
        self._forget(request.client)
        return DONE

    def _forget(self, client: Client) -> None:
        session, requests = client.owner.session, self._requests
        if session.watched is not None:
            frame = encode_request([b"_unwatch", *requests.who(client), *session.watched.versions])
            requests.ask(requests.slots.owners[session.watched.slot], frame, False, unheard)
            session.watched = None

    def leave(self, client: Client) -> None:
        """The client is gone."""
        client.owner.session.queue = None
        self._forget(client)
