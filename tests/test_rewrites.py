"""Whose log is rewritten when: one at a time, everybody once, failures later."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from imds.rewrites import FIRST_PAUSE, LONGEST_PAUSE, Rewrites

ALL = {0, 1, 2, 3}


def test_one_at_a_time_in_the_order_of_asking() -> None:
    rewrites = Rewrites()
    assert rewrites.start(0, ALL) is None
    assert rewrites.wait(0) is None
    for shard in (2, 0, 1, 2):
        rewrites.ask(shard, 10)
    assert rewrites.wait(4) == 6
    assert rewrites.wait(11) == 0
    assert rewrites.start(9, ALL) is None, "it is not due"
    order = []
    for _ in range(3):
        shard = rewrites.start(10, ALL)
        assert shard == rewrites.running
        assert rewrites.start(10, ALL) is None, "one at a time"
        assert rewrites.wait(10) is None
        order.append(shard)
        rewrites.succeeded()
    assert order == [2, 0, 1]
    assert rewrites.start(99, ALL) is None


def test_who_is_not_able_is_passed_over() -> None:
    rewrites = Rewrites()
    rewrites.ask(0, 0)
    rewrites.ask(1, 0)
    assert rewrites.start(0, {1, 3}) == 1
    rewrites.succeeded()
    assert rewrites.start(0, {1, 3}) is None
    assert rewrites.start(0, {0}) == 0


def test_a_failure_is_not_tried_again_at_once() -> None:
    rewrites = Rewrites()
    rewrites.ask(0, 0)
    now, pauses = 0.0, []
    for _ in range(10):
        assert rewrites.start(now, ALL) == 0
        pause = rewrites.failed(now)
        assert rewrites.start(now + pause - 0.1, ALL) is None
        rewrites.ask(0, now)  # asking again does not help
        assert rewrites.wait(now) == pause
        pauses.append(pause)
        now += pause
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE
    rewrites.ask(0, now - 100, at_once=True)  # but a person may
    assert rewrites.start(now - 100, ALL) == 0
    rewrites.succeeded()
    rewrites.ask(0, 0)
    assert rewrites.start(0, ALL) == 0
    assert rewrites.failed(0) == FIRST_PAUSE, "a success ends the succession"


def test_others_go_before_who_has_failed() -> None:
    rewrites = Rewrites()
    rewrites.ask(0, 0)
    rewrites.ask(1, 0)
    assert rewrites.start(0, ALL) == 0
    later = rewrites.failed(0)
    assert rewrites.start(later, ALL) == 1
    rewrites.succeeded()
    assert rewrites.start(later, ALL) == 0


def test_who_is_gone_is_forgotten() -> None:
    rewrites = Rewrites()
    rewrites.ask(0, 0)
    rewrites.ask(1, 0)
    rewrites.forget(1)
    assert rewrites.start(0, ALL) == 0
    rewrites.forget(0)
    assert rewrites.running is None
    assert rewrites.wait(0) is None
    rewrites.forget(3)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "once", "start", "good", "bad", "forget", "later"]), st.integers(0, 3)
        ),
        max_size=60,
    )
)
def test_nobody_waits_for_ever(steps: list[tuple[str, int]]) -> None:
    """Whatever has happened, all that has asked gets its turn when nothing fails any more."""
    rewrites, now, asked = Rewrites(), 0.0, set()
    for step, shard in steps:
        if step in ("ask", "once"):
            rewrites.ask(shard, now, at_once=step == "once")
            asked.add(shard)
        elif step == "start":
            started = rewrites.start(now, ALL)
            assert started is None or started in asked
        elif step == "later":
            now += 7
        elif step == "forget":
            rewrites.forget(shard)
            asked.discard(shard)
        elif rewrites.running is not None:
            if step == "good":
                asked.discard(rewrites.running)
                rewrites.succeeded()
            else:
                rewrites.failed(now)
    if rewrites.running is not None:
        rewrites.failed(now)
    while asked:
        wait = rewrites.wait(now)
        assert wait is not None
        assert wait <= LONGEST_PAUSE
        now += wait
        shard_now = rewrites.start(now, ALL)
        assert shard_now is not None
        asked.remove(shard_now)
        rewrites.succeeded()
    assert rewrites.wait(now) is None
