"""Methods for the commands of sorted sets.

Bounds of scores are numbers, or texts: ``"(1.5"`` excludes the bound, ``"-inf"`` and ``"+inf"`` are none.
Bounds of members are texts: ``"[a"`` includes, ``"(a"`` excludes, ``"-"`` and ``"+"`` are none. Ranks are
counted from 0; -1 is the last. Ranges by rank and by score return (member, score).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import AnyStr

from imds.methods.base import Commands, Request, Scores, command, flags, limit, repeatable, values
from imds.replies import Token, count, done, integer, number, numbers, optional_integer, optional_number, raw

Pairs = list[tuple[AnyStr, float]]


def _combined(keys: Sequence[Token], weights: Sequence[float] | None, aggregate: str | None) -> list[Token]:
    weighted: list[Token] = ["weights", *weights] if weights is not None else []
    return [len(keys), *keys, *weighted, *values(aggregate=aggregate)]


class SortedSetCommands(Commands[AnyStr]):
    """What sorted sets can do."""

    @repeatable
    def zadd(self, key: Token, score: Token, member: Token) -> Request[bool]:
        """Add ``member`` to the sorted set of ``key``, or move it to ``score``. Always True."""
        return Request(done, b"zadd", key, score, member)

    @command
    def zadd_many(
        self,
        key: Token,
        scores: Scores,
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
        ch: bool = False,
    ) -> Request[int]:
        """Add members, or move them to their scores; return how many were new, with ``ch`` also those moved.

        ``nx`` only adds and ``xx`` only moves; ``gt`` and ``lt`` move only to a larger or smaller score.
        """
        pairs: list[Token] = [part for member, score in scores.items() for part in (score, member)]
        options = flags(nx=nx, xx=xx, gt=gt, lt=lt, ch=ch)
        if len(pairs) == 2 and not options:
            pairs *= 2  # one pair alone is answered by OK; the second time it is not new
        return Request(count, b"zadd", key, *options, *pairs)

    @command
    def zadd_incr(
        self,
        key: Token,
        increment: float,
        member: Token,
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
    ) -> Request[float | None]:
        """Add to the score of ``member`` and return it, or None where an option forbade it."""
        options = [*flags(nx=nx, xx=xx, gt=gt, lt=lt), "incr"]
        return Request(optional_number, b"zadd", key, *options, increment, member)

    @command
    def zincrby(self, key: Token, increment: float, member: Token) -> Request[float]:
        """Add to the score of ``member``, 0 if it is new, and return it."""
        return Request(number, b"zincrby", key, increment, member)

    @command
    def zrem(self, key: Token, *members: Token) -> Request[int]:
        """Remove members from the sorted set of ``key``; return how many were there."""
        return Request(count, b"zrem", key, *members)

    @repeatable
    def zrange(self, key: Token, low: Token = -inf, high: Token = inf) -> Request[Pairs[AnyStr]]:
        """Return (member, score) with ``low <= score <= high``, ascending by score, then by member's bytes.

        The reply's format is ambiguous for odd members: see :func:`imds.client.parse_pairs`. The reply to
        :meth:`zrangebyscore` is not.
        """
        return Request(self._reader.pairs, b"zrange", key, low, high)

    @repeatable
    def zrange_raw(self, key: Token, low: Token = -inf, high: Token = inf) -> Request[bytes]:
        """Return the reply to zrange as it came, ``score:member,score:member``; empty if there is none."""
        return Request(raw, b"zrange", key, low, high)

    @repeatable
    def zrangebyrank(self, key: Token, start: int = 0, stop: int = -1) -> Request[Pairs[AnyStr]]:
        """Return (member, score) by rank, lowest score first, both ends included."""
        return Request(self._reader.scored, b"zrangebyrank", key, start, stop, "withscores")

    @repeatable
    def zrevrange(self, key: Token, start: int = 0, stop: int = -1) -> Request[Pairs[AnyStr]]:
        """Return (member, score) by rank, highest score first, both ends included."""
        return Request(self._reader.scored, b"zrevrange", key, start, stop, "withscores")

    @repeatable
    def zrangebyscore(
        self, key: Token, low: Token = -inf, high: Token = inf, *, offset: int = 0, count: int | None = None
    ) -> Request[Pairs[AnyStr]]:
        """Return (member, score) between two scores, ascending; ``count`` of them from ``offset`` on."""
        bounds = key, low, high
        return Request(self._reader.scored, b"zrangebyscore", *bounds, "withscores", *limit(offset, count))

    @repeatable
    def zrevrangebyscore(
        self, key: Token, high: Token = inf, low: Token = -inf, *, offset: int = 0, count: int | None = None
    ) -> Request[Pairs[AnyStr]]:
        """The same, descending."""
        bounds = key, high, low
        return Request(self._reader.scored, b"zrevrangebyscore", *bounds, "withscores", *limit(offset, count))

    @repeatable
    def zrangebylex(
        self, key: Token, low: Token = "-", high: Token = "+", *, offset: int = 0, count: int | None = None
    ) -> Request[list[AnyStr]]:
        """Return members between two members, in the order of their bytes, where all have one score."""
        return Request(self._reader.strings, b"zrangebylex", key, low, high, *limit(offset, count))

    @repeatable
    def zrevrangebylex(
        self, key: Token, high: Token = "+", low: Token = "-", *, offset: int = 0, count: int | None = None
    ) -> Request[list[AnyStr]]:
        """The same, from the last."""
        return Request(self._reader.strings, b"zrevrangebylex", key, high, low, *limit(offset, count))

    @repeatable
    def zrank(self, key: Token, member: Token) -> Request[int | None]:
        """Return the 0-based rank of ``member``, lowest score first, or None."""
        return Request(optional_integer, b"zrank", key, member)

    @repeatable
    def zrevrank(self, key: Token, member: Token) -> Request[int | None]:
        """Return the 0-based rank of ``member``, highest score first, or None."""
        return Request(optional_integer, b"zrevrank", key, member)

    @repeatable
    def zscore(self, key: Token, member: Token) -> Request[float | None]:
        """Return the score of ``member``, or None."""
        return Request(optional_number, b"zscore", key, member)

    @repeatable
    def zmscore(self, key: Token, *members: Token) -> Request[list[float | None]]:
        """Return the score of each member, in their order; None where there is none."""
        return Request(numbers, b"zmscore", key, *members)

    @repeatable
    def zcard(self, key: Token) -> Request[int]:
        """Return how many members there are."""
        return Request(integer, b"zcard", key)

    @repeatable
    def zcount(self, key: Token, low: Token = -inf, high: Token = inf) -> Request[int]:
        """Return how many members are between two scores."""
        return Request(integer, b"zcount", key, low, high)

    @repeatable
    def zlexcount(self, key: Token, low: Token = "-", high: Token = "+") -> Request[int]:
        """Return how many members are between two members, where all have one score."""
        return Request(integer, b"zlexcount", key, low, high)

    @command
    def zpopmin(self, key: Token, count: int = 1) -> Request[Pairs[AnyStr]]:
        """Remove the lowest members and return them with their scores."""
        return Request(self._reader.scored, b"zpopmin", key, count)

    @command
    def zpopmax(self, key: Token, count: int = 1) -> Request[Pairs[AnyStr]]:
        """Remove the highest members and return them with their scores."""
        return Request(self._reader.scored, b"zpopmax", key, count)

    @command
    def bzpopmin(self, *keys: Token, wait: float) -> Request[tuple[AnyStr, AnyStr, float] | None]:
        """Wait until one of the keys, of one slot, has a member; remove the lowest.

        Return key, member and score, or None after ``wait`` seconds; 0 is for ever. The client's own timeout
        counts from then.
        """
        return Request(self._reader.popped, b"bzpopmin", *keys, wait, wait=wait or inf)

    @command
    def bzpopmax(self, *keys: Token, wait: float) -> Request[tuple[AnyStr, AnyStr, float] | None]:
        """The same of the highest."""
        return Request(self._reader.popped, b"bzpopmax", *keys, wait, wait=wait or inf)

    @command
    def zremrangebyscore(self, key: Token, low: Token = -inf, high: Token = inf) -> Request[int]:
        """Remove the members between two scores; return how many."""
        return Request(integer, b"zremrangebyscore", key, low, high)

    @command
    def zremrangebyrank(self, key: Token, start: int, stop: int) -> Request[int]:
        """Remove the members between two ranks; return how many."""
        return Request(integer, b"zremrangebyrank", key, start, stop)

    @command
    def zremrangebylex(self, key: Token, low: Token, high: Token) -> Request[int]:
        """Remove the members between two members; return how many."""
        return Request(integer, b"zremrangebylex", key, low, high)

    @repeatable
    def zrandmember(self, key: Token) -> Request[AnyStr | None]:
        """Return a member by chance, or None."""
        return Request(self._reader.value, b"zrandmember", key)

    @repeatable
    def zrandmembers(self, key: Token, count: int) -> Request[Pairs[AnyStr]]:
        """Return (member, score) by chance: different ones, or with repetitions if ``count`` is negative."""
        return Request(self._reader.scored, b"zrandmember", key, count, "withscores")

    @repeatable
    def zscan(
        self, key: Token, cursor: Token = "0", *, match: Token | None = None, count: int | None = None
    ) -> Request[tuple[str, Pairs[AnyStr]]]:
        """Return the next cursor and some (member, score), as ``scan`` does keys."""
        return Request(self._reader.scored_page, b"zscan", key, cursor, *values(match=match, count=count))

    # Several sets, all of one slot.

    @repeatable
    def zunion(
        self, *keys: Token, weights: Sequence[float] | None = None, aggregate: str | None = None
    ) -> Request[Pairs[AnyStr]]:
        """Return (member, score) of the members of any set.

        ``aggregate`` says what becomes of several scores: ``"sum"``, ``"min"`` or ``"max"``.
        """
        return Request(self._reader.scored, b"zunion", *_combined(keys, weights, aggregate), "withscores")

    @repeatable
    def zinter(
        self, *keys: Token, weights: Sequence[float] | None = None, aggregate: str | None = None
    ) -> Request[Pairs[AnyStr]]:
        """Return (member, score) of the members of all sets."""
        return Request(self._reader.scored, b"zinter", *_combined(keys, weights, aggregate), "withscores")

    @repeatable
    def zdiff(self, *keys: Token) -> Request[Pairs[AnyStr]]:
        """Return (member, score) of the members of the first set that are in no other."""
        return Request(self._reader.scored, b"zdiff", len(keys), *keys, "withscores")

    @command
    def zunionstore(
        self,
        destination: Token,
        *keys: Token,
        weights: Sequence[float] | None = None,
        aggregate: str | None = None,
    ) -> Request[int]:
        """Make ``destination`` the union; return how many members it has."""
        return Request(integer, b"zunionstore", destination, *_combined(keys, weights, aggregate))

    @command
    def zinterstore(
        self,
        destination: Token,
        *keys: Token,
        weights: Sequence[float] | None = None,
        aggregate: str | None = None,
    ) -> Request[int]:
        """Make ``destination`` the intersection; return how many members it has."""
        return Request(integer, b"zinterstore", destination, *_combined(keys, weights, aggregate))

    @command
    def zdiffstore(self, destination: Token, *keys: Token) -> Request[int]:
        """Make ``destination`` the difference; return how many members it has."""
        return Request(integer, b"zdiffstore", destination, len(keys), *keys)

    @repeatable
    def zintercard(self, *keys: Token, limit: int = 0) -> Request[int]:
        """Return how many members all sets have in common; ``limit`` is where to stop counting, 0: never."""
        return Request(integer, b"zintercard", len(keys), *keys, *values(limit=limit or None))
