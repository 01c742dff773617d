"""The commands on strings. How a command is written: ``keyspace.py``."""

from __future__ import annotations

from decimal import Context, Decimal
from math import isfinite

from imds.shard.arguments import INT_MAX, INT_MIN, NO_FLOAT, integer, parse_score, syntax
from imds.shard.expiry import absolute, take_expiry
from imds.shard.keyspace import MAX_STRING, Keyspace, command, error

DONE = b"OK"
TOO_LONG = "ERR string exceeds maximum allowed size (proto-max-bulk-len)"

# Any two numbers of which float() knows the sum are added without rounding: 309 digits before the point, and
# what stands behind it in a text of reasonable length.
_EXACT = Context(prec=1000, Emax=400, Emin=-1000)
_PLACES = Decimal(10) ** -17  # that incrbyfloat keeps, as Redis does


def _size(key: bytes, size: int) -> None:
    """Refuse a string of ``size`` bytes that no request could set."""
    if len(key) + size > MAX_STRING:
        raise error(TOO_LONG)


@command
def set_(store: Keyspace, key: bytes, value: bytes, *options: bytes) -> bytes | None:
    """Set the string, on condition and with a deadline."""
    unless = only = get = keep = False
    expiry: tuple[bytes, bytes] | None = None
    rest = list(options)
    while rest:
        option = rest.pop(0).upper()
        if option == b"NX" and not only:
            unless = True
        elif option == b"XX" and not unless:
            only = True
        elif option == b"GET":
            get = True
        elif option == b"KEEPTTL" and expiry is None:
            keep = True
        elif option in (b"EX", b"PX", b"EXAT", b"PXAT") and not keep and expiry is None and rest:
            expiry = option, rest.pop(0)
        else:
            raise syntax()
    when = absolute(store, "set", *expiry) if expiry else 0
    old = store.string(key) if get else None
    there = store.touch(key)
    if (unless and there) or (only and not there):
        return old
    if keep:
        when = store.deadline(key) or 0
    store.put(key, value, when)
    return old if get else DONE


@command
def setnx(store: Keyspace, key: bytes, value: bytes) -> int:
    """Set the string if there is no key."""
    if store.touch(key):
        return 0
    store.put(key, value)
    return 1


@command
def setex(store: Keyspace, key: bytes, seconds: bytes, value: bytes) -> bytes:
    """Set the string and its time to live."""
    store.put(key, value, absolute(store, "setex", b"EX", seconds))
    return DONE


@command
def psetex(store: Keyspace, key: bytes, milliseconds: bytes, value: bytes) -> bytes:
    """Set the string and its time to live."""
    store.put(key, value, absolute(store, "psetex", b"PX", milliseconds))
    return DONE


@command
def getset(store: Keyspace, key: bytes, value: bytes) -> bytes | None:
    """Set the string and return what it was."""
    old = store.string(key)
    store.put(key, value)
    return old


@command
def getdel(store: Keyspace, key: bytes) -> bytes | None:
    """Remove the string and return it."""
    old = store.string(key)
    store.remove(key)
    return old


@command
def getex(store: Keyspace, key: bytes, *options: bytes) -> bytes | None:
    """Return the string and change its deadline."""
    when: int | None = None
    if len(options) == 1 and options[0].upper() == b"PERSIST":
        when = 0
    elif len(options) == 2 and options[0].upper() in (b"EX", b"PX", b"EXAT", b"PXAT"):
        pass
    elif options:
        raise syntax()
    value = store.string(key)
    if value is not None and len(options) == 2:
        when = absolute(store, "getex", *options)
    if value is not None and when is not None:
        take_expiry(store, key, when)
    return value


@command
def append(store: Keyspace, key: bytes, data: bytes) -> int:
    """Append to the string, which is made if it is not there."""
    old = store.string(key)
    if old is None:
        store.put(key, data)
        return len(data)
    _size(key, len(old) + len(data))
    return store.write_at(key, len(old), data) if data else len(old)


