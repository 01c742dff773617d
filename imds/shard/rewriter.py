"""The process that folds shards' closed segments into bases, one at a time: see imds/shard/rewrite.py.

It gets what nobody else wants: idle processor time, idle disk time. So it preempts no shard and no router,
and on a machine without any idle time it makes nearly no progress, and the log grows until there is some.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
from dataclasses import asdict
from pathlib import Path

from imds.config import Config
from imds.control import Channel, Message
from imds.process import ignore, start_logging
from imds.shard.kernel import RecordEncoder, UnifiedStore
from imds.shard.manifest import Base
from imds.shard.rewrite import fold
from imds.shard.segment import AofError
from imds.storage import Storage

# A server that is written to without end rewrites again and again, and to start a process is half the work of
# a small rewrite. So it stays for a while, unless the data are so much that their memory may be kept, too.
LINGER = 5.0  # seconds
LINGER_BYTES = 64 << 20  # of a base

log = logging.getLogger("imds.rewriter")


def yield_to_all() -> None:
    """Take processor and disk only when nobody else wants them, as far as the system knows such a thing.

    On Linux a process that gets idle processor time gets idle disk time, too: ``task_nice_ioclass`` in
    include/linux/ioprio.h.
    """
    with contextlib.suppress(OSError):
        os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(config: Config, shard: int, directory: Path, generation: int, channel: Channel) -> int:
    """Fold this log, and those that the supervisor then names; return 0 when each has been answered."""
    ignore([signal.SIGTERM, signal.SIGINT])  # the supervisor says when
    start_logging("rewriter", config.log_level)
    yield_to_all()
    while True:
        try:
            base = _fold(shard, directory, generation, channel)
        except (AofError, OSError, MemoryError) as error:
            log.debug("%s", error)
            channel.send("failed", reason=str(error) or type(error).__name__)
            return 0
        channel.send("folded", base=asdict(base))
        work = _next_work(channel) if base.bytes <= LINGER_BYTES else None
        if work is None:
            return 0
        shard, directory, generation = work["shard"], Path(work["directory"]), work["generation"]


def _fold(shard: int, directory: Path, generation: int, channel: Channel) -> Base:
    def step() -> None:
        channel.receive()
        if channel.closed:
            raise AofError("the supervisor is gone")

    base = fold(
        *(Storage(), directory, UnifiedStore(RecordEncoder(0))),
        shard=shard,
        generation=generation,
        step=step,
    )
    if base is None:
        raise AofError(f"{directory}: no segment is closed")
    return base


def _next_work(channel: Channel) -> Message | None:
    """Wait for the log that is folded next; return None if there is none for LINGER seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.select(LINGER)
    return next((message for message, _ in channel.receive()), None)
