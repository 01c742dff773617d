"""Where every child process of the supervisor begins: ``python -P imds/child.py NAME CONTROL_FD PARENT_PID``.

Run by path, so that it is this very copy of the package that starts, whatever the working directory holds.
A JSON object on standard input says what the process is to be.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Be the shard or router that standard input describes; return the exit code."""
    import json
    import socket

    from imds.config import Config
    from imds.control import Channel
    from imds.hashslots import SlotMap
    from imds.process import die_with_parent

    die_with_parent(int(sys.argv[3]))
    channel = Channel(socket.socket(fileno=int(sys.argv[2])))
    init: dict[str, Any] = json.load(sys.stdin)
    config = Config(**init["config"])
    if init["role"] == "shard":
        from imds.shard.worker import main as shard_main

        return shard_main(config, init["shard"], Path(init["directory"]), init["generation"], channel)
    from imds.router.router import main as router_main

    slots = SlotMap.from_ranges(init["slots"], init["shards"], init["seed"])
    listeners = [socket.socket(fileno=fd) for fd in init["listeners"]]
    return router_main(config, slots, listeners, channel, init["number"])


if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    sys.exit(main())
