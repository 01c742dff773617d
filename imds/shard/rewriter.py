"""The process that folds a shard's closed segments into a base: see imds/shard/rewrite.py.

It gets what nobody else wants: idle processor time, idle disk time. So it preempts no shard and no router,
and on a machine without any idle time it makes nearly no progress, and the log grows until there is some.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import asdict
from pathlib import Path

from imds.config import Config
from imds.control import Channel
from imds.process import ignore, start_logging
from imds.shard.kernel import RecordEncoder, UnifiedStore
from imds.shard.rewrite import fold
from imds.shard.segment import AofError
from imds.storage import Storage

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
    """Fold once and tell the supervisor what came of it; return the exit code."""
    ignore([signal.SIGTERM, signal.SIGINT])  # the supervisor says when
    start_logging(f"rewriter-{shard}", config.log_level)
    yield_to_all()

    def step() -> None:
        channel.receive()
        if channel.closed:
            raise AofError("the supervisor is gone")

    try:
        base = fold(
            *(Storage(), directory, UnifiedStore(RecordEncoder(0))),
            shard=shard,
            generation=generation,
            step=step,
        )
        if base is None:
            raise AofError(f"{directory}: no segment is closed")
    except (AofError, OSError, MemoryError) as error:
        log.debug("%s", error)
        channel.send("failed", reason=str(error) or type(error).__name__)
        return 1
    channel.send("folded", base=asdict(base))
    return 0
