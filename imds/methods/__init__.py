"""The typed methods for commands, without I/O: see imds/methods/base.py.

Add a command to imds/commands.py, then its method here. A test compares the two.
"""

from __future__ import annotations

from typing import AnyStr

from imds.methods.base import Awaited, Blocking, Commands, Queued, Request
from imds.methods.keys import KeyCommands
from imds.methods.server import ServerCommands
from imds.methods.strings import StringCommands
from imds.methods.zsets import SortedSetCommands

__all__ = ["AllCommands", "Awaited", "Blocking", "Commands", "DataCommands", "Queued", "Request"]


class DataCommands(StringCommands[AnyStr], KeyCommands[AnyStr], SortedSetCommands[AnyStr]):
    """What may stand in a transaction."""


class AllCommands(DataCommands[AnyStr], ServerCommands[AnyStr]):
    """Everything."""
