"""Unions, intersections and differences of sorted sets. How a command is written: ``keyspace.py``.

Each takes O(members of all its sets), in one go: the shard does nothing else meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isnan

from imds.shard.arguments import integer, score, syntax
from imds.shard.keyspace import Item, Keyspace, Pair, command, error
from imds.shard.zsets import flat

Scores = dict[bytes, float]


def _add(one: float, other: float) -> float:
    total = one + other
    return 0.0 if isnan(total) else total + 0.0  # of inf and -inf, as Redis has it


_AGGREGATES: dict[bytes, Callable[[float, float], float]] = {b"SUM": _add, b"MIN": min, b"MAX": max}


def union(sets: list[Scores], aggregate: Callable[[float, float], float]) -> Scores:
    """Return the members of any of the sets, small sets first, as in Redis: of inf and -inf it matters."""
    found: Scores = {}
    for scores in sorted(sets, key=len):
        for member, number in scores.items():
            found[member] = aggregate(found[member], number) if member in found else number
    return found


def intersection(sets: list[Scores], aggregate: Callable[[float, float], float]) -> Scores:
    """Return the members of all of the sets."""
    found, *_ = sets = sorted(sets, key=len)
    common = [member for member in found if all(member in scores for scores in sets)]
    return {member: _fold([scores[member] for scores in sets], aggregate) for member in common}


def difference(sets: list[Scores], _aggregate: Callable[[float, float], float]) -> Scores:
    """Return the members of the first set that are in none of the others."""
    first, *others = sets
    return {m: number for m, number in first.items() if not any(m in scores for scores in others)}


def _fold(numbers: list[float], aggregate: Callable[[float, float], float]) -> float:
    total = numbers[0]
    for number in numbers[1:]:
        total = aggregate(total, number)
    return total


Operation = Callable[[list[Scores], Callable[[float, float], float]], Scores]


def _keys(name: str, numkeys: bytes, tokens: tuple[bytes, ...]) -> tuple[tuple[bytes, ...], list[bytes]]:
    """Return the keys, as many as ``numkeys`` says, and the options behind them."""
    count = integer(numkeys)
    if count < 1:
        raise error(f"ERR at least 1 input key is needed for '{name}' command")
    if count > len(tokens):
        raise syntax()
    return tokens[:count], list(tokens[count:])


def _combine(
    store: Keyspace, name: str, operation: Operation, tokens: tuple[bytes, ...], store_it: bool
) -> tuple[list[Pair], bool]:
    """Return the result in order, and whether WITHSCORES was said."""
    keys, options = _keys(name, tokens[0], tokens[1:])
    if any(store.kind(key) == "string" for key in keys):
        for key in keys:
            store.members(key)  # one of them refuses
    weights, aggregate, with_scores = [1.0] * len(keys), _AGGREGATES[b"SUM"], False
    while options:
        option = options.pop(0).upper()
        if operation is difference and option != b"WITHSCORES":
            raise syntax()
        if option == b"WEIGHTS" and len(options) >= len(keys):
            weights = [score(options.pop(0), "ERR weight value is not a float") for _ in keys]
        elif option == b"AGGREGATE" and options and options[0].upper() in _AGGREGATES:
            aggregate = _AGGREGATES[options.pop(0).upper()]
        elif option == b"WITHSCORES" and not store_it:
            with_scores = True
        else:
            raise syntax()
    sets = [_weighted(store, key, weight) for key, weight in zip(keys, weights, strict=True)]
    found = operation(sets, aggregate)
    return sorted((number, member) for member, number in found.items()), with_scores


def _weighted(store: Keyspace, key: bytes, weight: float) -> Scores:
    scores = {member: number for number, member in store.zslice(key, 0, store.members(key))}
    if weight != 1.0:
        for member, number in scores.items():
            product = number * weight
            scores[member] = 0.0 if isnan(product) else product + 0.0
    return scores


def _answer(store: Keyspace, name: str, operation: Operation, tokens: tuple[bytes, ...]) -> list[Item]:
    pairs, with_scores = _combine(store, name, operation, tokens, False)
    return flat(pairs) if with_scores else [member for _score, member in pairs]


def _save(store: Keyspace, name: str, to: bytes, operation: Operation, tokens: tuple[bytes, ...]) -> int:
    pairs, _ = _combine(store, name, operation, tokens, True)
    store.remove(to)
    for number, member in pairs:
        store.zput(to, number, member)
    return len(pairs)


@command
def zunion(store: Keyspace, *tokens: bytes) -> list[Item]:
    """Return the members of any of the sets, with weighted and aggregated scores."""
    return _answer(store, "zunion", union, tokens)


@command
def zinter(store: Keyspace, *tokens: bytes) -> list[Item]:
    """Return the members of all of the sets, with weighted and aggregated scores."""
    return _answer(store, "zinter", intersection, tokens)


@command
def zdiff(store: Keyspace, *tokens: bytes) -> list[Item]:
    """Return the members of the first set that are in no other."""
    return _answer(store, "zdiff", difference, tokens)


@command
def zunionstore(store: Keyspace, to: bytes, *tokens: bytes) -> int:
    """Make a key hold the union, whatever it held; return its size."""
    return _save(store, "zunionstore", to, union, tokens)


@command
def zinterstore(store: Keyspace, to: bytes, *tokens: bytes) -> int:
    """Make a key hold the intersection."""
    return _save(store, "zinterstore", to, intersection, tokens)


@command
def zdiffstore(store: Keyspace, to: bytes, *tokens: bytes) -> int:
    """Make a key hold the difference."""
    return _save(store, "zdiffstore", to, difference, tokens)


@command
def zintercard(store: Keyspace, *tokens: bytes) -> int:
    """Return the size of the intersection."""
    keys, options = _keys("zintercard", tokens[0], tokens[1:])
    limit = 0
    while options:
        if options.pop(0).upper() != b"LIMIT" or not options:
            raise syntax()
        limit = integer(options.pop(0), "ERR LIMIT can't be negative")
        if limit < 0:
            raise error("ERR LIMIT can't be negative")
    found = len(intersection([_weighted(store, key, 1.0) for key in keys], _add))
    return min(found, limit) if limit else found
