"""Deadlines: what commands make of them. All are milliseconds since 1970, by the system's clock.

When that clock is set forward, keys go early; when it is set back, they stay longer. A deadline is logged as
the absolute time that it is, so that a restart changes nothing about it.
"""

from __future__ import annotations

from imds.shard.arguments import INT_MAX, INT_MIN, integer
from imds.shard.keyspace import Keyspace, command, error

_UNITS = {b"EX": (1000, True), b"PX": (1, True), b"EXAT": (1000, False), b"PXAT": (1, False)}


def absolute(store: Keyspace, name: str, option: bytes, text: bytes, *, least: int = 1) -> int:
    """Return the deadline that EX, PX, EXAT or PXAT with this number means, for command ``name``."""
    number = integer(text)
    scale, relative = _UNITS[option.upper()]
    when = number * scale + (store.now if relative else 0)
    if number < least or not INT_MIN <= number * scale <= INT_MAX or when > INT_MAX:
        raise error(f"ERR invalid expire time in '{name}' command")
    return when


def take_expiry(store: Keyspace, key: bytes, when: int) -> None:
    """Give the key this deadline; it goes at once if that is past."""
    if when and when <= store.now:
        store.remove(key)
    else:
        store.set_deadline(key, when)


def _expire(
    store: Keyspace, name: str, unit: bytes, key: bytes, text: bytes, options: tuple[bytes, ...]
) -> int:
    chosen = {option.upper() for option in options}
    for option in options:
        if option.upper() not in (b"NX", b"XX", b"GT", b"LT"):
            raise error(f"ERR Unsupported option {option.decode(errors='backslashreplace')}")
    if b"NX" in chosen and len(chosen) > 1:
        raise error("ERR NX and XX, GT or LT options at the same time are not compatible")
    if {b"GT", b"LT"} <= chosen:
        raise error("ERR GT and LT options at the same time are not compatible")
    when = absolute(store, name, unit, text, least=INT_MIN)
    old = store.deadline(key)
    if (
        old is None
        or (b"NX" in chosen and old)
        or (b"XX" in chosen and not old)
        or (b"GT" in chosen and (not old or when <= old))
        or (b"LT" in chosen and old and when >= old)
    ):
        return 0
    take_expiry(store, key, when or -1)  # the year 1970 began: 0 would be no deadline
    return 1


@command
def expire(store: Keyspace, key: bytes, seconds: bytes, *options: bytes) -> int:
    """Give the key a time to live."""
    return _expire(store, "expire", b"EX", key, seconds, options)


@command
def pexpire(store: Keyspace, key: bytes, milliseconds: bytes, *options: bytes) -> int:
    """Give the key a time to live."""
    return _expire(store, "pexpire", b"PX", key, milliseconds, options)


@command
def expireat(store: Keyspace, key: bytes, seconds: bytes, *options: bytes) -> int:
    """Give the key a deadline."""
    return _expire(store, "expireat", b"EXAT", key, seconds, options)


@command
def pexpireat(store: Keyspace, key: bytes, milliseconds: bytes, *options: bytes) -> int:
    """Give the key a deadline."""
    return _expire(store, "pexpireat", b"PXAT", key, milliseconds, options)


@command
def persist(store: Keyspace, key: bytes) -> int:
    """Take the key's deadline away; return whether it had one."""
    if not store.touch(key) or not store.deadline(key):
        return 0
    store.set_deadline(key, 0)
    return 1


def _when(store: Keyspace, key: bytes, origin: int, unit: int) -> int:
    """Return the deadline from ``origin`` in units, -1 if there is none, -2 if there is no key."""
    when = store.deadline(key)
    if not when:
        return -2 if when is None else -1
    return (max(when - origin, 0) + unit // 2) // unit


@command
def ttl(store: Keyspace, key: bytes) -> int:
    """Return the time to live in seconds."""
    return _when(store, key, store.now, 1000)


@command
def pttl(store: Keyspace, key: bytes) -> int:
    """Return the time to live in milliseconds."""
    return _when(store, key, store.now, 1)


@command
def expiretime(store: Keyspace, key: bytes) -> int:
    """Return the deadline in seconds."""
    return _when(store, key, 0, 1000)


@command
def pexpiretime(store: Keyspace, key: bytes) -> int:
    """Return the deadline in milliseconds."""
    return _when(store, key, 0, 1)
