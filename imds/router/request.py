"""One request that the router has to answer, and what its handlers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from imds.commands import Command
from imds.config import Config
from imds.control import Channel
from imds.protocol import encode_error, split_request
from imds.router.kernel import Client
from imds.router.session import Session

CROSS_SLOT = encode_error("CROSSSLOT Keys in request don't hash to the same slot")


def unheard(_reply: bytes, _lost: bool) -> None:
    """What an answer of a shard is told to when nobody waits for it."""


class Host(Protocol):
    """What requests need of the router. A connection has ``client``, ``session`` and ``sock``."""

    config: Config
    connections: set[Any]
    channel: Channel

    def touch(self, client: Client) -> None:
        """Look at a client at the end of this turn: it has output, or its state has changed."""

    def drop(self, connection: Any) -> None:
        """Close a connection at once."""

    def configure(self, field: str, value: Any) -> None:
        """Change an option of this router."""


@dataclass(eq=False)
class Request:
    """One question of the switch."""

    turn: Any
    client: Client
    command: Command | None
    frame: bytes

    @cached_property
    def tokens(self) -> list[bytes]:
        """The request's tokens, the name included."""
        return split_request(self.frame)[0]

    @property
    def session(self) -> Session:
        """What is known of the connection."""
        return self.client.owner.session  # type: ignore[no-any-return]


Handler = Callable[[Request], bytes | None]  # returns the reply frame, or None if it answers later
Reply = Callable[[bytes, bool], None]  # takes a reply frame, and whether it is about a dead shard
