"""The router's kernel: the compiled one where it runs, otherwise the twin beside this file."""

from typing import TYPE_CHECKING

from imds._kernel import pick
from imds.router.switch import NOTICE, RETRY, UNKNOWN_OUTCOME, Asked, Client, LinkError, Switch
from imds.router.turns import News, Policy, turn

__all__ = [
    "NOTICE",
    "RETRY",
    "UNKNOWN_OUTCOME",
    "Asked",
    "Client",
    "LinkError",
    "News",
    "Policy",
    "Switch",
    "turn",
]

if not TYPE_CHECKING:  # for the type checker both variants are the twin
    Switch = pick(Switch, "switch", "Switch")
    turn = pick(turn, "switch", "turn")
