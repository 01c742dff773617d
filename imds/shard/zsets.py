"""The commands on one sorted set. How a command is written: ``keyspace.py``.

Every range is turned into ranks first, by two searches; so a count costs O(log n), and LIMIT skips nothing.
"""

from __future__ import annotations

import random
from math import inf, isnan, nextafter

from imds.shard.arguments import integer, lex_bound, score, score_bound, syntax
from imds.shard.glob import matcher
from imds.shard.keys import scan_count, scan_cursor, scan_options
from imds.shard.keyspace import MAX_DRAWN, Item, Keyspace, Pair, command, error


def flat(pairs: list[Pair]) -> list[Item]:
    """Return member, score, member, score …"""
    found: list[Item] = []
    for number, member in pairs:
        found += (member, number)
    return found


def _members(pairs: list[Pair]) -> list[Item]:
    return [member for _score, member in pairs]


# ---- ranges: from rank ``start`` to before ``stop`` ------------------------------------------------------

Range = tuple[int, int]


def _upto(store: Keyspace, key: bytes, count: int, bound: float) -> int:
    """Return how many scores are not above ``bound``."""
    return count if bound == inf else store.zplace(key, nextafter(bound, inf))


def by_score(store: Keyspace, key: bytes, low: bytes, high: bytes) -> Range:
    """Return the range of scores between two bounds. The bounds are read before the key is looked at."""
    (least, above), (most, below) = score_bound(low), score_bound(high)
    count = store.members(key)
    if not count:
        return 0, 0
    start = _upto(store, key, count, least) if above else store.zplace(key, least)
    stop = store.zplace(key, most) if below else _upto(store, key, count, most)
    return start, max(start, stop)


def by_lex(store: Keyspace, key: bytes, low: bytes, high: bytes) -> Range:
    """Return the range of members between two bounds, in a set whose scores are all the same."""
    least, most = lex_bound(low, low=True), lex_bound(high, low=False)
    count = store.members(key)
    if not count:
        return 0, 0
    common = store.zslice(key, 0, 1)[0][0]
    start = count if least is None else store.zplace(key, common, least)
    stop = count if most is None else store.zplace(key, common, most)
    return start, max(start, stop)


def by_rank(store: Keyspace, key: bytes, first: bytes, last: bytes, reverse: bool = False) -> Range:
    """Return the range of ranks; both ends are in it, and negative ones count from the set's end.

    With ``reverse`` the ends count from the highest.
    """
    start, end = integer(first), integer(last)
    count = store.members(key)
    start = max(start + count, 0) if start < 0 else min(start, count)
    stop = max(start, end + count + 1 if end < 0 else min(end + 1, count))
    return (count - stop, count - start) if reverse else (start, stop)


def _limited(chosen: Range, reverse: bool, offset: int, count: int) -> Range:
    """Return what LIMIT leaves of a range; a negative count is no limit."""
    start, stop = chosen
    if offset < 0:
        return 0, 0
    if reverse:
        stop = max(stop - offset, start)
        return (start if count < 0 else max(stop - count, start)), stop
    start = min(start + offset, stop)
    return start, (stop if count < 0 else min(start + count, stop))


def _slice(store: Keyspace, key: bytes, chosen: Range, reverse: bool) -> list[Pair]:
    pairs = store.zslice(key, *chosen) if chosen[0] < chosen[1] else []
    if reverse:
        pairs.reverse()
    return pairs


def _range(
    store: Keyspace,
    key: bytes,
    first: bytes,
    last: bytes,
    options: tuple[bytes, ...],
    forms: frozenset[bytes],
) -> list[Item]:
    """Answer any range command.

    ``forms`` are the options that it takes or, for those of a fixed form, has.
    """
    chosen: set[bytes] = set()
    limit: tuple[int, int] | None = None
    rest = list(options)
    while rest:
        option = rest.pop(0).upper()
        if option == b"LIMIT" and len(rest) >= 2 and b"LIMIT" in forms:
            limit = integer(rest.pop(0)), integer(rest.pop(0))
        elif option in (b"WITHSCORES", b"BYSCORE", b"BYLEX", b"REV") and option in forms:
            chosen.add(option)
        else:
            raise syntax()
    chosen |= {form.upper() for form in forms if form.islower()}
    if {b"BYSCORE", b"BYLEX"} <= chosen:
        raise syntax()
    if limit and limit[1] != -1 and not chosen & {b"BYSCORE", b"BYLEX"}:
        raise error("ERR syntax error, LIMIT is only supported in combination with either BYSCORE or BYLEX")
    if {b"WITHSCORES", b"BYLEX"} <= chosen:
        raise error("ERR syntax error, WITHSCORES not supported in combination with BYLEX")
    reverse = b"REV" in chosen
    if b"BYSCORE" in chosen or b"BYLEX" in chosen:
        low, high = (last, first) if reverse else (first, last)
        ranks = (by_score if b"BYSCORE" in chosen else by_lex)(store, key, low, high)
        if limit:
            ranks = _limited(ranks, reverse, *limit)
    else:
        ranks = by_rank(store, key, first, last, reverse)
    pairs = _slice(store, key, ranks, reverse)
    return flat(pairs) if b"WITHSCORES" in chosen else _members(pairs)


