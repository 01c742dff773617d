"""Methods for the commands of strings."""

from __future__ import annotations

from typing import AnyStr

from imds.methods.base import Commands, Request, Values, command, flags, flattened, repeatable, values
from imds.replies import Token, done, flag, integer, number


class StringCommands(Commands[AnyStr]):
    """What strings can do.

    Times to live: ``ex`` in seconds, ``px`` in milliseconds, ``exat`` and ``pxat`` since 1970.
    """

    @repeatable
    def get(self, key: Token) -> Request[AnyStr | None]:
        """Return the string that ``key`` holds, or None."""
        return Request(self._reader.value, b"get", key)

    @command
    def set(
        self,
        key: Token,
        value: Token,
        *,
        ex: int | None = None,
        px: int | None = None,
        exat: int | None = None,
        pxat: int | None = None,
        keepttl: bool = False,
        nx: bool = False,
        xx: bool = False,
    ) -> Request[bool]:
        """Make ``key`` hold a string, whatever it held before.

        Return whether it was done: always, but ``nx`` asks that there was no key, ``xx`` that there was one.
        """
        options = [*flags(nx=nx, xx=xx, keepttl=keepttl), *values(ex=ex, px=px, exat=exat, pxat=pxat)]
        return Request(done, b"set", key, value, *options, repeatable=not (nx or xx))

    @command
    def set_get(
        self,
        key: Token,
        value: Token,
        *,
        ex: int | None = None,
        px: int | None = None,
        exat: int | None = None,
        pxat: int | None = None,
        keepttl: bool = False,
        nx: bool = False,
        xx: bool = False,
    ) -> Request[AnyStr | None]:
        """The same as :meth:`set`, and return the string that was there before, or None."""
        options = [*flags(nx=nx, xx=xx, keepttl=keepttl), *values(ex=ex, px=px, exat=exat, pxat=pxat)]
        return Request(self._reader.value, b"set", key, value, "get", *options)

    @command
    def setnx(self, key: Token, value: Token) -> Request[bool]:
        """Set the string if there is no key; return whether it was done."""
        return Request(flag, b"setnx", key, value)

    @repeatable
    def setex(self, key: Token, seconds: int, value: Token) -> Request[bool]:
        """Set the string and its time to live. Always True."""
        return Request(done, b"setex", key, seconds, value)

    @repeatable
    def psetex(self, key: Token, milliseconds: int, value: Token) -> Request[bool]:
        """Set the string and its time to live. Always True."""
        return Request(done, b"psetex", key, milliseconds, value)

    @command
    def getset(self, key: Token, value: Token) -> Request[AnyStr | None]:
        """Set the string; return what it was, or None."""
        return Request(self._reader.value, b"getset", key, value)

    @command
    def getdel(self, key: Token) -> Request[AnyStr | None]:
        """Remove the string; return it, or None."""
        return Request(self._reader.value, b"getdel", key)

    @command
    def getex(
        self,
        key: Token,
        *,
        ex: int | None = None,
        px: int | None = None,
        exat: int | None = None,
        pxat: int | None = None,
        persist: bool = False,
    ) -> Request[AnyStr | None]:
        """Return the string, or None, and change when it expires; ``persist``: never."""
        options = [*flags(persist=persist), *values(ex=ex, px=px, exat=exat, pxat=pxat)]
        return Request(self._reader.value, b"getex", key, *options)

    @command
    def append(self, key: Token, value: Token) -> Request[int]:
        """Append to the string; return its length in bytes."""
        return Request(integer, b"append", key, value)

    @repeatable
    def strlen(self, key: Token) -> Request[int]:
        """Return the length of the string in bytes, 0 without one."""
        return Request(integer, b"strlen", key)

    @repeatable
    def getrange(self, key: Token, start: int, end: int) -> Request[AnyStr]:
        """Return the bytes from ``start`` to ``end``, both included; -1 is the last byte."""
        return Request(self._reader.string, b"getrange", key, start, end)

    @repeatable
    def setrange(self, key: Token, offset: int, value: Token) -> Request[int]:
        """Overwrite the string from ``offset`` on; return its length in bytes."""
        return Request(integer, b"setrange", key, offset, value)

    @command
    def incr(self, key: Token) -> Request[int]:
        """Add 1 to the integer that the string is, 0 without one; return the sum."""
        return Request(integer, b"incr", key)

    @command
    def decr(self, key: Token) -> Request[int]:
        """Subtract 1; return the difference."""
        return Request(integer, b"decr", key)

    @command
    def incrby(self, key: Token, increment: int) -> Request[int]:
        """Add an integer; return the sum."""
        return Request(integer, b"incrby", key, increment)

    @command
    def decrby(self, key: Token, decrement: int) -> Request[int]:
        """Subtract an integer; return the difference."""
        return Request(integer, b"decrby", key, decrement)

    @command
    def incrbyfloat(self, key: Token, increment: float) -> Request[float]:
        """Add a number; return the sum."""
        return Request(number, b"incrbyfloat", key, increment)

    @repeatable
    def mget(self, *keys: Token) -> Request[list[AnyStr | None]]:
        """Return the string of each key, in their order; None where there is none. Not atomic over shards."""
        return Request(self._reader.optionals, b"mget", *keys)

    @repeatable
    def mset(self, pairs: Values) -> Request[bool]:
        """Set the string of each key. Always True. Not atomic over shards."""
        return Request(done, b"mset", *flattened(pairs))

    @command
    def msetnx(self, pairs: Values) -> Request[bool]:
        """Set several strings of one slot if there is none of the keys; return whether it was done."""
        return Request(flag, b"msetnx", *flattened(pairs))
