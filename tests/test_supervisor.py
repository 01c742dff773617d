"""What the supervisor decides, where real processes (tests/system) would have to be too exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from imds.config import Config
from imds.datadir import DataDir
from imds.supervisor import Child, Supervisor


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """One that only notes what it starts, in ``started``."""
    made: Any = Supervisor(Config(shards=2), cast(DataDir, None), [])
    made.started = []
    monkeypatch.setattr(made, "_start_at_log", lambda child: made.started.append((child.role, child.index)))
    yield made
    made._selector.close()
    made._signals.close()


@pytest.mark.parametrize(
    ("code", "answered", "starts", "fails"),
    [
        (0, False, 1, 0),  # it ended just when it was given work, and had not heard of it
        (0, True, 0, 0),
        (-9, False, 0, 1),
        (-9, True, 0, 0),
    ],
)
def test_the_end_of_a_rewriter(
    supervisor: Any, caplog: pytest.LogCaptureFixture, code: int, answered: bool, starts: int, fails: int
) -> None:
    supervisor._rewrites.ask(1, 0.0)
    assert supervisor._rewrites.start(0.0, {1}) == 1
    rewriter: Child = supervisor._rewriter
    rewriter.index, rewriter.ready = 1, answered
    supervisor._on_death(rewriter, code)
    assert supervisor.started == [("rewriter", 1)] * starts
    assert len([one for one in caplog.records if "was not rewritten" in one.message]) == fails


def test_a_rewriter_whose_shard_has_died_is_not_started_anew(supervisor: Any) -> None:
    supervisor._rewriter.index, supervisor._rewriter.ready = 1, False
    supervisor._on_death(supervisor._rewriter, 0)
    assert supervisor.started == []
