"""Slow calls beside a loop: one at a time, and their ends are told in the loop's thread."""

from __future__ import annotations

import select
import threading

import pytest

from imds.shard.background import Background


def wait(background: Background) -> None:
    assert select.select([background], [], [], 20)[0]
    background.finish()


def test_ends_are_told_in_the_loops_thread() -> None:
    background, told, threads = Background(), [], []
    go = threading.Event()

    def slow() -> None:
        assert go.wait(20)
        threads.append(threading.current_thread())

    def fails() -> None:
        raise OSError("no room")

    def then(error: BaseException | None) -> None:
        told.append((error, threading.current_thread()))

    background.start(slow, then)
    assert not select.select([background], [], [], 0.05)[0]
    with pytest.raises(AssertionError, match="one at a time"):
        background.start(slow, then)
    go.set()
    wait(background)
    assert told == [(None, threading.current_thread())]
    assert threads != [threading.current_thread()]
    background.start(fails, lambda error: background.start(slow, then) if error else None)
    wait(background)  # whoever is told may start the next one
    wait(background)
    assert len(told) == 2
    background.start(fails, then)
    wait(background)
    assert str(told[2][0]) == "no room"
    background.close()


def test_closed_while_a_call_is_made() -> None:
    background = Background()
    go, over = threading.Event(), threading.Event()

    def slow() -> None:
        go.wait(20)
        over.set()

    background.start(slow, lambda error: pytest.fail("nobody wants to know"))
    background.close()
    go.set()
    assert over.wait(20)
