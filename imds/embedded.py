"""Where an embedded server begins: ``python -P imds/embedded.py PARENT_PID REMOVE OPTION...``.

The same supervisor as ``imds-router``, with two duties more: it stops when its parent ends, however that
ends, and it removes the directory ``REMOVE`` (unless that is empty) when it has stopped. Run by path, so
that it is the parent's copy of the package that starts, whatever the working directory holds.

The parent is watched by a thread, since nothing else would notice its end while the supervisor starts or
moves keys. The thread does nothing but send this process the signal that asks it to stop.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

PAUSE = 0.5  # seconds between two looks at the parent where the system cannot tell us of its end


def wait_for_end(parent: int) -> None:
    """Return when the process ``parent``, which started this one, has ended."""
    if hasattr(os, "pidfd_open"):
        try:
            # PR_SET_PDEATHSIG would tell of the end of the thread that started us, this of the process's.
            descriptor = os.pidfd_open(parent)
        except OSError:  # it has ended, or the system is too old
            descriptor = -1
        if descriptor >= 0 and os.getppid() == parent:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
            return
    while os.getppid() == parent:
        time.sleep(PAUSE)


def _stop_after(parent: int) -> None:
    wait_for_end(parent)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Serve until a signal or the parent's end; return the exit code."""
    from imds.supervisor import STOP_SIGNALS
    from imds.supervisor import main as serve

    parent, remove, options = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a wish to stop waits until it can be heard
    threading.Thread(target=_stop_after, args=(parent,), daemon=True).start()
    try:
        return serve(options)
    finally:
        if remove:
            import shutil

            shutil.rmtree(remove, ignore_errors=True)


if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    sys.exit(main())
