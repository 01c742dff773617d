"""UnifiedStore: one keyspace of strings and sorted sets, with an exact LRU over both.

What always holds (:meth:`UnifiedStore.check` asserts what can be asserted afterwards):

* A key holds a string (bytes) or a sorted set that has a member; never an empty set.
* The table is in the order of use: a command that finds its key makes it the most recently used, whatever
  it then answers. Eviction takes the least recently used key other than the command's own.
* ``used`` is the sum of what keys and values are counted with, kept in O(1) by each change.
* An effect is in the log, and what it replaced in the undo list, in the order in which effects were
  applied; an eviction stands before the write that needed its room. A command that answers an error, and
  one that changes nothing, has no effect.
* ``log`` and undo list begin at the same point: :meth:`commit` and :meth:`rollback` end both.

A batch's way through the shard::

    envelopes --> execute --> replies                  held back until the effects are in the file
                     |
                     +------> log.pending() --> file   then commit(), and the replies may go
                     +------> undo list                or rollback(), when the file did not take them

No client can make :meth:`UnifiedStore.execute` raise, and no reply is ever lost: each request of an envelope
gets one. What is in an envelope's own header comes from a router, and a wrong one raises ValueError.

The compiled twin is ``_kernel/store.pyx``; the suite in ``tests/shard`` runs on both, and compares them.
Touch a command here, then touch its row in ``commands.py`` and its twin.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from math import inf
from struct import Struct
from struct import error as StructError

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
from imds.shard.record import RecordEncoder, each_effect
from imds.shard.sortedset import SortedSet

# Bytes that CPython takes (measured by tracemalloc over 10^5 keys, as tests/shard/test_store.py does).
KEY_COST = 128  # the key's bytes object without its text, its entry in dict and list of the OrderedDict
VALUE_COST = 40  # the value's bytes object without its text, with what the allocator rounds up

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
_WRITES = frozenset(name.encode() for name, command in COMMANDS.items() if command.write)


def parse_score(text: bytes) -> float | None:
    """Return the number that ``text`` is for ``float()``, without its leniencies; None if it is none.

    Refused: surrounding whitespace, underscores, NaN.
    """
    try:
        score = float(text)
    except ValueError:
        return None
    if score != score or b"_" in text or text.strip() != text:
        return None
    return score


class UnifiedStore:
    """The data of one shard. ``log`` takes the effects of :meth:`execute`.

    ``capacity`` (keys) and ``maxmemory`` (counted bytes) are this shard's share, 0 for no limit; with
    ``evict`` a write makes room by removing the least recently used keys, without it the write is refused.
    ``hooks`` answer the commands that are about the process and not about its data, and what a router asks on
    its own behalf under a name that no client's command has: name to a function that takes the arguments and
    returns a whole response frame.

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
        self._table: OrderedDict[bytes, Value] = OrderedDict()
        # What rollback puts back, newest last: (key, what it held or None), or (set, member, score or None).
        self._undo: list[tuple[bytes, Value | None] | tuple[SortedSet, bytes, float | None]] = []
        self._evicted = 0  # evictions since the last commit
        self._methods: dict[str, Callable[..., bytes]] = {}
        for name, command in COMMANDS.items():
            if command.in_store:
                self._methods[name] = getattr(self, f"cmd_{name}")
        # Both usual spellings at once; others go through lookup().
        self._fast: dict[bytes, tuple[Command, Callable[..., bytes]]] = {
            spelling: (COMMANDS[name], method)
            for name, method in self._methods.items()
            for spelling in (name.encode(), name.upper().encode())
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
        table, limit = self._table, self.max_response
        find, touch = table.get, table.move_to_end
        out: list[bytes] = []
        emit = out.append
        pos, size, hits = 0, len(data), 0
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
                if key_at <= end:
                    head, key_size = peek(data, at)
                    if head == _GET and (stop := key_at + key_size) <= end:
                        key = data[key_at:stop]
                        value = find(key)
                        at = stop
                        if type(value) is bytes and total + (here := len(value) + 8) <= limit:
                            hits += 1
                            touch(key)
                            total += here
                            emit(pack(here - 4, OK))
                            emit(value)
                            continue
                        reply = self.cmd_get(b"", key)
                        if total + len(reply) > limit and len(reply) > SHORT:
                            reply = _TOO_LONG
                        total += len(reply)
                        emit(reply)
                        continue
                    if head == _SET and (value_at := key_at + key_size + 4) <= end and self.readonly is None:
                        stop = value_at + U32.unpack_from(data, value_at - 4)[0]
                        if stop <= end:
                            reply = self.cmd_set(
                                data[at:stop], data[key_at : value_at - 4], data[value_at:stop]
                            )
                            total += len(reply)
                            emit(reply)
                            at = stop
                            continue
                tokens, stop = _tokens(data, at, end)
                if stop < 0:
                    total += len(_MALFORMED) * (count - done)
                    emit(_MALFORMED * (count - done))
                    break
                self.hits += hits  # a hook may want to know
                hits = 0
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
        reply = self._answer(frame, tokens)
        return _TOO_LONG if len(reply) > self.max_response and len(reply) > SHORT else reply

    def _answer(self, frame: bytes, tokens: list[bytes]) -> bytes:
        """Run one request, given as frame and as tokens; return the reply frame."""
        if not tokens:
            return _UNKNOWN_COMMAND
        name = tokens[0]
        found = self._fast.get(name)
        if found is None:
            command = lookup(name)
            if command is None or not command.in_store:
                return self._hook(command, tokens)
            found = command, self._methods[command.name]
        command, method = found
        if not command.arity_ok(len(tokens)):
            return _WRONG_ARITY
        if command.write:
            if self.readonly is not None:
                return self.readonly
            if not name.islower():
                frame = frame[:8] + name.lower() + frame[8 + len(name) :]
        return method(frame, *tokens[1:])

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
        old = self._find(key)
        cost = KEY_COST + len(key) + VALUE_COST + len(value)
        change = cost if old is None else cost - _cost(key, old)
        if (self.capacity or self.maxmemory) and (refusal := self._make_room(old is None, change, cost)):
            return refusal
        self._undo.append((key, old))
        self.log.add(frame)
        self._table[key] = value
        self.used += change
        return _DONE

    def cmd_del(self, frame: bytes, key: bytes) -> bytes:
        """Remove the key, whatever it holds."""
        if key not in self._table:
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
        new = SortedSet() if value is None else value
        assert isinstance(new, SortedSet)
        old = new.score(member)
        if old == score:
            return _DONE
        change = new.cost_of(member) if old is None else 0
        if value is None:
            change += KEY_COST + len(key) + new.used
        if self.capacity or self.maxmemory:
            alone = change if value is None else _cost(key, new) + change
            if refusal := self._make_room(value is None, change, alone):
                return refusal
        self._undo.append((key, None) if value is None else (new, member, old))
        self.log.add(frame)
        new.add(member, score)
        self._table[key] = new
        self.used += change
        return _DONE

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
        self.log.add(frame)
        if len(value) == 1:
            self._drop(key)
        else:
            self._undo.append((value, member, score))
            self.used -= value.cost_of(member)
            value.remove(member)
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

    # ---- what commands are made of -------------------------------------------------------------------

    def _find(self, key: bytes) -> Value | None:
        """Return what ``key`` holds, and make it the most recently used."""
        value = self._table.get(key)
        if value is not None:
            self._table.move_to_end(key)
        return value

    def _read(self, key: bytes) -> Value | None:
        """The same, counted as a hit or a miss."""
        value = self._find(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def _drop(self, key: bytes) -> None:
        """Remove ``key``, which is here, so that it can be put back."""
        value = self._table.pop(key)
        self._undo.append((key, value))
        self.used -= _cost(key, value)

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
        self.log.add(encode_request((b"del", key)))
        self._drop(key)
        self.evictions += 1
        self._evicted += 1

    # ---- the log's side ------------------------------------------------------------------------------

    def commit(self) -> None:
        """The effects since the last commit are in the file: they stay."""
        self._undo.clear()
        self._evicted = 0
        self.log.commit()

    def rollback(self) -> None:
        """They are not: put back the data, and take the records back. O(effects)."""
        table = self._table
        for undo in reversed(self._undo):
            if len(undo) == 2:
                key, value = undo
                now = table.pop(key, None)
                if now is not None:
                    self.used -= _cost(key, now)
                if value is not None:
                    table[key] = value
                    self.used += _cost(key, value)
            else:
                members, member, score = undo
                self.used -= members.used
                if score is None:
                    members.remove(member)
                else:
                    members.add(member, score)
                self.used += members.used
        self._undo.clear()
        self.evictions -= self._evicted
        self._evicted = 0
        self.log.rollback()

    def replay(self, records: Buffer) -> int:
        """Apply the effects of ``records``, whole and verified; return how many there are.

        Nothing is logged, limited, counted or undone by it, and nothing may wait for commit or rollback.
        Raises ValueError for an effect that is no write of this version; those before it have been applied.
        """
        records = bytes(records)
        log, limits, ops = self.log, (self.capacity, self.maxmemory, self.readonly), self.ops
        self.log, self.capacity, self.maxmemory, self.readonly = _NoLog(0), 0, 0, None
        count = 0
        try:
            for number, start, end in each_effect(records):
                tokens, stop = _tokens(records, start, end)
                if (
                    stop != end
                    or not tokens
                    or tokens[0] not in _WRITES
                    or self._answer(b"", tokens) not in (_DONE, _NONE)
                ):
                    effect = records[start : min(end, start + 60)]
                    raise ValueError(f"record {number} is no write of this version: {effect!r}")
                self._undo.clear()
                count += 1
        finally:
            self.log = log
            self.capacity, self.maxmemory, self.readonly = limits
            self.ops = ops
        return count

    def enforce_limits(self) -> None:
        """Evict, logged, until the data is within its limits, if eviction is the policy."""
        while self.evict and (
            (self.capacity and len(self._table) > self.capacity)
            or (self.maxmemory and self.used > self.maxmemory)
        ):
            self._evict()

    # ---- the whole of the data -----------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[bytes, bytes | list[tuple[float, bytes]]]]:
        """Yield each key with its string or its (score, member) pairs, least recently used first.

        Raises RuntimeError if a command runs in between.
        """
        for key, value in self._table.items():
            yield key, value if isinstance(value, bytes) else value.range(-inf, inf)

    def digest(self) -> int:
        """Return 64 bits that are equal for equal data, whatever the order of use. O(data).

        The sum, modulo 2^64, of a chain of xxh64 for each key, each seeded by the one before::

            string       seed 1, key, value
            sorted set   seed 2, key, then for each member in order: score (IEEE 754, big-endian), member
        """
        total = 0
        for key, value in self._table.items():
            if isinstance(value, bytes):
                total += xxh64_intdigest(value, xxh64_intdigest(key, 1))
            else:
                chain = xxh64_intdigest(key, 2)
                for score, member in value.range(-inf, inf):
                    chain = xxh64_intdigest(member, xxh64_intdigest(_DOUBLE.pack(score), chain))
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
            used += _cost(key, value)
        assert used == self.used, f"counted {used}: {state}"
        assert 0 <= self._evicted <= self.evictions, f"{self._evicted} of {self.evictions} evicted: {state}"
        assert self._undo or not self.log.pending(), f"effects that cannot be undone: {state}"


class _NoLog(RecordEncoder):
    """What replay logs to."""

    def add(self, effect: bytes) -> None:
        """Forget it."""


def _cost(key: bytes, value: Value) -> int:
    """Return the bytes that ``key`` is counted with."""
    if isinstance(value, bytes):
        return KEY_COST + len(key) + VALUE_COST + len(value)
    return KEY_COST + len(key) + value.used


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
