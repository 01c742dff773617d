"""UnifiedStore: one keyspace of strings and sorted sets, with an exact LRU over both.

What always holds (:meth:`UnifiedStore.check` asserts what can be asserted afterwards):

* A key holds a string (bytes) or a sorted set that has a member; never an empty set.
* The table is in the order of use: a command that finds its key makes it the most recently used, whatever
  it then answers. Eviction takes the least recently used key other than the command's own.
* ``_last`` has the second of each key's last use, by a clock that begins with the first time that the store
  is told, and goes on as ``now`` does: when that falls back, no time has passed. So seconds never fall in
  the order of use, and what was replayed has the second 0.
* ``used`` is the sum of what keys and values are counted with, kept in O(1) by each change.
* An effect is in the log, and what it replaced in the undo list, in the order in which effects were
  applied; an eviction stands before the write that needed its room. A command that answers an error, and
  one that changes nothing, has no effect.
* ``log`` and undo list begin at the same point: :meth:`commit` and :meth:`rollback` end both.
* A key whose deadline has come is removed, and that logged, by whoever looks at it; while writes are refused
  it is merely not there for anybody. ``_due`` is a heap of (deadline, key) with all that ``_deadlines`` has,
  and with what was once true, which is passed over when it comes to the top.

A batch's way through the shard::

    envelopes --> execute --> replies                  held back until the effects are in the file
                     |
                     +------> log.pending() --> file   then commit(), and the replies may go
                     +------> undo list                or rollback(), when the file did not take them

No client can make :meth:`UnifiedStore.execute` raise, and no reply is ever lost: each request of an envelope
gets one. What is in an envelope's own header comes from a router, and a wrong one raises ValueError.

Long for one file, as undo list, accounting and order of use are kept by every command here. The compiled twin
is ``_kernel/store.pyx``; the suite in ``tests/shard`` runs on both, and compares them.
The forms of commands that are most frequent are here, and in the twin: HOT. All others are functions over the
operations of ``keyspace.py``, written once. Touch a command here, then touch its row in ``commands.py`` and
its twin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf
from operator import itemgetter
from random import randrange
from struct import Struct
from struct import error as StructError
from typing import TypeVar

from xxhash import xxh64_intdigest

from imds import commands, envelope
from imds.commands import COMMANDS, Command, lookup
from imds.protocol import (
    MAX_RESPONSE,
    MISSING,
    OK,
    U32,
    U32U32,
    Buffer,
    encode_error,
    encode_request,
    encode_response,
)
from imds.shard import expiry, keys, strings, zalgebra, zsets  # noqa: F401  (they register their commands)
from imds.shard.arguments import parse_integer, parse_score
from imds.shard.keyspace import FUNCTIONS, MAX_STRING, Function, Pair, Refused, encode
from imds.shard.record import HEADER, RecordEncoder, each_record, pack_effects, split_effect
from imds.shard.sortedset import SortedSet

# Bytes that CPython takes (measured by tracemalloc over 10^5 keys, as tests/shard/test_store.py does).
KEY_COST = 168  # the key's bytes object without its text, its entry in OrderedDict, its list, and a dict
VALUE_COST = 40  # the value's bytes object without its text, with what the allocator rounds up
DEADLINE_COST = 200  # an entry of a dict, a number, a pair in a heap

PART = 100  # pairs of a sorted set that are saved at a time

# Requests in one envelope. Their least replies stay far below the 4 GiB that an envelope's length can say.
MAX_COUNT = 1 << 24

# Bytes of a reply that is sent however long the others of its envelope are: any write's, any error's.
SHORT = 128

Value = bytes | SortedSet

_DONE = encode_response(OK, b"OK")
_NONE = encode_response(MISSING)
_WRONG_TYPE = encode_error(commands.WRONG_TYPE)
_BAD_SCORE = encode_error(commands.BAD_SCORE)
_OUT_OF_MEMORY = encode_error(commands.OUT_OF_MEMORY)
_TOO_LARGE = encode_error(commands.TOO_LARGE)
_UNKNOWN_COMMAND = encode_error(commands.UNKNOWN_COMMAND)
_WRONG_ARITY = encode_error(commands.WRONG_ARITY)
_MALFORMED = encode_error("ERR malformed request")
_TOO_LONG = encode_error("ERR the replies to these pipelined requests are too long together")

# How the two hottest requests begin: the number of tokens, the name with its length; then the key's length.
_GET = b"\0\0\0\2\0\0\0\3get"
_SET = b"\0\0\0\3\0\0\0\3set"
_PEEK = Struct(">11sI")

_DOUBLE = Struct(">d")
_u32 = U32.unpack_from

# The forms that the store answers itself, as their replies were before there were others: name, tokens.
HOT = {"get": 2, "set": 3, "del": 2, "zadd": 4, "zrange": 4, "zrank": 3, "zrem": 3}


class UnifiedStore:
    """The data of one shard. ``log`` takes the effects of :meth:`execute`.

    ``capacity`` (keys) and ``maxmemory`` (counted bytes) are this shard's share, 0 for no limit; with
    ``evict`` a write makes room by removing the least recently used keys, without it the write is refused.
    ``hooks`` answer the commands that are about the process and not about its data, and what a router asks on
    its own behalf under a name that no client's command has: name to a function that takes the arguments and
    returns a whole response frame.

    ``now`` is the time in milliseconds since 1970, which the owner of the store sets before each batch; what
    has a deadline that is not later is gone. ``expirations`` counts those.
    ``readonly`` is None, or the response frame (an error) that writes answer instead of being run.
    ``max_response`` bounds the replies to one envelope together, in bytes; the short ones of writes and
    errors may go beyond it.
    """

    def __init__(
        self,
        log: RecordEncoder,
        *,
        capacity: int = 0,
        maxmemory: int = 0,
        evict: bool = False,
        hooks: Mapping[str, Callable[[list[bytes]], bytes]] | None = None,
    ) -> None:
        self.log = log
        self.capacity = capacity
        self.maxmemory = maxmemory
        self.evict = evict
        self.readonly: bytes | None = None
        self.max_response = MAX_RESPONSE
        self.used = 0
        self.ops = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.expirations = 0
        self.now = 0
        self._table: OrderedDict[bytes, Value] = OrderedDict()
        self._deadlines: dict[bytes, int] = {}
        self._due: list[tuple[int, bytes]] = []
        self._last: dict[bytes, int] = {}
        self._clock = 0  # milliseconds
        self._second = 0  # of it
        self._seen = 0  # the ``now`` that it was moved on by
        # What rollback puts back, newest last: (key, what it held or None, deadline), or (set, member,
        # score or None).
        self._undo: list[tuple[bytes, Value | None, int] | tuple[SortedSet, bytes, float | None]] = []
        self._evicted = 0  # since the last commit
        self._expired = 0
        self._frames: list[bytes] | None = (
            None  # the effects of the running function, which become one record
        )
        self._reading = False  # a function that is no write runs
        self._room = 0  # bytes that its reply may have
        self._order: list[tuple[int, bytes]] = []  # what the scans that are under way go through
        self._unsaved: list[bytes] | None = None  # what is still to be saved, last first; None: nothing is
        self.unmet = 0
        # Each command with what runs its hot form, and what its others; both usual spellings at once.
        self._fast: dict[bytes, tuple[Command, Callable[..., bytes] | None, Function | None]] = {
            spelling: (command, getattr(self, f"cmd_{name}") if name in HOT else None, FUNCTIONS.get(name))
            for name, command in COMMANDS.items()
            if name in HOT or name in FUNCTIONS
            for spelling in (name.encode(), name.upper().encode())
        }
        # How requests of a hot form in lower case begin: number of tokens, name with its length.
        # Each leads to its method, the number of arguments, and whether it is a write.
        self._heads = {
            U32U32.pack(tokens, len(name)) + name.encode(): (
                getattr(self, f"cmd_{name}"),
                tokens - 1,
                COMMANDS[name].write,
            )
            for name, tokens in HOT.items()
        }
        self._hooks = dict(hooks or {})

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return len(self._table)

    # ---- batches -------------------------------------------------------------------------------------

    def execute(self, data: Buffer) -> tuple[int, bytes]:
        """Run the whole envelopes in ``data``; return how many bytes they took, and the reply envelopes.

        An envelope that is cut short is left for the next call. Raises ValueError if ``data`` begins with an
        envelope that no router makes; envelopes before such a one are run and answered first.
        """
        if type(data) is not bytes:
            data = bytes(data)
        peek, pack = _PEEK.unpack_from, U32U32.pack
        table, limit, timed = self._table, self.max_response, self._deadlines
        find, touch, last = table.get, table.move_to_end, self._last
        heads, u32 = self._heads, _u32
        arguments: list[bytes] = []
        out: list[bytes] = []
        emit = out.append
        pos, size, hits = 0, len(data), 0
        self._tick()
        second = self._second
        while size - pos >= envelope.REQUEST.size:
            length, ticket, count, dialect = envelope.REQUEST.unpack_from(data, pos)
            end = pos + envelope.LENGTH + length
            if count > MAX_COUNT or count * 4 > length - 12 or dialect != envelope.DIALECT_IMDS:
                if pos:
                    break
                header = data[: envelope.REQUEST.size]
                raise ValueError(f"no router sends an envelope that begins with {header!r}")
            if end > size:
                break
            self.ops += count
            reply_header = len(out)
            emit(b"")
            total = 0  # bytes of the replies so far
            at = pos + envelope.REQUEST.size
            for done in range(count):
                key_at = at + _PEEK.size
                reply = None
                if key_at <= end:
                    head, key_size = peek(data, at)
                    if head == _GET and (stop := key_at + key_size) <= end:
                        key = data[key_at:stop]
                        value = find(key)
                        if (
                            type(value) is bytes
                            and total + (here := len(value) + 8) <= limit
                            and key not in timed
                        ):
                            hits += 1
                            touch(key)
                            last[key] = second
                            total += here
                            emit(pack(here - 4, OK))
                            emit(value)
                            at = stop
                            continue
                        reply = self.cmd_get(b"", key)
                    elif (
                        head == _SET and (value_at := key_at + key_size + 4) <= end and self.readonly is None
                    ):
                        stop = value_at + u32(data, value_at - 4)[0]
                        if stop <= end:
                            reply = self.cmd_set(
                                data[at:stop], data[key_at : value_at - 4], data[value_at:stop]
                            )
                    elif (found := heads.get(data[at : at + 8 + data[at + 7]])) is not None:
                        method, left, write = found
                        stop = at + 8 + data[at + 7]
                        arguments.clear()
                        while left and (start := stop + 4) <= end:
                            stop = start + u32(data, stop)[0]
                            arguments.append(data[start:stop])
                            left -= 1
                        if not left and stop <= end and not (write and self.readonly is not None):
                            reply = method(data[at:stop] if write else b"", *arguments)
                if reply is None:
                    tokens, stop = _tokens(data, at, end)
                    if stop < 0:
                        total += len(_MALFORMED) * (count - done)
                        emit(_MALFORMED * (count - done))
                        break
                    self.hits += hits  # a hook may want to know
                    hits = 0
                    self._room = max(limit - total, SHORT)
                    reply = self._answer(data[at:stop], tokens)
                if total + len(reply) > limit and len(reply) > SHORT:
                    reply = _TOO_LONG
                total += len(reply)
                emit(reply)
                at = stop
            out[reply_header] = envelope.REPLY.pack(8 + total, ticket, count)
            pos = end
        self.hits += hits
        return pos, b"".join(out)

    def run(self, frame: bytes) -> bytes:
        """Run one request, given as its frame, in the midst of the batch: for hooks; return the reply frame.

        Its effects share the batch's commit or rollback. ``max_response`` bounds its reply alone.
        """
        tokens, stop = _tokens(frame, 0, len(frame))
        if stop != len(frame):
            return _MALFORMED
        room, self._room = self._room, max(self.max_response, SHORT)
        reply = self._answer(frame, tokens)
        self._room = room
        return _TOO_LONG if len(reply) > self.max_response and len(reply) > SHORT else reply

    def together(self, act: Callable[[], bytes]) -> bytes | None:
        """Return what ``act`` returns, who may :meth:`run` requests: all their effects are one record.

        None if they are too large for one: nothing has happened then.
        """
        undo, evicted, expired, place = len(self._undo), self._evicted, self._expired, self.log.place()
        reply = act()
        if self.log.join(place):
            return reply
        self._undo_to(undo, evicted, expired)
        self.log.cut(place)
        return None

    def _answer(self, frame: bytes, tokens: list[bytes]) -> bytes:
        """Run one request, given as frame and as tokens; return the reply frame."""
        if not tokens:
            return _UNKNOWN_COMMAND
        name = tokens[0]
        found = self._fast.get(name)
        if found is None:
            known = lookup(name)
            found = self._fast.get(known.name.encode()) if known else None
            if found is None:
                return self._hook(known, tokens)
        command, method, function = found
        if not command.arity_ok(len(tokens)):
            return _WRONG_ARITY
        if command.write and self.readonly is not None:
            return self.readonly
        if method is not None and len(tokens) == HOT[command.name]:
            if command.write and not name.islower():
                frame = frame[:8] + name.lower() + frame[8 + len(name) :]
            return method(frame, *tokens[1:])
        assert function is not None
        return self._call(command, function, tokens)

    def _call(self, command: Command, function: Function, tokens: list[bytes]) -> bytes:
        """Run a command's function; it has all of its effects, as one record, or none.

        Return the reply frame.
        """
        undo, evicted, expired = len(self._undo), self._evicted, self._expired
        frames = self._frames = []
        self._reading = not command.write
        try:
            reply = encode(function(self, *tokens[1:]))
            if len(reply) <= self._room:
                for effect in pack_effects(frames):
                    self.log.add(effect)
                return reply
            reply = _TOO_LONG
        except Refused as refused:
            reply = refused.reply
        finally:
            self._reading = False
            self._frames = None
        self._undo_to(undo, evicted, expired)
        return reply

    def _hook(self, command: Command | None, tokens: list[bytes]) -> bytes:
        """Answer what is no command of the store; ``command`` is None where it is none of the table."""
        hook = self._hooks.get(command.name if command else tokens[0].decode(errors="replace"))
        if hook is None:
            return _UNKNOWN_COMMAND
        if command is not None and not command.arity_ok(len(tokens)):
            return _WRONG_ARITY
        return hook(tokens[1:])

    # ---- commands: (the request's frame in canonical spelling, its arguments) to a reply frame ------------

    def cmd_get(self, _frame: bytes, key: bytes) -> bytes:
        """Return the string."""
        value = self._read(key)
        if value is None:
            return _NONE
        return encode_response(OK, value) if type(value) is bytes else _WRONG_TYPE

    def cmd_set(self, frame: bytes, key: bytes, value: bytes) -> bytes:
        """Make the key hold a string, whatever it held before."""
        table, timed = self._table, self._deadlines
        old = None if key in timed and self._is_over(key) else table.get(key)
        if old is not None:
            table.move_to_end(key)
        cost = KEY_COST + len(key) + VALUE_COST + len(value)
        if type(old) is bytes and key not in timed:  # mostly
            change = len(value) - len(old)
        else:
            change = cost if old is None else cost - self._cost(key, old)
        if (self.capacity or self.maxmemory) and (refusal := self._make_room(old is None, change, cost)):
            return refusal
        self._undo.append((key, old, timed.pop(key, 0) if timed else 0))
        self.log.add(frame)
        table[key] = value
        self._last[key] = self._second
        self.used += change
        return _DONE

    def cmd_del(self, frame: bytes, key: bytes) -> bytes:
        """Remove the key, whatever it holds."""
        if self._find(key) is None:
            return _NONE
        self.log.add(frame)
        self._drop(key)
        return _DONE

    def cmd_zadd(self, frame: bytes, key: bytes, text: bytes, member: bytes) -> bytes:
        """Add the member, or move it to another score."""
        score = parse_score(text)
        if score is None:
            return _BAD_SCORE
        value = self._find(key)
        if type(value) is bytes:
            return _WRONG_TYPE
        assert not isinstance(value, bytes)
        return self._put_member(key, value, score, member, frame) or _DONE

    def cmd_zrem(self, frame: bytes, key: bytes, member: bytes) -> bytes:
        """Remove the member; with its last member the set is gone."""
        value = self._find(key)
        if value is None:
            return _NONE
        if type(value) is bytes:
            return _WRONG_TYPE
        assert isinstance(value, SortedSet)
        score = value.score(member)
        if score is None:
            return _NONE
        self._take_member(key, value, score, member, frame)
        return _DONE

    def cmd_zrange(self, _frame: bytes, key: bytes, low_text: bytes, high_text: bytes) -> bytes:
        """Return ``score:member`` pairs, both bounds included."""
        low, high = parse_score(low_text), parse_score(high_text)
        if low is None or high is None:
            return _BAD_SCORE
        value = self._read(key)
        if value is None:
            return _NONE
        if type(value) is bytes:
            return _WRONG_TYPE
        assert isinstance(value, SortedSet)
        pairs = value.range(low, high)
        if not pairs:
            return _NONE
        return encode_response(OK, b",".join([b"%a:%b" % pair for pair in pairs]))

    def cmd_zrank(self, _frame: bytes, key: bytes, member: bytes) -> bytes:
        """Return the member's 0-based rank in decimal."""
        value = self._read(key)
        if value is None:
            return _NONE
        if type(value) is bytes:
            return _WRONG_TYPE
        assert isinstance(value, SortedSet)
        rank = value.rank(member)
        return _NONE if rank is None else encode_response(OK, b"%d" % rank)

    # ---- what these are made of ----------------------------------------------------------------------

    def _find(self, key: bytes) -> Value | None:
        """Return what ``key`` holds, and make it the most recently used."""
        if key in self._deadlines and self._is_over(key):
            return None
        value = self._table.get(key)
        if value is not None:
            self._table.move_to_end(key)
            self._last[key] = self._second
        return value

    def _read(self, key: bytes) -> Value | None:
        """The same, counted as a hit or a miss."""
        value = self._find(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def _put_member(
        self, key: bytes, value: SortedSet | None, score: float, member: bytes, frame: bytes
    ) -> bytes | None:
        """Add the member, or move it, with this effect if that changes anything.

        Return a refusal, or None.
        """
        new = SortedSet() if value is None else value
        old = new.score(member)
        if old == score:
            return None
        change = new.cost_of(member) if old is None else 0
        if value is None:
            change += KEY_COST + len(key) + new.used
        if self.capacity or self.maxmemory:
            alone = change if value is None else self._cost(key, new) + change
            if refusal := self._make_room(value is None, change, alone):
                return refusal
        self._undo.append((key, None, 0) if value is None else (new, member, old))
        self._log(frame)
        new.add(member, score)
        self._table[key] = new
        self._last[key] = self._second
        self.used += change
        return None

    def _take_member(self, key: bytes, value: SortedSet, score: float, member: bytes, frame: bytes) -> None:
        """Remove the member, which has this score, with this effect."""
        self._log(frame)
        if len(value) == 1:
            self._drop(key)
        else:
            self._undo.append((value, member, score))
            self.used -= value.cost_of(member)
            value.remove(member)

    def _cost(self, key: bytes, value: Value) -> int:
        """Return the bytes that ``key``, which holds ``value``, is counted with."""
        cost = KEY_COST + len(key) + (VALUE_COST + len(value) if isinstance(value, bytes) else value.used)
        return cost + DEADLINE_COST if key in self._deadlines else cost

    def _drop(self, key: bytes) -> None:
        """Remove ``key``, which is here, so that it can be put back."""
        value = self._table.pop(key)
        del self._last[key]
        self.used -= self._cost(key, value)
        self._undo.append((key, value, self._deadlines.pop(key, 0)))

    def _log(self, frame: bytes) -> None:
        """Log an effect: as a record, or as a part of the running function's."""
        if self._frames is None:
            self.log.add(frame)
        else:
            self._frames.append(frame)

    def _make_room(self, new: bool, change: int, alone: int) -> bytes | None:
        """Evict until a write fits that counts ``change`` bytes more; return a refusal, or None if it fits.

        ``new``: it adds a key. ``alone``: what its key will count afterwards. A key that is there already is
        the most recently used one, and it fits alone, so that the eviction stops before it.
        """
        capacity = self.capacity if new else 0
        maxmemory = self.maxmemory if change > 0 else 0
        table = self._table
        while (capacity and len(table) >= capacity) or (maxmemory and self.used + change > maxmemory):
            if maxmemory and alone > maxmemory:
                return _TOO_LARGE
            if not self.evict:
                return _OUT_OF_MEMORY
            self._evict()
        return None

    def _evict(self) -> None:
        """Remove the least recently used key."""
        key = next(iter(self._table))
        self._log(encode_request((b"del", key)))
        self._drop(key)
        self.evictions += 1
        self._evicted += 1

    # ---- deadlines -----------------------------------------------------------------------------------

    def _is_over(self, key: bytes) -> bool:
        """Whether the deadline of ``key`` has come; the key is removed then, if anything may be."""
        if self._deadlines[key] > self.now:
            return False
        if self.readonly is None:
            self._expire(key)
        return True

    def _expire(self, key: bytes) -> None:
        self._log(encode_request((b"del", key)))
        self._drop(key)
        self.expirations += 1
        self._expired += 1

    def _set_timer(self, key: bytes, when: int) -> None:
        """Note the deadline, 0 for none. O(log n)."""
        if not when:
            self._deadlines.pop(key, None)
            return
        self._deadlines[key] = when
        heappush(self._due, (when, key))
        if len(self._due) > 2 * len(self._deadlines) + 64:
            self._due = [(at, name) for name, at in self._deadlines.items()]
            heapify(self._due)

    @property
    def timed(self) -> int:
        """How many keys have a deadline."""
        return len(self._deadlines)

    @property
    def next_deadline(self) -> int:
        """The earliest deadline, 0 if there is none. O(log n) amortised."""
        due, deadlines = self._due, self._deadlines
        while due and deadlines.get(due[0][1]) != due[0][0]:
            heappop(due)
        return due[0][0] if due else 0

    def expire(self, most: int) -> int:
        """Remove, logged, up to ``most`` keys whose deadline has come, earliest first; return how many."""
        done = 0
        self._tick()
        while done < most and 0 < self.next_deadline <= self.now:
            self._expire(self._due[0][1])
            done += 1
        return done

    # ---- times of use --------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Move the clock on, to what ``now`` is."""
        if self._seen < self.now and self._seen:
            self._clock += self.now - self._seen
            self._second = self._clock // 1000
        self._seen = self.now

    def idle(self, key: bytes) -> int | None:
        """Return the seconds since the key's last use."""
        return None if self.kind(key) is None else self._second - self._last[key]

    # ---- the operations of keyspace.py ---------------------------------------------------------------

    def kind(self, key: bytes) -> str | None:
        """Return what the key holds."""
        if key in self._deadlines and self._is_over(key):
            return None
        value = self._table.get(key)
        if value is None:
            return None
        return "string" if isinstance(value, bytes) else "zset"

    def touch(self, key: bytes) -> bool:
        """Make the key the most recently used; return whether it is there."""
        return self._find(key) is not None

    def remove(self, key: bytes) -> bool:
        """Remove the key; return whether it was there."""
        if self._find(key) is None:
            return False
        self._log(encode_request((b"del", key)))
        self._drop(key)
        return True

    def move(self, key: bytes, to: bytes) -> None:
        """Give what ``key`` holds another key."""
        self._find(to)
        value = self._find(key)
        assert value is not None
        change = len(to) - len(key)
        self._admit(False, change, self._cost(key, value) + change)
        self._log(encode_request((b"rename", key, to)))
        if self._unsaved is not None:
            self._unsaved.append(to)
        if to in self._table:
            self._drop(to)
        when = self._deadlines.get(key, 0)
        self._drop(key)
        self._undo.append((to, None, 0))
        self._table[to] = value
        self._last[to] = self._second
        self._set_timer(to, when)
        self.used += self._cost(to, value)

    def deadline(self, key: bytes) -> int | None:
        """Return the deadline, 0 if there is none, None if there is no key."""
        if self.kind(key) is None:
            return None
        return self._deadlines.get(key, 0)

    def set_deadline(self, key: bytes, when: int) -> None:
        """Set the deadline, or remove it by 0."""
        value = self._find(key)
        assert value is not None
        old = self._deadlines.get(key, 0)
        if old == when:
            return
        change = DEADLINE_COST * (bool(when) - bool(old))
        self._admit(False, change, self._cost(key, value) + change)
        self._log(encode_request((b"pexpireat", key, b"%d" % when) if when else (b"persist", key)))
        self._undo.append((key, value, old))
        self._set_timer(key, when)
        self.used += change

    def memory(self, key: bytes) -> int | None:
        """Return what the key is counted with."""
        return None if self.kind(key) is None else self._cost(key, self._table[key])

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Go through the keys in the order of their hashes.

        ``_order`` is made anew by each scan that begins, and kept while one is under way: a key that has been
        there since any of them began is in it. O(n log n) for its first step.
        """
        if not cursor or not self._order:
            self._order = sorted((_position(key), key) for key in self._table)
        following, found = _page(self._order, cursor, count)
        if not following:
            self._order = []
        return following, [key for key in found if self.kind(key)]

    def random_key(self) -> bytes | None:
        """Return a key by chance. O(keys)."""
        return next(islice(self._table, randrange(self.keys), None)) if self.keys else None

    def recent(self, count: int) -> list[bytes]:
        """Return the keys that were used last, latest first."""
        found = list(islice(reversed(self._table), count))
        return [key for key in found if self.kind(key)]  # afterwards, as it may remove

    def flush(self) -> None:
        """Remove every key."""
        for key in list(self._table):
            self._log(encode_request((b"del", key)))
            self._drop(key)

    def string(self, key: bytes) -> bytes | None:
        """Return the string."""
        value = self._read(key) if self._reading else self._find(key)
        if value is not None and not isinstance(value, bytes):
            raise Refused(_WRONG_TYPE)
        return value

    def put(self, key: bytes, value: bytes, when: int = 0) -> None:
        """Make the key hold a string."""
        old = self._find(key)
        cost = KEY_COST + len(key) + VALUE_COST + len(value) + (DEADLINE_COST if when else 0)
        change = cost if old is None else cost - self._cost(key, old)
        self._admit(old is None, change, cost)
        self._undo.append((key, old, self._deadlines.pop(key, 0)))
        self._log(encode_request((b"set", key, value)))
        self._table[key] = value
        self._last[key] = self._second
        if when:
            self._log(encode_request((b"pexpireat", key, b"%d" % when)))
            self._set_timer(key, when)
        self.used += change

    def write_at(self, key: bytes, offset: int, data: bytes) -> int:
        """Overwrite a part of the string, which is there."""
        old = self._find(key)
        assert isinstance(old, bytes)
        new = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]
        change = len(new) - len(old)
        self._admit(False, change, self._cost(key, new))
        self._undo.append((key, old, self._deadlines.get(key, 0)))
        self._log(encode_request((b"setrange", key, b"%d" % offset, data)))
        self._table[key] = new
        self.used += change
        return len(new)

    def members(self, key: bytes) -> int:
        """Return how many members the sorted set has."""
        value = self._read(key) if self._reading else self._find(key)
        if isinstance(value, bytes):
            raise Refused(_WRONG_TYPE)
        return 0 if value is None else len(value)

    def _set(self, key: bytes) -> SortedSet | None:
        value = self._find(key)
        if isinstance(value, bytes):
            raise Refused(_WRONG_TYPE)
        return value

    def zscore(self, key: bytes, member: bytes) -> float | None:
        """Return the member's score."""
        value = self._set(key)
        return None if value is None else value.score(member)

    def zplace(self, key: bytes, score: float, member: bytes = b"") -> int:
        """Return how many pairs come before (score, member)."""
        value = self._set(key)
        return 0 if value is None else value.place(score, member)

    def zslice(self, key: bytes, start: int, stop: int) -> list[Pair]:
        """Return the pairs from rank ``start`` to before ``stop``."""
        value = self._set(key)
        return [] if value is None else value.slice(start, stop)

    def zput(self, key: bytes, score: float, member: bytes) -> None:
        """Add the member, or move it."""
        frame = encode_request((b"zadd", key, repr(score).encode(), member))
        if refusal := self._put_member(key, self._set(key), score, member, frame):
            raise Refused(refusal)

    def ztake(self, key: bytes, member: bytes) -> bool:
        """Remove the member."""
        value = self._set(key)
        score = None if value is None else value.score(member)
        if value is None or score is None:
            return False
        self._take_member(key, value, score, member, encode_request((b"zrem", key, member)))
        return True

    def zscan(self, key: bytes, cursor: int, count: int) -> tuple[int, list[Pair]]:
        """Go through the members in the order of their hashes. O(n log n) for each step."""
        value = self._set(key)
        pairs = [] if value is None else value.slice(0, len(value))
        return _page(sorted((_position(member), (score, member)) for score, member in pairs), cursor, count)

    def _admit(self, new: bool, change: int, alone: int) -> None:
        """Make room, as for ``_make_room``, or refuse."""
        if (self.capacity or self.maxmemory) and (refusal := self._make_room(new, change, alone)):
            raise Refused(refusal)

    # ---- the log's side ------------------------------------------------------------------------------

    def commit(self) -> None:
        """The effects since the last commit are in the file: they stay."""
        self._undo.clear()
        self._evicted = self._expired = 0
        self.log.commit()

    def rollback(self) -> None:
        """They are not: put back the data, and take the records back. O(effects)."""
        self._undo_to(0, 0, 0)
        self.log.rollback()

    def _undo_to(self, count: int, evicted: int, expired: int) -> None:
        """Put back the data, until ``count`` effects are left to undo."""
        table = self._table
        while len(self._undo) > count:
            undo = self._undo.pop()
            if isinstance(undo[0], bytes):
                key, value, when = undo
                now = table.pop(key, None)
                if now is not None:
                    self.used -= self._cost(key, now)
                    del self._last[key]
                    self._deadlines.pop(key, None)
                if value is not None:
                    table[key] = value
                    self._last[key] = self._second
                    self._set_timer(key, when)
                    self.used += self._cost(key, value)
            else:
                members, member, score = undo
                self.used -= members.used
                if score is None:
                    members.remove(member)
                else:
                    members.add(member, score)
                self.used += members.used
        self.evictions -= self._evicted - evicted
        self.expirations -= self._expired - expired
        self._evicted, self._expired = evicted, expired

    def replay(self, records: Buffer) -> int:
        """Apply the effects of ``records``, whole and verified; return how many records there are.

        Nothing is logged, limited, counted or undone by it, nothing meets its deadline, and nothing may wait
        for commit or rollback. Raises ValueError for a record that is no write of this version; those before
        it have been applied.

        An effect that needs a key that is not here does nothing, but a ``rename`` still removes what it would
        have replaced: in a base that is so for a key that comes further on (:meth:`save`). ``unmet`` counts
        them.
        """
        records = bytes(records)
        kept = self.log, self.capacity, self.maxmemory, self.readonly, self.now
        self.log, self.capacity, self.maxmemory, self.readonly, self.now = _NoLog(0), 0, 0, None, 0
        count = 0
        try:
            for number, start, end in each_record(records):
                value_at = _set_value(records, start, end)
                if value_at:  # most are
                    self.cmd_set(b"", records[start + _PEEK.size : value_at - 4], records[value_at:end])
                    self._undo.clear()
                    count += 1
                    continue
                frames = split_effect(records, start, end)
                if not frames or not all(map(_is_effect, frames)) or not all(map(self._apply, frames)):
                    effect = records[start : min(end, start + 60)]
                    raise ValueError(f"record {number} is no write of this version: {effect!r}")
                self._undo.clear()
                count += 1
        finally:
            self.log, self.capacity, self.maxmemory, self.readonly, self.now = kept
        return count

    def _apply(self, effect: list[bytes]) -> bool:
        """Apply one effect; return whether it can be one."""
        name, key, *rest = effect
        value = self._find(key)
        if name == b"set":
            self.put(key, rest[0])
        elif name == b"del":
            self.remove(key)
        elif name == b"zadd":
            score = parse_score(rest[0])
            if score is None or isinstance(value, bytes):
                return False
            self._put_member(key, value, score, rest[1], b"")
        elif name == b"zrem":
            if isinstance(value, bytes):
                return False
            self.ztake(key, rest[0])
        elif name == b"setrange":
            offset = parse_integer(rest[0])
            if offset is None or not 0 <= offset <= MAX_STRING or isinstance(value, SortedSet):
                return False
            if value is not None:
                self.write_at(key, offset, rest[1])
        elif name == b"rename":
            if key == rest[0]:
                return False
            if value is not None:
                self.move(key, rest[0])
            else:
                self.remove(rest[0])
        else:
            when = parse_integer(rest[0]) if rest else 0
            if when is None or when < bool(rest):
                return False
            if value is not None:
                self.set_deadline(key, when)
        self.unmet += value is None and name in NEEDY
        return True

    def enforce_limits(self) -> None:
        """Evict, logged, until the data is within its limits, if eviction is the policy."""
        while self.evict and (
            (self.capacity and len(self._table) > self.capacity)
            or (self.maxmemory and self.used > self.maxmemory)
        ):
            self._evict()

    # ---- the whole of the data -----------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[bytes, bytes | list[Pair], int]]:
        """Yield each key, its string or (score, member) pairs, and its deadline, least recently used first.

        A deadline is in milliseconds since 1970, 0 for none. Raises RuntimeError if a command runs in
        between.
        """
        when = self._deadlines.get
        for key, value in self._table.items():
            yield key, value if isinstance(value, bytes) else value.range(-inf, inf), when(key, 0)

    def save(self, log: RecordEncoder, room: int) -> Generator[None, None, None]:
        """Add to ``log`` the effects that make the data, least recently used key first.

        Yields after each ``room`` bytes or so, but for the last. In between commands may run, if their
        effects are added to ``log``, too, at once: then all of it together makes the data as they are at the
        end. The reason: a key that has been saved is in every respect what it is here; of one that has not,
        what has changed since is what it is here, and the rest is missing, until it is saved. So an effect
        may find a key missing, but never in a wrong state: see :meth:`replay`. A key that gets what another
        one held has still to be saved. O(keys) at the start; the compiled twin is not.

        Close the iterator if it is not exhausted. Raises RuntimeError if there is one already.
        """
        if self._unsaved is not None:
            raise RuntimeError("the data is being saved already")
        self._unsaved = unsaved = list(reversed(self._table))
        size = 0
        try:
            while unsaved:
                for part in self._parts(unsaved.pop()):
                    for effect in part:
                        log.add(effect)
                        size += HEADER.size + len(effect)
                    if size >= room:
                        yield
                        size = 0
        finally:
            self._unsaved = None

    def _parts(self, key: bytes) -> Iterator[list[bytes]]:
        """Yield the effects that make a key, if it is there, some at a time; in between it may change."""
        when = self._deadlines.get
        value = self._table.get(key)
        if isinstance(value, bytes):
            yield list(effects(key, value, when(key, 0)))
        place: Pair = -inf, b""
        while isinstance(value, SortedSet):
            start = value.place(*place)
            pairs = value.slice(start, start + PART + 1)
            if len(pairs) <= PART:
                yield list(effects(key, pairs, when(key, 0)))
                return
            place = pairs.pop()
            yield list(effects(key, pairs, 0))
            value = self._table.get(key)

    def digest(self) -> int:
        """Return 64 bits that are equal for equal data, whatever the order of use. O(data).

        The sum, modulo 2^64, of a chain of xxh64 for each key, each seeded by the one before::

            string       seed 1, key, value
            sorted set   seed 2, key, then for each member in order: score (IEEE 754, big-endian), member
            deadline     behind either: 8 bytes, big-endian
        """
        total = 0
        for key, value in self._table.items():
            if isinstance(value, bytes):
                chain = xxh64_intdigest(value, xxh64_intdigest(key, 1))
            else:
                chain = xxh64_intdigest(key, 2)
                for score, member in value.range(-inf, inf):
                    chain = xxh64_intdigest(member, xxh64_intdigest(_DOUBLE.pack(score), chain))
            if key in self._deadlines:
                chain = xxh64_intdigest(self._deadlines[key].to_bytes(8), chain)
            total += chain
        return total & 0xFFFF_FFFF_FFFF_FFFF

    def check(self) -> None:
        """Raise AssertionError unless the rules at the top of this file hold. O(data)."""
        state = f"{self.keys} keys, used {self.used}, {len(self._undo)} to undo"
        used = 0
        for key, value in self._table.items():
            if isinstance(value, SortedSet):
                assert len(value), f"{key!r} holds an empty set: {state}"
                value.check()
            used += self._cost(key, value)
        seconds = [self._last[key] for key in self._table]
        assert len(self._last) == self.keys, f"a time of use without a key: {state}"
        assert seconds == sorted(seconds), f"seconds that fall in the order of use: {state}"
        assert all(0 <= second <= self._second for second in seconds), f"a use to come: {state}"
        assert self._deadlines.keys() <= self._table.keys(), f"a deadline without a key: {state}"
        due = set(self._due)
        assert all((when, key) in due for key, when in self._deadlines.items()), f"a lost deadline: {state}"
        assert all(self._due[at] >= self._due[(at - 1) // 2] for at in range(1, len(self._due))), (
            f"the deadlines are no heap: {state}"
        )
        assert self._frames is None, f"a function that has not ended: {state}"
        assert not self._reading, f"a function that has not ended: {state}"
        assert used == self.used, f"counted {used}: {state}"
        assert 0 <= self._evicted <= self.evictions, f"{self._evicted} of {self.evictions} evicted: {state}"
        assert 0 <= self._expired <= self.expirations, f"{self._expired} of {self.expirations} gone: {state}"
        assert self._undo or not self.log.pending(), f"effects that cannot be undone: {state}"


class _NoLog(RecordEncoder):
    """What replay logs to."""

    def add(self, effect: bytes) -> None:
        """Forget it."""


def _position(name: bytes) -> int:
    """Return where a scan meets the name: 48 bits of a hash that is the same in every process."""
    return xxh64_intdigest(name) >> 16


T = TypeVar("T")


def _page(order: list[tuple[int, T]], cursor: int, count: int) -> tuple[int, list[T]]:
    """Return the next cursor, 0 at the end, and ``count`` items from ``cursor`` on.

    More if positions are equal.
    """
    start = bisect_left(order, cursor, key=itemgetter(0))
    stop = min(start + count, len(order))
    while 0 < stop < len(order) and order[stop][0] == order[stop - 1][0]:
        stop += 1
    return (order[stop][0] if stop < len(order) else 0), [item for _position, item in order[start:stop]]


# The effects, each with its number of tokens.
EFFECTS = {
    b"set": 3,
    b"del": 2,
    b"zadd": 4,
    b"zrem": 3,
    b"setrange": 4,
    b"pexpireat": 3,
    b"persist": 2,
    b"rename": 3,
}
# Those that need their key to be there.
NEEDY = frozenset({b"setrange", b"pexpireat", b"persist", b"rename"})


def effects(key: bytes, value: bytes | list[Pair], when: int) -> Iterator[bytes]:
    """Yield the effects that make an entry as :meth:`UnifiedStore.entries` has it."""
    if isinstance(value, bytes):
        yield encode_request((b"set", key, value))
    else:
        for score, member in value:
            yield encode_request((b"zadd", key, repr(score).encode(), member))
    if when:
        yield encode_request((b"pexpireat", key, b"%d" % when))


def _set_value(records: bytes, start: int, end: int) -> int:
    """Return where the value begins if all from ``start`` to ``end`` is one ``set``, otherwise 0."""
    if end - start >= _PEEK.size:
        head, key_size = _PEEK.unpack_from(records, start)
        value_at: int = start + _PEEK.size + key_size + 4
        if head == _SET and value_at <= end and value_at + _u32(records, value_at - 4)[0] == end:
            return value_at
    return 0


def _is_effect(tokens: list[bytes]) -> bool:
    return bool(tokens) and EFFECTS.get(tokens[0]) == len(tokens)


def _tokens(data: bytes, at: int, end: int) -> tuple[list[bytes], int]:
    """Return the tokens of the request at ``at`` and where it ends; -1 if that is not before ``end``."""
    tokens = []
    try:
        (count,) = _u32(data, at)
        at += 4
        for _ in range(count):
            (length,) = _u32(data, at)
            start = at + 4
            at = start + length
            tokens.append(data[start:at])
    except StructError:  # a length would stand behind the end of data
        at = end + 1
    return (tokens, at) if at <= end else ([], -1)