# What a command takes, in capitals, and what it always is, in small letters.
_ANY = frozenset({b"BYSCORE", b"BYLEX", b"REV", b"LIMIT", b"WITHSCORES"})
_BY_SCORE = frozenset({b"byscore", b"LIMIT", b"WITHSCORES"})
_BY_LEX = frozenset({b"bylex", b"LIMIT"})


@command
def zrange(store: Keyspace, key: bytes, first: bytes, last: bytes, *options: bytes) -> list[Item]:
    """Return a range. The form of four tokens is answered by the store itself."""
    return _range(store, key, first, last, options, _ANY)


@command
def zrangebyrank(store: Keyspace, key: bytes, first: bytes, last: bytes, *options: bytes) -> list[Item]:
    """Return a range of ranks: what Redis' ``zrange`` of four tokens returns."""
    return _range(store, key, first, last, options, frozenset({b"WITHSCORES"}))


@command
def zrevrange(store: Keyspace, key: bytes, first: bytes, last: bytes, *options: bytes) -> list[Item]:
    """Return a range of ranks, from the highest."""
    return _range(store, key, first, last, options, frozenset({b"rev", b"WITHSCORES"}))


@command
def zrangebyscore(store: Keyspace, key: bytes, low: bytes, high: bytes, *options: bytes) -> list[Item]:
    """Return a range of scores."""
    return _range(store, key, low, high, options, _BY_SCORE)


@command
def zrevrangebyscore(store: Keyspace, key: bytes, high: bytes, low: bytes, *options: bytes) -> list[Item]:
    """Return a range of scores, from the highest."""
    return _range(store, key, high, low, options, _BY_SCORE | {b"rev"})


@command
def zrangebylex(store: Keyspace, key: bytes, low: bytes, high: bytes, *options: bytes) -> list[Item]:
    """Return a range of members."""
    return _range(store, key, low, high, options, _BY_LEX)


@command
def zrevrangebylex(store: Keyspace, key: bytes, high: bytes, low: bytes, *options: bytes) -> list[Item]:
    """Return a range of members, from the last."""
    return _range(store, key, high, low, options, _BY_LEX | {b"rev"})


@command
def zcount(store: Keyspace, key: bytes, low: bytes, high: bytes) -> int:
    """Return how many scores are between two bounds."""
    start, stop = by_score(store, key, low, high)
    return stop - start


@command
def zlexcount(store: Keyspace, key: bytes, low: bytes, high: bytes) -> int:
    """Return how many members are between two bounds."""
    start, stop = by_lex(store, key, low, high)
    return stop - start


def _remove(store: Keyspace, key: bytes, chosen: Range) -> int:
    pairs = _slice(store, key, chosen, False)
    for _score, member in pairs:
        store.ztake(key, member)
    return len(pairs)


@command
def zremrangebyscore(store: Keyspace, key: bytes, low: bytes, high: bytes) -> int:
    """Remove a range of scores."""
    return _remove(store, key, by_score(store, key, low, high))


@command
def zremrangebylex(store: Keyspace, key: bytes, low: bytes, high: bytes) -> int:
    """Remove a range of members."""
    return _remove(store, key, by_lex(store, key, low, high))


@command
def zremrangebyrank(store: Keyspace, key: bytes, first: bytes, last: bytes) -> int:
    """Remove a range of ranks."""
    return _remove(store, key, by_rank(store, key, first, last))


# ---- members ---------------------------------------------------------------------------------------------


