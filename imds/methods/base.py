"""How the typed methods of every client are each written once, without I/O.

A method says which tokens are sent and how the reply is read; who runs the request decides what the caller
gets: the blocking client the result, the asyncio client a coroutine of it, a pipeline itself::

    @repeatable                                       client.strlen("k")          int
    def strlen(self, key: Token) -> Request[int]:     await client.strlen("k")    int
        return Request(integer, b"strlen", key)       pipe.strlen("k")            the pipeline

Type checkers see that by :class:`Method`; at run time each is a plain function.

``@repeatable`` marks the commands that are sent again although they may have been carried out: those
that only read, and the writes that leave and answer the same the second time. Every other one is sent
again only if it was surely not carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, AnyStr, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from imds.replies import ReplyReader, Response, Token

T = TypeVar("T")
P = ParamSpec("P")
S = TypeVar("S", bound="Commands[Any]")

# A mapping is invariant in its keys, so {"a": 1.0} is no Mapping[Token, float] to a type checker.
Scores = Mapping[str, float] | Mapping[bytes, float] | Mapping[str, int] | Mapping[bytes, int]
Values = Mapping[str, Token] | Mapping[bytes, Token] | Mapping[str, str] | Mapping[bytes, bytes]


class Request(Generic[T]):
    """One command and how its reply is read.

    ``wait`` is how many seconds the server itself may let it wait (inf: without an end).
    """

    __slots__ = ("read", "repeatable", "tokens", "wait")

    def __init__(
        self, read: Callable[[Response], T], *tokens: Token, wait: float = 0.0, repeatable: bool = False
    ) -> None:
        self.read = read
        self.tokens = tokens
        self.wait = wait
        self.repeatable = repeatable


class Commands(Generic[AnyStr]):
    """What has methods for commands; a subclass has the reader of replies and :meth:`_run`."""

    _reader: ReplyReader[AnyStr]

    def _run(self, request: Request[Any]) -> Any:
        raise NotImplementedError


class Blocking(Commands[AnyStr]):
    """Its methods return the results."""


class Awaited(Commands[AnyStr]):
    """Its methods return coroutines of the results."""


class Queued(Commands[AnyStr]):
    """Its methods note the request and return the object itself."""


Q = TypeVar("Q", bound=Queued[Any])


class Method(Generic[P, T]):
    """How a type checker sees a method for a command. There is none at run time."""

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: Blocking[Any], owner: Any = ...) -> Callable[P, T]: ...
        @overload
        def __get__(
            self, instance: Awaited[Any], owner: Any = ...
        ) -> Callable[P, Coroutine[Any, Any, T]]: ...
        @overload
        def __get__(self, instance: Q, owner: Any = ...) -> Callable[P, Q]: ...
        @overload
        def __get__(self, instance: None, owner: Any = ...) -> Callable[..., Any]: ...
        def __get__(self, instance: Any, owner: Any = None) -> Any: ...


def command(build: Callable[Concatenate[S, P], Request[T]]) -> Method[P, T]:
    """Make a method of a function that returns its request."""

    @wraps(build)
    def method(self: S, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self._run(build(self, *args, **kwargs))

    return cast("Method[P, T]", method)


def repeatable(build: Callable[Concatenate[S, P], Request[T]]) -> Method[P, T]:
    """The same, of a request that does no harm if it is carried out twice."""

    @wraps(build)
    def method(self: S, *args: P.args, **kwargs: P.kwargs) -> Any:
        request = build(self, *args, **kwargs)
        request.repeatable = True
        return self._run(request)

    return cast("Method[P, T]", method)


def flags(**options: bool) -> list[Token]:
    """Return the names of the options that are set."""
    return [name for name, chosen in options.items() if chosen]


def values(**options: Token | None) -> list[Token]:
    """Return name and value of each option that has one."""
    return [part for name, value in options.items() if value is not None for part in (name, value)]


def flattened(pairs: Mapping[Any, Token]) -> list[Token]:
    """Return key, value, key, value ... of a mapping."""
    return [part for pair in pairs.items() for part in pair]


def limit(offset: int, most: int | None) -> list[Token]:
    """Return the LIMIT of a range: ``most`` elements from the one at ``offset``."""
    return ["limit", offset, -1 if most is None else most] if offset or most is not None else []
