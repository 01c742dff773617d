"""The requests that are not simply forwarded: those of several keys or shards, and those of the router.

A request's way::

    switch --question--> take --> a handler --ask--> shards
                                      ^                 |
                                      +---- replies ----+
                                      |
    switch <----------answer----------+

What stays true:

* The switch stops behind each question, so that requests of one client are executed in their order. It goes
  on when the handler has handed out what there is to do; a handler that needs more sets ``session.waits``.
* Each request is answered exactly once, also when shards die: every :meth:`Requests.ask` is called back,
  at once if the shard is down.
* A client that is gone is answered into the void: handlers need not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from imds.commands import Command, Spread
from imds.hashslots import SlotMap
from imds.protocol import encode_error, split_request
from imds.router.fanout import Fanout, split
from imds.router.gather import Gather, ShardStatus
from imds.router.kernel import RETRY, UNKNOWN_OUTCOME, Client, Switch
from imds.router.session import Session

CROSS_SLOT = encode_error("CROSSSLOT Keys in request don't hash to the same slot")

Reply = Callable[[bytes, bool], None]  # takes a reply frame, and whether it is about a dead shard


@dataclass(eq=False)
class Request:
    """One question of the switch."""

    turn: Any
    client: Client
    command: Command | None
    frame: bytes

    @cached_property
    def tokens(self) -> list[bytes]:
        """The request's tokens, the name included."""
        return split_request(self.frame)[0]

    @property
    def session(self) -> Session:
        """What is known of the connection."""
        return self.client.owner.session  # type: ignore[no-any-return]


class Requests:
    """Answers the switch's questions. ``touch`` is called with a client that has news for the router."""

    def __init__(
        self,
        switch: Switch,
        slots: SlotMap,
        statuses: list[ShardStatus],
        touch: Callable[[Client], None],
        *,
        backlog_limit: int,
    ) -> None:
        self.switch = switch
        self.slots = slots
        self.statuses = statuses
        self._touch = touch
        self._backlog_limit = backlog_limit
        self._gathers: set[Gather] = set()
        self._silent: set[int] = set()  # shards that owe an answer which nobody waits for any more

    # -- from the router --------------------------------------------------------------------------

    def take(self, turn: Any, client: Client, command: Command | None, frame: bytes) -> None:
        """Answer a question of the switch, and those behind it, as far as they need not wait."""
        self._go_on(client, [(turn, client, command, frame)])

    def _go_on(self, client: Client, questions: list[Any]) -> None:
        while questions:
            request = Request(*questions[0])
            self._handle(request)
            if request.session.waits is not None:
                break
            questions = self.switch.resume(client)
        self._touch(client)

    def wake(self, client: Client) -> None:
        """What held up a client's requests is over."""
        client.owner.session.waits = None
        self._go_on(client, self.switch.resume(client))

    @property
    def busy(self) -> bool:
        """Whether :meth:`on_time` has to be called now and then."""
        return bool(self._gathers)

    def on_time(self) -> None:
        """Give up what has been waited for too long."""
        now = time.monotonic()
        for gather in [one for one in self._gathers if now >= one.deadline]:
            self._finish(gather)

    # -- to the shards ----------------------------------------------------------------------------

    def down_reply(self, shard: int) -> bytes:
        """Return what the keys of a shard that is down are answered."""
        return encode_error(f"SHARDDOWN shard {shard} cannot be reached: {self.statuses[shard].note}")

    def ask(self, shard: int, frame: bytes, write: bool, then: Reply) -> None:
        """Send a shard a request; ``then`` gets its reply, or an error if the shard is down or dies."""
        if self.switch.is_up(shard):
            self.switch.ask(shard, frame, partial(self._answered, write, then))
        else:
            then(self.down_reply(shard), True)

    @staticmethod
    def _answered(write: bool, then: Reply, reply: bytes | None, sent: bool = True) -> None:
        """The token of every :meth:`ask`: the router calls it with the reply, or with None and ``sent``."""
        if reply is not None:
            then(reply, False)
        else:
            then(UNKNOWN_OUTCOME if write and sent else RETRY, True)

    def forward(self, request: Request, shard: int) -> None:
        """Have a shard answer a request as it is."""
        assert request.command is not None
        self.ask(shard, request.frame, request.command.write, partial(self._forwarded, request))
        self._choke(request.client, shard)

    def _forwarded(self, request: Request, reply: bytes, _lost: bool) -> None:
        self.answer(request, reply)

    def _choke(self, client: Client, shard: int) -> None:
        if self.switch.backlog(shard) > self._backlog_limit:
            client.choked = shard

    def answer(self, request: Request, reply: bytes) -> None:
        """Give a request its reply frame."""
        client = self.switch.answer(request.turn, reply)
        if client is not None:
            self._touch(client)

    # -- by spread --------------------------------------------------------------------------------

    def _handle(self, request: Request) -> None:
        command = request.command
        assert command is not None
        if command.spread is Spread.ALL:
            self.gather(command, request.frame, partial(self.answer, request))
        elif command.spread is Spread.KEYS:
            self._fan_out(request, command)
        else:
            self._to_slot(request, command)

    def _fan_out(self, request: Request, command: Command) -> None:
        tokens = request.tokens
        parts = split(command, tokens, request.frame, self.slots)
        if len(parts) == 1:
            self.forward(request, next(iter(parts)))
            return
        fanout = Fanout(command, [tokens[index] for index in command.key_positions(tokens)], parts)
        for shard, part in parts.items():
            self.ask(shard, part.frame, command.write, partial(self._fanned_in, request, fanout, shard))
            self._choke(request.client, shard)

    def _fanned_in(self, request: Request, fanout: Fanout, shard: int, reply: bytes, _lost: bool) -> None:
        combined = fanout.take(shard, reply)
        if combined is not None:
            self.answer(request, combined)

    def _to_slot(self, request: Request, command: Command) -> None:
        keys = [request.tokens[position] for position in command.key_positions(request.tokens)]
        slots = {self.slots.slot_of(key) for key in keys}
        if len(slots) > 1:
            self.answer(request, CROSS_SLOT)
        else:  # without a key the request is wrong, and any shard will say how
            self.forward(request, self.slots.owners[slots.pop()] if slots else 0)

    def gather(self, command: Command, frame: bytes, done: Callable[[bytes], None]) -> None:
        """Ask every shard; ``done`` is called with the reply frame that the answers make."""
        up = {shard for shard in range(self.slots.shards) if self.switch.is_up(shard)}
        silent = self._silent.copy()  # these are not asked again: their questions would pile up
        gather = Gather.of(done, command, up - silent, silent)
        self._gathers.add(gather)
        for shard in sorted(up - silent):
            self.ask(shard, frame, command.write, partial(self._gathered, gather, shard))
        if not gather.waiting:
            self._finish(gather)

    def _gathered(self, gather: Gather, shard: int, reply: bytes, lost: bool) -> None:
        self._silent.discard(shard)
        unsaid = lost and not gather.command.write
        if gather in self._gathers and gather.take(shard, None if unsaid else reply):
            self._finish(gather)

    def _finish(self, gather: Gather) -> None:
        self._gathers.discard(gather)
        self._silent |= gather.waiting
        gather.done(gather.reply(self.statuses))
