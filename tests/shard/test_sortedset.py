"""Sorted sets against sorted()."""

from __future__ import annotations

import random
import tracemalloc
from math import inf, nan

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from imds.shard import sortedset


@pytest.fixture(scope="module")
def new(variant):
    return variant.pick(sortedset.SortedSet, "sortedset")


# Few members and few scores, so that they meet; and some of every kind of double.
members = st.binary(max_size=3) | st.integers(0, 99).map(lambda number: b"%d" % number)
scores = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, inf, -inf]) | st.floats(allow_nan=False)


class Model(RuleBasedStateMachine):
    """A sorted set beside a dict."""

    new = None

    def __init__(self):
        super().__init__()
        self.set = self.new()
        self.model = {}

    def pairs(self):
        return sorted((score, member) for member, score in self.model.items())

    @rule(member=members, score=scores)
    def add(self, member, score):
        before = self.model.get(member)
        expected = True if before is None else None if before == score else False
        assert self.set.add(member, score) is expected
        self.model[member] = score

    @rule(start=st.integers(0, 2000), count=st.integers(1, 300), score=scores)
    def add_many(self, start, count, score):
        """Enough for chunks to split and for a hash table to be made."""
        for number in range(start, start + count):
            self.set.add(b"%06d" % number, score)
            self.model[b"%06d" % number] = score

    @rule(keep=st.integers(0, 40))
    def remove_all_but(self, keep):
        for member in list(self.model)[keep:]:
            assert self.set.remove(member)
            del self.model[member]

    @rule(member=members)
    def remove(self, member):
        assert self.set.remove(member) is (member in self.model)
        self.model.pop(member, None)

    @rule(member=members)
    def ask(self, member):
        score = self.model.get(member)
        assert self.set.score(member) == score
        rank = None if score is None else self.pairs().index((score, member))
        assert self.set.rank(member) == rank

    @rule(low=scores, high=scores)
    def slice(self, low, high):
        found = list(self.set.range(low, high))
        assert found == [pair for pair in self.pairs() if low <= pair[0] <= high]

    @invariant()
    def same(self):
        self.set.check()
        assert len(self.set) == len(self.model)
        assert list(self.set.range(-inf, inf)) == self.pairs()


def test_random_operations_match_a_dict(new):
    machine = type("Machine", (Model,), {"new": new})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_ranks_and_ranges_of_many_members(new):
    """Enough members for several levels and for many chunks; every rank, and ranges that start anywhere."""
    dice = random.Random(5)
    pairs = {b"m%05d" % number: float(dice.randrange(2000)) for number in range(6000)}
    ranks = new()
    for member, score in dice.sample(sorted(pairs.items()), len(pairs)):
        assert ranks.add(member, score) is True
    ordered = sorted((score, member) for member, score in pairs.items())
    for _ in range(2):
        ranks.check()
        for rank, (_score, member) in enumerate(ordered):
            assert ranks.rank(member) == rank
        for _ in range(50):
            low = dice.choice([dice.uniform(-10, 2010), dice.choice(ordered)[0]])
            high = low + dice.choice([dice.uniform(0, 60), dice.randrange(60)])
            assert list(ranks.range(low, high)) == [pair for pair in ordered if low <= pair[0] <= high]
        for score, member in dice.sample(ordered, min(len(ordered), 5500)):
            assert ranks.score(member) == score
            assert ranks.remove(member)
            ordered.remove((score, member))


@pytest.mark.parametrize("scores", [1, 7, 100_000])
def test_members_come_move_and_go(new, scores):
    """Chunks are split at their ends and in the middle, thin out, join, and end; many of a score, or few."""
    dice = random.Random(scores)
    ranks, model = new(), {}
    for most, steps, chance in ((2000, 4000, 0.1), (2000, 3000, 0.75), (300, 3000, 0.45), (40, 2000, 0.7)):
        for step in range(steps):
            member = b"%d" % dice.randrange(most)
            if dice.random() < chance:
                member = dice.choice(list(model)) if model and step % 4 else member
                assert ranks.remove(member) is (model.pop(member, None) is not None)
            else:
                score = float(dice.randrange(scores) if step % 16 else step * dice.choice((-1, 1)))
                before = model.get(member)
                expected = True if before is None else None if before == score else False
                assert ranks.add(member, score) is expected
                model[member] = score
            if step % 50 == 0:
                ranks.check()
                assert list(ranks.range(-inf, inf)) == sorted((s, m) for m, s in model.items())
    for member in list(model):
        assert ranks.remove(member)
        ranks.check()
    assert len(ranks) == 0


