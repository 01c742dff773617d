"""What the router knows of one connection beside its bytes."""

from __future__ import annotations

import time
from typing import Any


class Session:
    """One connection's state. ``number`` is unique over all routers of a server, and never used again."""

    __slots__ = ("commands", "name", "number", "since", "waits")

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = b""
        self.since = time.monotonic()
        self.commands = 0  # that the router itself has answered
        # Set while a request holds up those that follow it; :meth:`Requests.wake` ends that.
        self.waits: Any = None
