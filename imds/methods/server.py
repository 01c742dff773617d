"""Methods for the commands about connections and the server."""

from __future__ import annotations

from typing import Any, AnyStr

from imds.methods.base import Commands, Request, command, repeatable, values
from imds.replies import Token, done, integer, json_objects, optional_integer, two_integers


class ServerCommands(Commands[AnyStr]):
    """What the server can tell and do."""

    @repeatable
    def ping(self, message: Token | None = None) -> Request[AnyStr]:
        """Return ``PONG``, or ``message``."""
        return Request(self._reader.string, b"ping", *([] if message is None else [message]))

    @repeatable
    def echo(self, message: Token) -> Request[AnyStr]:
        """Return ``message``."""
        return Request(self._reader.string, b"echo", message)

    @repeatable
    def time(self) -> Request[tuple[int, int]]:
        """Return the server's time: seconds since 1970, and microseconds."""
        return Request(two_integers, b"time")

    @repeatable
    def info(self, *sections: str) -> Request[AnyStr]:
        """Return the server in numbers, ``name:value`` in each line, as Redis shows it."""
        return Request(self._reader.string, b"info", *sections)

    @repeatable
    def stats(self) -> Request[list[dict[str, Any]]]:
        """Return the statistics of each shard, in the order of shards."""
        return Request(json_objects, b"stats")

    @repeatable
    def digest(self) -> Request[list[dict[str, Any]]]:
        """Return ``shard``, ``keys``, ``digest`` of all data and ``next_number`` of each; O(data)."""
        return Request(json_objects, b"digest", wait=120.0)

    @repeatable
    def sync(self) -> Request[bool]:
        """Return True when all that was written before is on the disk, on every shard; otherwise it raises.

        What *this connection* wrote: with threads beside this one, others of the pool may have written more.
        """
        return Request(done, b"sync", wait=30.0)

    @command
    def rewrite(self) -> Request[bool]:
        """Have every shard's log rewritten soon. Always True."""
        return Request(done, b"rewrite", wait=30.0)

    @repeatable
    def where(self, key: Token) -> Request[dict[str, AnyStr]]:
        """Return ``slot`` and ``shard`` of a key, and the shard's ``state``."""
        return Request(self._reader.table, b"where", key)

    @repeatable
    def slots(self) -> Request[list[dict[str, Any]]]:
        """Return ``first``, ``last``, ``shard`` and its ``state`` of each run of slots."""
        return Request(json_objects, b"slots")

    @repeatable
    def config_get(self, *patterns: str) -> Request[dict[str, AnyStr]]:
        """Return the server's options whose names match."""
        return Request(self._reader.table, b"config", "get", *(patterns or ("*",)))

    @repeatable
    def config_set(self, name: str, value: Token) -> Request[bool]:
        """Change an option of the running server. Always True."""
        return Request(done, b"config", "set", name, value)

    @repeatable
    def memory_stats(self) -> Request[dict[str, AnyStr]]:
        """Return what data and processes take, in bytes."""
        return Request(self._reader.table, b"memory", "stats")

    @repeatable
    def memory_usage(self, key: Token) -> Request[int | None]:
        """Return the bytes that key and value are counted with, None if there is no key."""
        return Request(optional_integer, b"memory", "usage", key)

    @repeatable
    def command_count(self) -> Request[int]:
        """Return how many commands the server has."""
        return Request(integer, b"command", "count")

    @repeatable
    def command_list(self) -> Request[list[AnyStr]]:
        """Return the names of the server's commands."""
        return Request(self._reader.strings, b"command", "list")

    @repeatable
    def command_getkeys(self, *request: Token) -> Request[list[AnyStr]]:
        """Return which tokens of a request are keys."""
        return Request(self._reader.strings, b"command", "getkeys", *request)

    @repeatable
    def client_id(self) -> Request[int]:
        """Return the number of the connection that asks."""
        return Request(integer, b"client", "id")

    @repeatable
    def client_list(self) -> Request[AnyStr]:
        """Return the connections of every router, one in each line."""
        return Request(self._reader.string, b"client", "list")

    @repeatable
    def client_info(self) -> Request[AnyStr]:
        """Return the line of the connection that asks."""
        return Request(self._reader.string, b"client", "info")

    @repeatable
    def client_getname(self) -> Request[AnyStr | None]:
        """Return the name that the client has given itself by its option ``name``, or None."""
        return Request(self._reader.value, b"client", "getname")

    @command
    def client_kill(
        self, *, id: int | None = None, addr: str | None = None, skipme: bool = True
    ) -> Request[int]:
        """Close connections; return how many."""
        options = values(id=id, addr=addr, skipme="yes" if skipme else "no")
        return Request(integer, b"client", "kill", *options)
