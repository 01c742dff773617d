"""imds: a sharded in-memory key-value server in Python.

The client's names are here too, and are loaded when first asked for: every process of a server imports
this package, and none of them needs a client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imds.client import (
        Client,
        ConnectionError,
        ImdsError,
        OutcomeUnknownError,
        OutOfMemoryError,
        Pipeline,
        Response,
        ServerError,
        TimeoutError,
        Transaction,
        TryAgainError,
        WatchError,
        WrongTypeError,
    )
    from imds.embedding import ServeError, serve

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ConnectionError",
    "ImdsError",
    "OutOfMemoryError",
    "OutcomeUnknownError",
    "Pipeline",
    "Response",
    "ServeError",
    "ServerError",
    "TimeoutError",
    "Transaction",
    "TryAgainError",
    "WatchError",
    "WrongTypeError",
    "__version__",
    "serve",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "asyncio":
        return import_module("imds.asyncio")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "imds.embedding" if name in ("ServeError", "serve") else "imds.client"
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value
