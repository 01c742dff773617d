"""Methods for the commands of keys, whatever they hold."""

from __future__ import annotations

from typing import AnyStr

from imds.methods.base import Commands, Request, command, flags, repeatable, values
from imds.replies import Token, count, done, flag, integer, optional_integer


class KeyCommands(Commands[AnyStr]):
    """What all keys can do. Times are counted from now, or from 1970 where the name ends in ``at``."""

    @command
    def delete(self, *keys: Token) -> Request[int]:
        """Remove keys, strings or sorted sets; return how many there were."""
        return Request(count, b"del", *keys)

    @command
    def unlink(self, *keys: Token) -> Request[int]:
        """The same as :meth:`delete`."""
        return Request(integer, b"unlink", *keys)

    @repeatable
    def exists(self, *keys: Token) -> Request[int]:
        """Return how many of the keys there are; a key counts as often as it is named."""
        return Request(integer, b"exists", *keys)

    @repeatable
    def touch(self, *keys: Token) -> Request[int]:
        """Make keys the most recently used; return how many there are."""
        return Request(integer, b"touch", *keys)

    @command
    def expire(
        self,
        key: Token,
        seconds: int,
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
    ) -> Request[bool]:
        """Have ``key`` removed when the time is over; return whether that is now so.

        ``nx``: if it had no such time, ``xx``: if it had one, ``gt`` and ``lt``: if the new one is later
        or earlier than the one it had.
        """
        return Request(flag, b"expire", key, seconds, *flags(nx=nx, xx=xx, gt=gt, lt=lt))

    @command
    def pexpire(
        self,
        key: Token,
        milliseconds: int,
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
    ) -> Request[bool]:
        """:meth:`expire` in milliseconds."""
        return Request(flag, b"pexpire", key, milliseconds, *flags(nx=nx, xx=xx, gt=gt, lt=lt))

    @command
    def expireat(
        self,
        key: Token,
        seconds: int,
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
    ) -> Request[bool]:
        """:meth:`expire` at a second since 1970."""
        return Request(flag, b"expireat", key, seconds, *flags(nx=nx, xx=xx, gt=gt, lt=lt))

    @command
    def pexpireat(
        self,
        key: Token,
        milliseconds: int,
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
    ) -> Request[bool]:
        """:meth:`expire` at a millisecond since 1970."""
        return Request(flag, b"pexpireat", key, milliseconds, *flags(nx=nx, xx=xx, gt=gt, lt=lt))

    @command
    def persist(self, key: Token) -> Request[bool]:
        """Let ``key`` stay; return whether it was to expire."""
        return Request(flag, b"persist", key)

    @repeatable
    def ttl(self, key: Token) -> Request[int]:
        """Return the seconds that ``key`` has to live; -1: for ever, -2: there is no key."""
        return Request(integer, b"ttl", key)

    @repeatable
    def pttl(self, key: Token) -> Request[int]:
        """Return the milliseconds that ``key`` has to live; -1: for ever, -2: there is no key."""
        return Request(integer, b"pttl", key)

    @repeatable
    def expiretime(self, key: Token) -> Request[int]:
        """Return the second since 1970 at which ``key`` goes; -1: never, -2: there is no key."""
        return Request(integer, b"expiretime", key)

    @repeatable
    def pexpiretime(self, key: Token) -> Request[int]:
        """Return the millisecond since 1970 at which ``key`` goes; -1: never, -2: there is no key."""
        return Request(integer, b"pexpiretime", key)

    @repeatable
    def type(self, key: Token) -> Request[AnyStr]:
        """Return ``string``, ``zset`` or ``none``."""
        return Request(self._reader.string, b"type", key)

    @command
    def rename(self, key: Token, newkey: Token) -> Request[bool]:
        """Give the value another key of the same slot. Always True; without ``key`` it raises ServerError."""
        return Request(done, b"rename", key, newkey)

    @command
    def renamenx(self, key: Token, newkey: Token) -> Request[bool]:
        """The same if there is no ``newkey``; return whether it was done."""
        return Request(flag, b"renamenx", key, newkey)

    @command
    def copy(self, key: Token, newkey: Token, *, replace: bool = False) -> Request[bool]:
        """Copy the value to another key of the same slot; return whether it was done."""
        return Request(flag, b"copy", key, newkey, *flags(replace=replace))

    @repeatable
    def object_encoding(self, key: Token) -> Request[AnyStr | None]:
        """Return how ``key`` is kept, or None."""
        return Request(self._reader.value, b"object", "encoding", key)

    @repeatable
    def object_refcount(self, key: Token) -> Request[int | None]:
        """Return 1, or None without a key."""
        return Request(optional_integer, b"object", "refcount", key)

    @repeatable
    def object_idletime(self, key: Token) -> Request[int | None]:
        """Return the seconds since the last use of ``key``, or None. It may be up to 1/256 too much."""
        return Request(optional_integer, b"object", "idletime", key)

    @repeatable
    def dbsize(self) -> Request[int]:
        """Return how many keys there are in all."""
        return Request(integer, b"dbsize")

    @command
    def flushall(self) -> Request[bool]:
        """Remove every key. Always True."""
        return Request(done, b"flushall")

    @repeatable
    def keys(self, pattern: Token = "*") -> Request[list[AnyStr]]:
        """Return all keys that match. Nothing else runs meanwhile: beside others, use ``scan_iter``."""
        return Request(self._reader.strings, b"keys", pattern)

    @repeatable
    def recent(self, count: int | None = None) -> Request[list[AnyStr]]:
        """Return the ``count`` (10) keys of each shard that were used last, latest first; itself no use."""
        return Request(self._reader.strings, b"recent", *([] if count is None else [count]))

    @repeatable
    def randomkey(self) -> Request[AnyStr | None]:
        """Return a key by chance, None if there is none."""
        return Request(self._reader.value, b"randomkey")

    @repeatable
    def scan(
        self,
        cursor: Token = "0",
        *,
        match: Token | None = None,
        count: int | None = None,
        type: str | None = None,
    ) -> Request[tuple[str, list[AnyStr]]]:
        """Return the next cursor and some keys: begin with ``"0"``, end when it comes back.

        Every key that is there from the first call to the last is returned, some perhaps twice. ``match``
        is a pattern, ``count`` about how many keys to look at, ``type`` ``"string"`` or ``"zset"``.
        """
        return Request(self._reader.page, b"scan", cursor, *values(match=match, count=count, type=type))
