"""What the router knows of one connection beside its bytes."""

from __future__ import annotations

import time
from typing import Any


class Session:
    """One connection's state. ``number`` is unique over all routers of a server, and never used again."""

    __slots__ = ("ended", "gone", "handling", "name", "number", "queue", "since", "waits", "watched")

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = b""
        self.since = time.monotonic()
        self.ended = False  # it will send nothing more
        self.gone = False  # and hear nothing more
        self.handling = False  # a request of it is being handled right now
        # Set while a request holds up those that follow it; :meth:`Requests.wake` ends that.
        self.waits: Any = None
        # Of ``multi`` and ``watch``, see imds/router/transactions.py: None or empty most of the time.
        self.queue: Any = None
        self.watched: Any = None
