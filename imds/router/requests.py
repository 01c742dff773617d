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
from functools import partial
from typing import Any

from imds.commands import Command, Spread
from imds.hashslots import SlotMap
from imds.protocol import ProtocolError, decode_request, encode_error
from imds.router.blocking import Blocking
from imds.router.connection import ConnectionCommands
from imds.router.fanout import Fanout, split
from imds.router.gather import Gather, ShardStatus
from imds.router.kernel import RETRY, UNKNOWN_OUTCOME, Asked, Client, Switch
from imds.router.peers import Peers
from imds.router.request import CROSS_SLOT, Handler, Host, Reply, Request
from imds.router.server import ServerCommands
from imds.router.transactions import Transactions

LOOK_EVERY = 0.05  # seconds between two looks at what has waited too long


class Requests:
    """Answers the switch's questions. ``host`` is the router, ``number`` its own, by which shards know it."""

    def __init__(
        self,
        switch: Switch,
        slots: SlotMap,
        statuses: list[ShardStatus],
        host: Host,
        *,
        number: int,
        backlog_limit: int,
    ) -> None:
        self.switch = switch
        self.slots = slots
        self.statuses = statuses
        self.host = host
        self.touch = host.touch
        self.number = b"%d" % number
        self.handlers: dict[str, Callable[[Request], bytes | None]] = {}
        self.peers = Peers(host, number)
        self.transactions = Transactions(self)
        self.blocking = Blocking(self)
        ConnectionCommands(self)
        ServerCommands(self)
        self._look_at = 0.0
        self._backlog_limit = backlog_limit
        self._gathers: set[Gather] = set()
        self._silent: set[int] = set()  # shards that owe an answer which nobody waits for any more

    # -- from the router --------------------------------------------------------------------------

    def take(self, turn: Any, client: Client, command: Command | None, frame: bytes) -> None:
        """Answer a question of the switch, and those behind it, as far as they need not wait."""
        self._go_on(client, [(turn, client, command, frame)])

    def _go_on(self, client: Client, questions: list[Asked]) -> None:
        session = client.owner.session
        session.handling = True
        while questions:
            self._handle(Request(*questions[0]))
            if session.waits is not None:
                break
            questions = self.switch.resume(client)
        session.handling = False
        self.touch(client)

    def wake(self, client: Client) -> None:
        """What held up a client's requests is over."""
        session = client.owner.session
        session.waits = None
        if not session.handling:
            self._go_on(client, self.switch.resume(client))

    def on_end(self, client: Client) -> None:
        """A client will send nothing more. What it has sent is answered, but nothing is waited for."""
        client.owner.session.ended = True
        self.blocking.leave(client)

    def leave(self, client: Client) -> None:
        """A client is gone."""
        client.owner.session.gone = True
        self.on_end(client)
        self.transactions.leave(client)

    def on_raised(self, shard: int) -> None:
        """There is a new stream to a shard."""
        self.blocking.on_raised(shard)

    def on_notice(self, shard: int, frame: bytes) -> bool:
        """Act on what a shard tells unasked; return whether that can be true."""
        try:
            tokens, end = decode_request(frame) or ([], 0)
        except ProtocolError:
            return False
        if end != len(frame) or len(tokens) != 5 or tokens[0] != b"popped" or not tokens[1].isdigit():
            return False
        self.blocking.on_popped(shard, tokens[1], tokens[2:])
        return True

    def drain(self) -> None:
        """The router stops: answer what waits."""
        self.blocking.drain()

    @property
    def busy(self) -> bool:
        """Whether :meth:`on_time` has to be called now and then."""
        return bool(self._gathers or self.blocking or self.peers)

    def on_time(self) -> None:
        """Give up what has been waited for too long."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        self.blocking.on_time()
        self.peers.on_time()
        for gather in [one for one in self._gathers if now >= one.deadline]:
            self._finish(gather)

    # -- to the shards ----------------------------------------------------------------------------

    def down_reply(self, shard: int) -> bytes:
        """Return what the keys of a shard that is down are answered."""
        return encode_error(f"SHARDDOWN shard {shard} cannot be reached: {self.statuses[shard].note}")

    def who(self, client: Client) -> tuple[bytes, bytes]:
        """Return by what shards know a client."""
        return self.number, b"%d" % client.owner.session.number

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
        self.choke(request.client, shard)

    def _forwarded(self, request: Request, reply: bytes, _lost: bool) -> None:
        self.answer(request, reply)

    def choke(self, client: Client, shard: int) -> None:
        if self.switch.backlog(shard) > self._backlog_limit:
            client.choked = shard

    def answer(self, request: Request, reply: bytes) -> None:
        """Give a request its reply frame."""
        client = self.switch.answer(request.turn, reply)
        if client is not None:
            self.touch(client)

    # -- by spread --------------------------------------------------------------------------------

    def _handle(self, request: Request) -> None:
        command = request.command
        if request.session.queue is not None:
            self._answer_by(request, self.transactions.queue)
        elif command is None or command.name in self.handlers:
            assert command is not None
            self._answer_by(request, self.handlers[command.name])
        elif command.spread is Spread.ALL:
            self.gather(command, request.frame, partial(self.answer, request))
        elif command.spread is Spread.KEYS:
            self._fan_out(request, command)
        else:
            self._to_slot(request, command)

    def _answer_by(self, request: Request, handler: Handler) -> None:
        reply = handler(request)
        if reply is not None:
            self.answer(request, reply)

    def _fan_out(self, request: Request, command: Command) -> None:
        tokens = request.tokens
        parts = split(command, tokens, request.frame, self.slots)
        if len(parts) == 1:
            self.forward(request, next(iter(parts)))
            return
        fanout = Fanout(command, [tokens[index] for index in command.key_positions(tokens)], parts)
        for shard, part in parts.items():
            self.ask(shard, part.frame, command.write, partial(self._fanned_in, request, fanout, shard))
            self.choke(request.client, shard)

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
