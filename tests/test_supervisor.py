"""What the supervisor decides, where real processes (tests/system) would have to be too exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast
from unittest.mock import Mock

import pytest

from imds.config import Config
from imds.datadir import DataDir
from imds.supervisor import Supervisor


@pytest.fixture
def supervisor() -> Iterator[Any]:
    """One whose shards are ready, and hear what it says."""
    made: Any = Supervisor(Config(shards=2), cast(DataDir, None), [])
    for shard in made._shards:
        shard.ready, shard.channel = True, Mock()
    yield made
    made._selector.close()
    made._signals.close()


def told(shard: Any) -> list[str]:
    return [call.args[0] for call in shard.channel.send.call_args_list]


def test_one_shard_rewrites_its_log_at_a_time(supervisor: Any) -> None:
    first, second = supervisor._shards
    for shard in (first, second):
        supervisor._rewrites.ask(shard.index, 0.0)
    supervisor._begin_rewrite()
    supervisor._begin_rewrite()
    assert (told(first), told(second)) == (["rewrite"], [])
    supervisor._on_rewritten(second, "")  # a word that comes too late changes nothing
    supervisor._begin_rewrite()
    assert told(second) == []
    supervisor._on_rewritten(first, "")
    supervisor._begin_rewrite()
    assert (told(first), told(second)) == (["rewrite"], ["rewrite"])


def test_a_shard_that_does_not_listen_lets_the_other_one_go_on(
    supervisor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = supervisor._shards
    for shard in (first, second):
        supervisor._rewrites.ask(shard.index, 0.0)
    first.channel.send.return_value = False
    supervisor._begin_rewrite()
    assert [one for one in caplog.records if "was not rewritten: the shard does not listen" in one.message]
    supervisor._begin_rewrite()
    assert told(second) == ["rewrite"]


def test_a_shard_that_dies_ends_its_turn(supervisor: Any) -> None:
    first, second = supervisor._shards
    supervisor._selector = Mock()
    for shard in (first, second):
        supervisor._rewrites.ask(shard.index, 0.0)
    supervisor._begin_rewrite()
    supervisor._close_channel(first)
    supervisor._begin_rewrite()
    assert told(second) == ["rewrite"]