ORDERS = {
    "up": lambda numbers: numbers,
    "down": lambda numbers: numbers[::-1],
    "at random": lambda numbers: random.Random(3).sample(numbers, len(numbers)),
    "from the middle": lambda numbers: numbers[len(numbers) // 2 :] + numbers[: len(numbers) // 2][::-1],
    "one in twenty last": lambda numbers: sorted(numbers, key=lambda number: number % 20 == 0),
}


@pytest.mark.parametrize("going", ORDERS)
@pytest.mark.parametrize("coming", ["up", "down", "at random"])
def test_members_come_and_go_in_this_order(new, coming, going):
    """Every level of a large set grows and ends, from either side or everywhere; some come back meanwhile."""
    numbers = list(range(7000))
    ranks = new()
    for number in ORDERS[coming](numbers):
        assert ranks.add(b"%05d" % number, float(number)) is True
    model = {b"%05d" % number: float(number) for number in numbers}
    for step, number in enumerate(ORDERS[going](numbers)):
        assert ranks.remove(b"%05d" % number)
        del model[b"%05d" % number]
        if step % 7 == 0:
            ranks.add(b"back", number - 0.5)
            model[b"back"] = number - 0.5
        if step % 500 == 0:
            ranks.check()
            assert list(ranks.range(-inf, inf)) == sorted((s, m) for m, s in model.items())
    ranks.check()
    assert list(ranks.range(-inf, inf)) == [(model[b"back"], b"back")]


def test_ranges_go_and_a_few_come_back_in_their_midst(new):
    """What leads to a chunk that begins earlier than it did, while chunks of links join."""
    dice = random.Random(2)
    for _ in range(4):
        ranks, model = new(), {b"%05d" % number: float(number) for number in range(8000)}
        for member, score in model.items():
            ranks.add(member, score)
        while len(model) > 300:
            low = dice.uniform(-100, 8000)
            high = low + dice.choice([30, 700, 1400])
            for member in [member for member, score in model.items() if low <= score <= high]:
                assert ranks.remove(member)
                del model[member]
            for _ in range(5):
                member, score = b"new %d" % dice.randrange(10_000), dice.uniform(low, high)
                ranks.add(member, score)
                model[member] = score
            ranks.check()
        assert list(ranks.range(-inf, inf)) == sorted((s, m) for m, s in model.items())


def test_many_members_of_one_score(new):
    ranks = new()
    members = [b"%05d" % number for number in range(3000)]
    for member in reversed(members):
        ranks.add(member, 1.0)
    for score in (0.0, 2.0):
        ranks.add(b"alone", score)
        ranks.check()
        assert list(ranks.range(1.0, 1.0)) == [(1.0, member) for member in members]
    assert [ranks.rank(member) for member in members] == list(range(3000))


def test_negative_zero_is_zero(new):
    zeros = new()
    assert zeros.add(b"b", -0.0) is True
    assert zeros.add(b"a", 0.0) is True
    assert zeros.add(b"b", 0.0) is None
    assert repr(list(zeros.range(-0.0, -0.0))) == "[(0.0, b'a'), (0.0, b'b')]"
    assert repr(zeros.score(b"b")) == "0.0"
    zeros.check()


def test_not_a_number_is_refused(new):
    ranks = new()
    with pytest.raises(ValueError, match="NaN"):
        ranks.add(b"a", nan)
    assert len(ranks) == 0
    assert list(ranks.range(nan, nan)) == list(ranks.range(nan, inf)) == []
    ranks.check()


def test_members_may_be_any_bytes(new):
    odd = [b"", b"\0", b"\0\0", b"\xff", b"a", b"a\0", b"ab", b"x" * 100_000]
    ranks = new()
    for member in reversed(odd):
        ranks.add(member, 1.0)
    assert [ranks.rank(member) for member in sorted(odd)] == list(range(len(odd)))
    assert ranks.score(b"a\0\0") is None
    for member in odd:
        assert ranks.remove(member)
        ranks.check()
    assert not ranks.remove(b"")
    assert len(ranks) == 0


def test_used_grows_and_shrinks_with_members(new):
    ranks = new()
    empty = ranks.used
    for number in range(1000):
        ranks.add(b"%08d" % number, float(number))
    assert ranks.used - empty > 1000 * 24
    for number in range(1000):
        ranks.add(b"%08d" % number, float(-number))
        assert ranks.remove(b"%08d" % number)
    assert empty <= ranks.used < empty + 512


def test_the_python_twin_counts_what_it_takes():
    """``used`` is a constant for each member; that it is honest is measured here."""
    dice = random.Random(1)
    names = [bytes(bytearray(b"%08d" % number)) for number in range(30_000)]
    dice.shuffle(names)
    tracemalloc.start()
    ranks = sortedset.SortedSet()
    for name in names:
        ranks.add(bytes(bytearray(name)), dice.random())
    names.clear()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.75 < ranks.used / taken < 1.33