@command
def zadd(store: Keyspace, key: bytes, *tokens: bytes) -> Item:
    """Add members or move them, on conditions. The form of four tokens is answered by the store itself."""
    chosen: set[bytes] = set()
    at = 0
    while at < len(tokens) and tokens[at].upper() in (b"NX", b"XX", b"GT", b"LT", b"CH", b"INCR"):
        chosen.add(tokens[at].upper())
        at += 1
    rest = tokens[at:]
    if not rest or len(rest) % 2:
        raise syntax()
    if {b"NX", b"XX"} <= chosen:
        raise error("ERR XX and NX options at the same time are not compatible")
    if len(chosen & {b"NX", b"GT", b"LT"}) > 1:
        raise error("ERR GT, LT, and/or NX options at the same time are not compatible")
    if b"INCR" in chosen and len(rest) > 2:
        raise error("ERR INCR option supports a single increment-element pair")
    pairs = [(score(text), member) for text, member in zip(rest[::2], rest[1::2], strict=True)]
    store.members(key)
    added = changed = 0
    result: float | None = None
    for number, member in pairs:
        old = store.zscore(key, member)
        if (old is None and b"XX" in chosen) or (old is not None and b"NX" in chosen):
            continue
        new = number
        if b"INCR" in chosen and old is not None:
            new = _sum(old, number)
        if old is not None and ((b"GT" in chosen and new <= old) or (b"LT" in chosen and new >= old)):
            continue
        result = new
        added += old is None
        if old is None or new != old:
            changed += 1
            store.zput(key, new, member)
    if b"INCR" in chosen:
        return result
    return changed if b"CH" in chosen else added


def _sum(old: float, change: float) -> float:
    new = old + change
    if isnan(new):
        raise error("ERR resulting score is not a number (NaN)")
    return new + 0.0


@command
def zincrby(store: Keyspace, key: bytes, increment: bytes, member: bytes) -> float:
    """Add to the member's score, which is 0 if it is not there; return it."""
    change = score(increment)
    store.members(key)
    old = store.zscore(key, member)
    new = change if old is None else _sum(old, change)
    if new != old:
        store.zput(key, new, member)
    return new


@command
def zrem(store: Keyspace, key: bytes, *members: bytes) -> int:
    """Remove several members; return how many there were. One alone is answered by the store itself."""
    store.members(key)
    return sum(store.ztake(key, member) for member in members)


@command
def zcard(store: Keyspace, key: bytes) -> int:
    """Return how many members there are."""
    return store.members(key)


@command
def zscore(store: Keyspace, key: bytes, member: bytes) -> float | None:
    """Return the member's score."""
    return store.zscore(key, member) if store.members(key) else None


@command
def zmscore(store: Keyspace, key: bytes, *members: bytes) -> list[Item]:
    """Return the members' scores."""
    store.members(key)
    return [store.zscore(key, member) for member in members]


@command
def zrevrank(store: Keyspace, key: bytes, member: bytes) -> int | None:
    """Return the member's rank, highest score first."""
    count = store.members(key)
    number = store.zscore(key, member)
    return None if number is None else count - 1 - store.zplace(key, number, member)


def _pop(store: Keyspace, key: bytes, count: tuple[bytes, ...], highest: bool) -> list[Item]:
    number = integer(count[0], "ERR value is out of range, must be positive") if count else 1
    if number < 0:
        raise error("ERR value is out of range, must be positive")
    have = store.members(key)
    number = min(number, have)
    pairs = _slice(store, key, (have - number, have) if highest else (0, number), highest)
    for _score, member in pairs:
        store.ztake(key, member)
    return flat(pairs)


@command
def zpopmin(store: Keyspace, key: bytes, *count: bytes) -> list[Item]:
    """Remove the lowest members and return them."""
    return _pop(store, key, count, False)


@command
def zpopmax(store: Keyspace, key: bytes, *count: bytes) -> list[Item]:
    """Remove the highest members and return them, highest first."""
    return _pop(store, key, count, True)


@command
def zrandmember(store: Keyspace, key: bytes, *options: bytes) -> Item | list[Item]:
    """Return one member by chance, or several: different ones, or by a negative count any."""
    if len(options) == 2 and options[1].upper() != b"WITHSCORES":
        raise syntax()
    wanted = integer(options[0]) if options else 1
    if wanted < -MAX_DRAWN:
        raise error("ERR value is out of range")
    have = store.members(key)
    if not options:
        return store.zslice(key, at := random.randrange(have), at + 1)[0][1] if have else None
    if not have:
        return []
    if wanted < 0:
        ranks = [random.randrange(have) for _ in range(-wanted)]
    else:
        ranks = random.sample(range(have), min(wanted, have))
    pairs = [pair for rank in ranks for pair in store.zslice(key, rank, rank + 1)]
    return flat(pairs) if len(options) == 2 else _members(pairs)


@command
def zscan(store: Keyspace, key: bytes, cursor: bytes, *options: bytes) -> list[Item]:
    """Return the next cursor, then members and scores."""
    start = scan_cursor(cursor)
    if not store.members(key):
        return [0]
    chosen = scan_options(options, (b"MATCH", b"COUNT"))
    count = scan_count(chosen)
    following, pairs = store.zscan(key, start, count)
    if b"MATCH" in chosen:
        matches = matcher(chosen[b"MATCH"])
        pairs = [pair for pair in pairs if matches(pair[1])]
    return [following, *flat(pairs)]