@command
def strlen(store: Keyspace, key: bytes) -> int:
    """Return the string's length."""
    return len(store.string(key) or b"")


@command
def getrange(store: Keyspace, key: bytes, start: bytes, end: bytes) -> bytes:
    """Return a part of the string; both ends are in it, and negative ones count from its end."""
    first, last = integer(start), integer(end)
    value = store.string(key) or b""
    if first < 0 and last < 0 and first > last:
        return b""
    first = max(first + len(value), 0) if first < 0 else first
    last = max(last + len(value), 0) if last < 0 else last
    return value[first : last + 1]


@command
def setrange(store: Keyspace, key: bytes, offset: bytes, data: bytes) -> int:
    """Overwrite a part of the string."""
    start = integer(offset)
    if start < 0:
        raise error("ERR offset is out of range")
    old = store.string(key)
    if not data:
        return len(old or b"")
    _size(key, start + len(data))
    if old is None:
        store.put(key, bytes(start) + data)
        return start + len(data)
    return store.write_at(key, start, data)


def _add(store: Keyspace, key: bytes, change: int) -> int:
    old = store.string(key)
    number = (integer(old) if old is not None else 0) + change
    if not INT_MIN <= number <= INT_MAX:
        raise error("ERR increment or decrement would overflow")
    store.put(key, b"%d" % number, store.deadline(key) or 0)
    return number


@command
def incr(store: Keyspace, key: bytes) -> int:
    """Add 1 to the integer that the string is."""
    return _add(store, key, 1)


@command
def decr(store: Keyspace, key: bytes) -> int:
    """Subtract 1."""
    return _add(store, key, -1)


@command
def incrby(store: Keyspace, key: bytes, increment: bytes) -> int:
    """Add an integer."""
    return _add(store, key, integer(increment))


@command
def decrby(store: Keyspace, key: bytes, decrement: bytes) -> int:
    """Subtract an integer."""
    change = integer(decrement)
    if change == INT_MIN:
        raise error("ERR decrement would overflow")
    return _add(store, key, -change)


@command
def incrbyfloat(store: Keyspace, key: bytes, increment: bytes) -> bytes:
    """Add a number to the number that the string is, exactly as decimals, kept to 17 places."""
    old = store.string(key)
    number, change = (parse_score(text) for text in (b"0" if old is None else old, increment))
    if number is None or change is None:
        raise error(NO_FLOAT)
    if not isfinite(number + change):
        raise error("ERR increment would produce NaN or Infinity")
    total = _EXACT.add(Decimal((old or b"0").decode()), Decimal(increment.decode()))
    text = b"%s" % f"{_EXACT.quantize(total, _PLACES):f}".rstrip("0").rstrip(".").encode()
    text = b"0" if text == b"-0" else text
    store.put(key, text, store.deadline(key) or 0)
    return text


@command
def mget(store: Keyspace, *keys: bytes) -> list[bytes | None]:
    """Return the strings; what is none is missing."""
    return [None if store.kind(key) == "zset" else store.string(key) for key in keys]


def _pairs(tokens: tuple[bytes, ...], name: str) -> list[tuple[bytes, bytes]]:
    if len(tokens) % 2:
        raise error(f"ERR wrong number of arguments for '{name}' command")
    return list(zip(tokens[::2], tokens[1::2], strict=True))


@command
def mset(store: Keyspace, *tokens: bytes) -> bytes:
    """Set several strings, all of them or none."""
    for key, value in _pairs(tokens, "mset"):
        store.put(key, value)
    return DONE


@command
def msetnx(store: Keyspace, *tokens: bytes) -> int:
    """Set several strings if none of the keys is there."""
    pairs = _pairs(tokens, "msetnx")
    if any(store.kind(key) for key, _value in pairs):
        return 0
    for key, value in pairs:
        store.put(key, value)
    return 1
