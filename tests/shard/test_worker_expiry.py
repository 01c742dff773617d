"""Keys that nobody asks for after their deadline: the worker removes them, and logs that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_worker import DEADLINE, Shard

from imds.protocol import ERROR, OK
from imds.shard import worker


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Shard]]:
    """Return a function that starts a shard on the same directory, after the one before has been stopped."""
    running: list[Shard] = []

    def make() -> Shard:
        while running:
            running.pop().stop()
        running.append(Shard(tmp_path, "no"))
        return running[-1]

    yield make
    while running:
        running.pop().stop()


def stats(shard: Shard) -> dict[str, Any]:
    ((status, payload),) = shard.ask((b"stats",))
    assert status == OK
    found: dict[str, Any] = json.loads(payload)
    return found


def wait(shard: Shard, keys: int) -> dict[str, Any]:
    """Wait until there are so many keys; ``stats`` looks at none of them."""
    end = time.monotonic() + DEADLINE
    while (found := stats(shard))["keys"] != keys:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_more_than_one_look_removes_and_what_stays(start: Callable[[], Shard]) -> None:
    shard, many = start(), 3 * worker.EXPIRE_MOST + 7
    shard.ask(*[(b"set", b"k%d" % number, b"v", b"px", b"300") for number in range(many)])
    shard.ask((b"set", b"stays", b"v", b"px", b"600000"), (b"set", b"for ever", b"v"))
    assert stats(shard)["keys"] == many + 2
    found = wait(shard, 2)
    assert (found["expirations"], found["keys_with_deadline"]) == (many, 1)
    ((_, deadline),) = shard.ask((b"pexpiretime", b"stays"))
    shard = start()
    found = stats(shard)
    assert (found["keys"], found["expirations"]) == (2, 0), "their end was in the log"
    assert shard.ask((b"pexpiretime", b"stays")) == [(OK, deadline)]


def test_what_is_over_when_the_log_is_loaded(
    start: Callable[[], Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = start()
    monkeypatch.setattr(worker, "EXPIRE_MOST", 0)  # as if it had died before it could
    monkeypatch.setattr(worker, "LOADED_MOST", 5)
    shard.ask(
        *[(b"set", b"k%d" % number, b"v", b"px", b"30") for number in range(12)], (b"set", b"stays", b"v")
    )
    time.sleep(0.05)
    assert stats(shard)["keys"] == 13
    shard = start()
    found = stats(shard)
    assert (found["keys"], found["expirations"], found["keys_with_deadline"]) == (1, 12, 0)


def test_a_disk_that_takes_nothing_keeps_them_and_nobody_sees_them(
    start: Callable[[], Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PROBE_EVERY", 0.05)
    shard = start()
    shard.ask((b"set", b"k", b"v", b"px", b"200"), (b"set", b"stays", b"v"))
    shard.disk.fails = {"write"}
    ((status, text),) = shard.ask((b"set", b"other", b"v"))
    assert (status, text[:9]) == (ERROR, b"READONLY ")
    time.sleep(0.25)
    assert shard.ask((b"exists", b"k", b"stays"), (b"pttl", b"k")) == [(OK, b"1"), (OK, b"-2")]
    assert stats(shard)["keys"] == 2, "memory holds what the log does"
    shard.disk.fails = set()
    assert wait(shard, 1)["expirations"] == 1


def test_a_refused_removal_is_undone_and_made_later(
    start: Callable[[], Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes nothing at the very moment at which the worker wants to log the end of a key."""
    monkeypatch.setattr(worker, "PROBE_EVERY", 0.3)
    shard = start()
    shard.ask((b"set", b"k", b"v", b"px", b"150"))
    shard.disk.fails = {"write"}
    end = time.monotonic() + DEADLINE
    while not (found := stats(shard))["readonly"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (found["keys"], found["expirations"], found["keys_with_deadline"]) == (1, 0, 1)
    shard.disk.fails = set()
    assert wait(shard, 0)["expirations"] == 1
