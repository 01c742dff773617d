"""The process that folds: one log, those that it is given then, and its end."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from failing_storage import FastStorage

from imds import config
from imds.config import Config
from imds.protocol import encode_request
from imds.shard.aof import Aof
from imds.shard.kernel import RecordEncoder
from imds.shard.manifest import create_log
from imds.supervisor import Child

FAST = FastStorage()
DEADLINE = 20.0  # seconds


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    """Two logs, each with one closed segment of as many records as its number says, and one that grows."""
    return [log_with(tmp_path, count) for count in (1, 2)]


@pytest.fixture
def rewriter(logs: list[Path]) -> Iterator[Any]:
    """Return a rewriter at work on the first of them, as the supervisor has it."""
    made: Any = Child("rewriter", 0)
    made.start({"config": config.to_json(Config()), **log_of(logs[0])}, [])
    yield made
    made.channel.close()
    made.process.kill()
    made.process.wait()


def answer_of(rewriter: Child) -> dict[str, Any]:
    """Return the next message."""
    assert rewriter.channel is not None
    assert select.select([rewriter.channel], [], [], DEADLINE)[0]
    ((message, _),) = rewriter.channel.receive()
    return message


def log_with(directory: Path, count: int) -> Path:
    made = directory / str(count)
    made.mkdir()
    create_log(FAST, made, shard=0, generation=1)
    aof = Aof(made, shard=0, generation=1, policy="no", storage=FAST)
    for _ in aof.load(lambda _: None):
        pass
    encoder = RecordEncoder(aof.seed, aof.sequence)
    for number in range(count):
        encoder.add(encode_request((b"set", b"key-%d" % number, b"value")))
    aof.append(encoder.pending())
    aof.prepare_switch()
    aof.switch()
    aof.settle()
    aof.close()
    return made


def log_of(directory: Path) -> dict[str, Any]:
    return {"shard": 0, "directory": str(directory), "generation": 1}


def test_it_folds_what_it_is_given_until_nobody_is_there(rewriter: Any, logs: list[Path]) -> None:
    for count, log in enumerate(logs, 1):
        if count > 1:
            rewriter.channel.send("fold", **log_of(log))
        answer = answer_of(rewriter)
        assert (answer["kind"], answer["base"]["records"]) == ("folded", count)
        assert (log / "00000001.base").stat().st_size == answer["base"]["bytes"]
    rewriter.channel.close()
    assert rewriter.process.wait(DEADLINE) == 0


def test_it_ends_by_itself_when_it_is_given_nothing(rewriter: Any) -> None:
    assert answer_of(rewriter)["kind"] == "folded"
    assert rewriter.process.wait(DEADLINE) == 0


def test_a_failure_is_told_and_is_the_end(rewriter: Any, logs: list[Path]) -> None:
    assert answer_of(rewriter)["kind"] == "folded"
    segment = logs[1] / "00000001.aof"
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    rewriter.channel.send("fold", **log_of(logs[1]))
    answer = answer_of(rewriter)
    assert answer["kind"] == "failed"
    assert str(segment) in answer["reason"]
    assert rewriter.process.wait(DEADLINE) == 0
    assert not list(logs[1].glob("*.base"))
