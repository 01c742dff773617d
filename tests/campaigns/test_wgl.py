"""The linearizability checker: known good and bad histories, and a comparison with trying every order."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.wgl import NEVER, Operation, check


def w(start: float, end: float, value: object, client: int = 0) -> Operation:
    return Operation(client, start, end, True, value)


def r(start: float, end: float, value: object, client: int = 0) -> Operation:
    return Operation(client, start, end, False, value)


GOOD = {
    "nothing": [],
    "read of the initial value": [r(0, 1, None)],
    "one after the other": [w(0, 1, "a"), r(2, 3, "a"), w(4, 5, "b"), r(6, 7, "b")],
    "read before a write that runs": [w(0, 9, "a"), r(1, 2, None), r(3, 4, "a"), r(5, 6, "a")],
    "two writes at once, either order": [w(0, 5, "a"), w(0, 5, "b"), r(6, 7, "a")],
    "two writes at once, the other order": [w(0, 5, "a"), w(0, 5, "b"), r(6, 7, "b")],
    "unknown write that was done": [w(0, 1, "a"), w(2, NEVER, "b"), r(3, 4, "b")],
    "unknown write that was not done": [w(0, 1, "a"), w(2, NEVER, "b"), r(3, 4, "a")],
    "unknown write that was done late": [
        w(0, 1, "a"),
        w(2, NEVER, "b"),
        w(3, 4, "c"),
        r(5, 6, "c"),
        r(7, 8, "b"),
    ],
    "delete of unknown outcome": [w(0, 1, "a"), w(2, NEVER, None), r(3, 4, "a"), r(5, 6, None)],
    "touching intervals": [w(0, 1, "a"), r(1, 2, None)],
    "many at once": [w(0, 100, n) for n in range(12)] + [r(101 + n, 101.5 + n, 7) for n in range(3)],
}
BAD = {
    "value that nobody wrote": [r(0, 1, "x")],
    "lost write": [w(0, 1, "a"), r(2, 3, None)],
    "lost second write": [w(0, 1, "a"), w(2, 3, "b"), r(4, 5, "a")],
    "read from the future": [r(0, 1, "a"), w(2, 3, "a")],
    "back to the old value": [w(0, 9, "a"), r(1, 2, "a"), r(3, 4, None)],
    "two readers disagree": [w(0, 1, "a"), w(2, 9, "b"), r(3, 4, "b"), r(5, 6, "a")],
    "two orders of two writes": [w(0, 5, "a"), w(0, 5, "b"), r(6, 7, "a"), r(8, 9, "b")],
    "unknown write that comes and goes": [w(0, 1, "a"), w(2, NEVER, "b"), r(3, 4, "b"), r(5, 6, "a")],
    "unknown write before its call": [r(0, 1, "b"), w(2, NEVER, "b")],
    "deleted and back": [w(0, 1, "a"), w(2, 3, None), r(4, 5, "a")],
    "lost among many": [w(n, n + 0.5, n) for n in range(30)] + [r(40, 41, 28)],
}


@pytest.mark.parametrize("name", GOOD)
def test_good(name):
    assert check(GOOD[name]) == "linearizable"
    assert check(GOOD[name][::-1]) == "linearizable"


@pytest.mark.parametrize("name", BAD)
def test_bad(name):
    assert check(BAD[name]) == "not linearizable"
    assert check(BAD[name][::-1]) == "not linearizable"


def test_giving_up_is_no_verdict():
    history = [w(0, 100, n % 3) for n in range(9)] + [r(50, 150, n % 3) for n in range(9)]
    history.append(r(200, 201, "x"))
    assert check(history, steps=100) == "undecided"
    assert check(history) == "not linearizable"


def brute(history):
    """Decide by trying every order of every subset of the open writes."""
    open_ = [one for one in history if one.write and one.end == NEVER]
    closed = [one for one in history if one.end != NEVER]
    for size in range(len(open_) + 1):
        for chosen in combinations(open_, size):
            for order in permutations([*closed, *chosen]):
                value = None
                for place, one in enumerate(order):
                    if any(later.end < one.start for later in order[place + 1 :]):
                        break
                    if one.write:
                        value = one.value
                    elif one.value != value:
                        break
                else:
                    return "linearizable"
    return "not linearizable"


@st.composite
def operations(draw):
    start = draw(st.integers(0, 8))
    end = draw(st.one_of(st.integers(start, start + 6), st.just(NEVER)))
    write = draw(st.booleans())
    return Operation(draw(st.integers(0, 3)), start, end, write, draw(st.sampled_from([None, "a", "b"])))


@settings(max_examples=400, deadline=None)
@given(st.lists(operations(), max_size=6))
def test_as_trying_every_order(history):
    assert check(history) == brute(history)


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(10, 120))
def test_what_a_register_does_is_linearizable(rng, count):
    """Clients that take effect at a moment of their own, between call and return; some never return."""
    points = sorted(rng.uniform(0, 100) for _ in range(count))
    value, history = None, []
    for number, at in enumerate(points):
        start, end = at - rng.expovariate(0.3), at + rng.expovariate(0.3)
        if rng.random() < 0.5:
            value = number
            history.append(w(start, NEVER if rng.random() < 0.1 else end, value))
        else:
            history.append(r(start, end, value))
    for _ in range(3):
        history.append(w(rng.uniform(0, 100), NEVER, "never done"))
    assert check(history) == "linearizable"
