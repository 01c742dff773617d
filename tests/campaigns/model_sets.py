"""What the commands on sorted sets mean, over plain sorted lists: see ``model.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import isnan

from campaigns.model import Answer, Model, Reply, Wrong, command, integer, number
from imds.protocol import LIST, decode_list

Pair = tuple[float, bytes]


def score(text: bytes) -> float:
    """Return the score that a token is. Raises Wrong."""
    found = number(text)
    if found is None:
        raise Wrong("ERR ")
    return found


def flat(pairs: Sequence[Pair], *, scores: bool = True) -> Answer:
    """Return what is answered for these pairs."""
    return [item for value, member in pairs for item in ((member, value) if scores else (member,))]


# -- ranges -----------------------------------------------------------------------------------------------


def _bound(text: bytes, *, low: bool) -> Callable[[Pair], bool]:
    edge = score(text.removeprefix(b"("))
    if text.startswith(b"("):
        return (lambda pair: pair[0] > edge) if low else (lambda pair: pair[0] < edge)
    return (lambda pair: pair[0] >= edge) if low else (lambda pair: pair[0] <= edge)


def _lex(text: bytes, *, low: bool) -> Callable[[Pair], bool]:
    if text in (b"-", b"+"):
        return lambda pair: (text == b"-") is low
    if text[:1] not in (b"[", b"("):
        raise Wrong("ERR min or max not valid string range item")
    edge, within = text[1:], text.startswith(b"[")
    if low:
        return lambda pair: pair[1] > edge or (within and pair[1] == edge)
    return lambda pair: pair[1] < edge or (within and pair[1] == edge)


def between(model: Model, key: bytes, low: bytes, high: bytes, how: str) -> list[Pair]:
    """Return the pairs in a range: by ``score``, by ``lex`` or by ``rank``."""
    if how == "rank":
        return by_rank(model.ordered, key, low, high)
    bound = _bound if how == "score" else _lex
    above, below = bound(low, low=True), bound(high, low=False)
    return [pair for pair in model.ordered(key) if above(pair) and below(pair)]


def by_rank(ordered: Callable[[bytes], list[Pair]], key: bytes, first: bytes, last: bytes) -> list[Pair]:
    start, end = integer(first), integer(last)
    pairs = ordered(key)
    start, end = (at + len(pairs) if at < 0 else at for at in (start, end))
    return [pair for rank, pair in enumerate(pairs) if start <= rank <= end]


def _answer(
    model: Model, key: bytes, bounds: tuple[bytes, bytes], how: str, words: list[bytes], *, rev: bool = False
) -> Answer:
    """Answer a range command, whose options are ``words``, LIMIT and WITHSCORES among them."""
    limit: tuple[int, int] | None = None
    scores = False
    while words:
        word = words.pop(0).upper()
        if word == b"WITHSCORES" and how != "lex":
            scores = True
        elif word == b"LIMIT" and len(words) >= 2:
            limit = integer(words.pop(0)), integer(words.pop(0))
        else:
            raise Wrong("ERR syntax error")
    if limit and how == "rank" and limit[1] != -1:
        raise Wrong("ERR syntax error")
    if how == "rank":
        pairs = by_rank(
            (lambda one: model.ordered(one)[::-1]) if rev else model.ordered, key, bounds[0], bounds[1]
        )
        return flat(pairs, scores=scores)
    pairs = between(model, key, *(bounds[::-1] if rev else bounds), how)
    if rev:
        pairs.reverse()
    if limit:
        offset, count = limit
        pairs = [] if offset < 0 else pairs[offset:] if count < 0 else pairs[offset : offset + count]
    return flat(pairs, scores=scores)


@command
def zrange(model: Model, key: bytes, first: bytes, last: bytes, *options: bytes) -> Answer:
    chosen = {word.upper() for word in options} & {b"BYSCORE", b"BYLEX", b"REV"}
    if {b"BYSCORE", b"BYLEX"} <= chosen:
        raise Wrong("ERR syntax error")
    how = "score" if b"BYSCORE" in chosen else "lex" if b"BYLEX" in chosen else "rank"
    words = [word for word in options if word.upper() not in chosen]
    return _answer(model, key, (first, last), how, words, rev=b"REV" in chosen)


def _plain_range(name: str, how: str, *, rev: bool = False) -> None:
    def function(model: Model, key: bytes, first: bytes, last: bytes, *options: bytes) -> Answer:
        return _answer(model, key, (first, last), how, list(options), rev=rev)

    function.__name__ = name
    command(function)


_plain_range("zrangebyrank", "rank")
_plain_range("zrevrange", "rank", rev=True)
_plain_range("zrangebyscore", "score")
_plain_range("zrevrangebyscore", "score", rev=True)
_plain_range("zrangebylex", "lex")
_plain_range("zrevrangebylex", "lex", rev=True)


def _count_and_remove(how: str, count: str, remove: str) -> None:
    def counted(model: Model, key: bytes, low: bytes, high: bytes) -> Answer:
        return len(between(model, key, low, high, how))

    def removed(model: Model, key: bytes, low: bytes, high: bytes) -> Answer:
        return sum(model.ztake(key, member) for _, member in between(model, key, low, high, how))

    counted.__name__, removed.__name__ = count, remove
    if count:
        command(counted)
    command(removed)


_count_and_remove("score", "zcount", "zremrangebyscore")
_count_and_remove("lex", "zlexcount", "zremrangebylex")
_count_and_remove("rank", "", "zremrangebyrank")


# -- members ----------------------------------------------------------------------------------------------


def _sum(old: float, change: float) -> float:
    total = old + change
    if isnan(total):
        raise Wrong("ERR resulting score is not a number (NaN)")
    return total + 0.0


@command
def zadd(model: Model, key: bytes, *tokens: bytes) -> Answer:
    words = list(tokens)
    chosen = set()
    while words and words[0].upper() in (b"NX", b"XX", b"GT", b"LT", b"CH", b"INCR"):
        chosen.add(words.pop(0).upper())
    if not words or len(words) % 2 or {b"NX", b"XX"} <= chosen or len(chosen & {b"NX", b"GT", b"LT"}) > 1:
        raise Wrong("ERR ")
    if b"INCR" in chosen and len(words) > 2:
        raise Wrong("ERR ")
    pairs = [(score(text), member) for text, member in zip(words[::2], words[1::2], strict=True)]
    model.zset(key)
    added = changed = 0
    result: float | None = None
    for given, member in pairs:
        old = model.zset(key).get(member)
        new = _sum(old, given) if old is not None and b"INCR" in chosen and b"NX" not in chosen else given
        if (
            (old is None and b"XX" in chosen)
            or (old is not None and b"NX" in chosen)
            or (old is not None and b"GT" in chosen and new <= old)
            or (old is not None and b"LT" in chosen and new >= old)
        ):
            continue
        result = new
        added += old is None
        changed += new != old
        model.zput(key, new, member)
    if b"INCR" in chosen:
        return result
    return changed if b"CH" in chosen else added


@command
def zincrby(model: Model, key: bytes, change: bytes, member: bytes) -> Answer:
    given = score(change)
    old = model.zset(key).get(member)
    new = given if old is None else _sum(old, given)
    model.zput(key, new, member)
    return new


@command
def zrem(model: Model, key: bytes, *members: bytes) -> Answer:
    model.zset(key)
    return sum(model.ztake(key, member) for member in members)


@command
def zcard(model: Model, key: bytes) -> Answer:
    return len(model.zset(key))


@command
def zscore(model: Model, key: bytes, member: bytes) -> Answer:
    return model.zset(key).get(member)


@command
def zmscore(model: Model, key: bytes, *members: bytes) -> Answer:
    return list(map(model.zset(key).get, members))


def _rank(model: Model, key: bytes, member: bytes, *, highest: bool) -> Answer:
    members = [one for _, one in sorted(model.ordered(key), reverse=highest)]
    return members.index(member) if member in members else None


@command
def zrank(model: Model, key: bytes, member: bytes) -> Answer:
    return _rank(model, key, member, highest=False)


@command
def zrevrank(model: Model, key: bytes, member: bytes) -> Answer:
    return _rank(model, key, member, highest=True)


def _pop(model: Model, key: bytes, counts: tuple[bytes, ...], *, highest: bool) -> Answer:
    count = integer(counts[0]) if counts else 1
    if count < 0:
        raise Wrong("ERR value is out of range")
    pairs = sorted(model.ordered(key), reverse=highest)[:count]
    for _, member in pairs:
        model.ztake(key, member)
    return flat(pairs)


@command
def zpopmin(model: Model, key: bytes, *counts: bytes) -> Answer:
    return _pop(model, key, counts, highest=False)


@command
def zpopmax(model: Model, key: bytes, *counts: bytes) -> Answer:
    return _pop(model, key, counts, highest=True)


def _items(reply: Reply) -> list[bytes | None]:
    return decode_list(reply[1]) if reply[0] == LIST else [None]


@command
def zrandmember(model: Model, key: bytes, *options: bytes) -> Answer:
    """By chance: only what is drawn, and how often, is known."""
    if len(options) == 2 and options[1].upper() != b"WITHSCORES":
        raise Wrong("ERR syntax error")
    count = integer(options[0]) if options else 1
    if count < -(1 << 20):
        raise Wrong("ERR value is out of range")
    members = dict(model.zset(key))
    if not options:
        return (lambda reply: reply[0] == 0 and reply[1] in members) if members else None

    def right(reply: Reply) -> bool:
        items = _items(reply)
        drawn = items[:: len(options)]
        scores = [repr(members[one]).encode() for one in drawn if one in members] if len(options) == 2 else []
        return (
            all(one in members for one in drawn)
            and len(drawn) == ((-count if members else 0) if count < 0 else min(count, len(members)))
            and (count < 0 or not drawn or max(Counter(drawn).values()) == 1)
            and (len(options) == 1 or items[1::2] == scores)
        )

    return right


@command
def zscan(model: Model, key: bytes, cursor: bytes, *options: bytes) -> Answer:
    """Only of one step that gets all is it known what it finds, and not in which order."""
    integer(cursor)
    members = dict(model.zset(key))
    if members and len(options) != 2:
        raise Wrong("ERR syntax error")

    def right(reply: Reply) -> bool:
        items = _items(reply)
        found = dict(zip(items[1::2], items[2::2], strict=True))
        wanted = {member: repr(value).encode() for member, value in members.items()}
        return items[0] == b"0" and len(items) == 1 + 2 * len(wanted) and found == wanted

    return right


# -- several sets -------------------------------------------------------------------------------------------

Scores = dict[bytes, float]


def _plus(one: float, other: float) -> float:
    return 0.0 if isnan(one + other) else one + other + 0.0


AGGREGATES: dict[bytes, Callable[[float, float], float]] = {b"SUM": _plus, b"MIN": min, b"MAX": max}


def _combined(model: Model, kind: str, tokens: tuple[bytes, ...], *, stored: bool) -> tuple[list[Pair], bool]:
    """Return the result of ``union``, ``inter`` or ``diff``, in order, and whether scores are asked for."""
    count = integer(tokens[0])
    if not 1 <= count < len(tokens):
        raise Wrong("ERR ")
    keys, words = tokens[1 : count + 1], list(tokens[count + 1 :])
    if any(model.kind(key) is bytes for key in keys):
        for key in keys:
            model.zset(key)
    weights, aggregate, scores = [1.0] * count, AGGREGATES[b"SUM"], False
    while words:
        word = words.pop(0).upper()
        if word == b"WITHSCORES" and not stored:
            scores = True
        elif word == b"WEIGHTS" and kind != "diff" and len(words) >= count:
            weights = [score(words.pop(0)) for _ in keys]
        elif word == b"AGGREGATE" and kind != "diff" and words and words[0].upper() in AGGREGATES:
            aggregate = AGGREGATES[words.pop(0).upper()]
        else:
            raise Wrong("ERR ")
    sets: list[Scores] = [
        {m: 0.0 if isnan(s * weight) else s * weight + 0.0 for m, s in model.zset(key).items()}
        for key, weight in zip(keys, weights, strict=True)
    ]
    if kind == "diff":
        found = {m: s for m, s in sets[0].items() if not any(m in other for other in sets[1:])}
        return sorted((s, m) for m, s in found.items()), scores
    found = {}
    for one in sorted(sets, key=len):  # small ones first, as in Redis: of inf and -inf that matters
        for member, value in one.items():
            found[member] = aggregate(found[member], value) if member in found else value
    if kind == "inter":
        found = {m: s for m, s in found.items() if all(m in other for other in sets)}
    return sorted((s, m) for m, s in found.items()), scores


def _algebra(kind: str) -> None:
    def answered(model: Model, *tokens: bytes) -> Answer:
        pairs, scores = _combined(model, kind, tokens, stored=False)
        return flat(pairs, scores=scores)

    def stored(model: Model, to: bytes, *tokens: bytes) -> Answer:
        pairs, _ = _combined(model, kind, tokens, stored=True)
        model.drop(to)
        for value, member in pairs:
            model.zput(to, value, member)
        return len(pairs)

    answered.__name__, stored.__name__ = f"z{kind}", f"z{kind}store"
    command(answered)
    command(stored)


for _kind in ("union", "inter", "diff"):
    _algebra(_kind)


@command
def zintercard(model: Model, *tokens: bytes) -> Answer:
    count = integer(tokens[0])
    if not 1 <= count < len(tokens):
        raise Wrong("ERR ")
    words = tokens[count + 1 :]
    if words and (len(words) != 2 or words[0].upper() != b"LIMIT" or integer(words[1]) < 0):
        raise Wrong("ERR ")
    found, _ = _combined(model, "inter", tokens[: count + 1], stored=False)
    limit = integer(words[1]) if words else 0
    return min(len(found), limit) if limit else len(found)
