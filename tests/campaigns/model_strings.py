"""What the commands on strings, and on keys of any kind, mean: see ``model.py``."""

from __future__ import annotations

from fractions import Fraction
from math import isfinite

from campaigns.model import Answer, Model, Wrong, command, integer, number

LARGEST = (1 << 63) - 1
STEPS = {b"EX": 1000, b"PX": 1, b"EXAT": 1000, b"PXAT": 1}


def moment(model: Model, option: bytes, text: bytes, least: int = 1) -> int:
    """Return the deadline, in milliseconds since 1970. Raises Wrong."""
    count = integer(text)
    when = count * STEPS[option] + (0 if option.endswith(b"AT") else model.now)
    if count < least or abs(count * STEPS[option]) > LARGEST or when > LARGEST:
        raise Wrong("ERR invalid expire time")
    return when


@command
def get(model: Model, key: bytes) -> Answer:
    return model.string(key)


@command
def set_(model: Model, key: bytes, value: bytes, *options: bytes) -> Answer:
    words = [option.upper() for option in options]
    expiry: tuple[bytes, bytes] | None = None
    chosen = set()
    while words:
        word = words.pop(0)
        if word in STEPS and words and expiry is None:
            expiry = word, words.pop(0)
        elif word in (b"NX", b"XX", b"GET", b"KEEPTTL"):
            chosen.add(word)
        else:
            raise Wrong("ERR syntax error")
    if {b"NX", b"XX"} <= chosen or (expiry and b"KEEPTTL" in chosen):
        raise Wrong("ERR syntax error")
    deadline = moment(model, *expiry) if expiry else 0
    old = model.string(key) if b"GET" in chosen else None
    there = model.find(key) is not None
    if (b"NX" in chosen and there) or (b"XX" in chosen and not there):
        return old
    model.put(key, value, model.deadlines.get(key, 0) if b"KEEPTTL" in chosen else deadline)
    return old if b"GET" in chosen else b"OK"


@command
def setnx(model: Model, key: bytes, value: bytes) -> Answer:
    if model.find(key) is not None:
        return 0
    model.put(key, value)
    return 1


@command
def setex(model: Model, key: bytes, seconds: bytes, value: bytes) -> Answer:
    model.put(key, value, moment(model, b"EX", seconds))
    return b"OK"


@command
def psetex(model: Model, key: bytes, milliseconds: bytes, value: bytes) -> Answer:
    model.put(key, value, moment(model, b"PX", milliseconds))
    return b"OK"


@command
def getset(model: Model, key: bytes, value: bytes) -> Answer:
    old = model.string(key)
    model.put(key, value)
    return old


@command
def getdel(model: Model, key: bytes) -> Answer:
    old = model.string(key)
    model.drop(key)
    return old


@command
def getex(model: Model, key: bytes, *options: bytes) -> Answer:
    words = [option.upper() for option in options]
    if words and words != [b"PERSIST"] and not (len(words) == 2 and words[0] in STEPS):
        raise Wrong("ERR syntax error")
    value = model.string(key)
    if value is not None and words:
        model.set_deadline(key, 0 if len(words) == 1 else moment(model, words[0], options[1]))
    return value


def _keep(model: Model, key: bytes, value: bytes) -> int:
    """Set a string, and leave the key its deadline; return the length."""
    model.put(key, value, model.deadlines.get(key, 0))
    return len(value)


@command
def append(model: Model, key: bytes, data: bytes) -> Answer:
    old = model.string(key)
    return _keep(model, key, (old or b"") + data) if data or old is None else len(old)


@command
def strlen(model: Model, key: bytes) -> Answer:
    return len(model.string(key) or b"")


@command
def getrange(model: Model, key: bytes, start: bytes, end: bytes) -> Answer:
    first, last = integer(start), integer(end)
    value = model.string(key) or b""
    size = len(value)
    if first < 0 and last < 0 and first > last:
        return b""
    start = max(0, first + size) if first < 0 else first
    stop = max(0, last + size) if last < 0 else last
    return bytes(value[at] for at in range(size) if start <= at <= stop)


@command
def setrange(model: Model, key: bytes, offset: bytes, data: bytes) -> Answer:
    start = integer(offset)
    if start < 0:
        raise Wrong("ERR offset")
    old = model.string(key)
    if not data:
        return len(old or b"")
    if start + len(data) > 60_000_000:
        raise Wrong("ERR string exceeds")
    value = bytearray(max(len(old or b""), start + len(data)))
    value[: len(old or b"")] = old or b""
    value[start : start + len(data)] = data
    return _keep(model, key, bytes(value))


def _add(model: Model, key: bytes, change: int) -> int:
    old = model.string(key)
    total = integer(b"0" if old is None else old) + change
    if abs(total) > LARGEST and total != -LARGEST - 1:
        raise Wrong("ERR increment or decrement would overflow")
    _keep(model, key, b"%d" % total)
    return total


@command
def incr(model: Model, key: bytes) -> Answer:
    return _add(model, key, 1)


@command
def decr(model: Model, key: bytes) -> Answer:
    return _add(model, key, -1)


@command
def incrby(model: Model, key: bytes, change: bytes) -> Answer:
    return _add(model, key, integer(change))


@command
def decrby(model: Model, key: bytes, change: bytes) -> Answer:
    if integer(change) == -LARGEST - 1:
        raise Wrong("ERR decrement would overflow")
    return _add(model, key, -integer(change))


@command
def incrbyfloat(model: Model, key: bytes, change: bytes) -> Answer:
    old = model.string(key)
    texts = (b"0" if old is None else old, change)
    numbers = [number(text) for text in texts]
    if None in numbers or not isfinite(sum(one or 0.0 for one in numbers)):
        raise Wrong("ERR ")
    scaled = round(sum(Fraction(text.decode()) for text in texts) * 10**17)
    whole, places = divmod(abs(scaled), 10**17)
    text = (f"{'-' if scaled < 0 else ''}{whole}.{places:017d}").rstrip("0").rstrip(".").encode()
    _keep(model, key, text)
    return text


@command
def mget(model: Model, *keys: bytes) -> Answer:
    return [None if model.kind(key) is dict else model.string(key) for key in keys]


@command
def mset(model: Model, *tokens: bytes) -> Answer:
    for key, value in zip(tokens[::2], tokens[1::2], strict=True):
        model.put(key, value)
    return b"OK"


@command
def msetnx(model: Model, *tokens: bytes) -> Answer:
    if any(key in model.data for key in tokens[::2]):
        return 0
    mset(model, *tokens)
    return 1


# -- keys -----------------------------------------------------------------------------------------------


@command
def del_(model: Model, *keys: bytes) -> Answer:
    return sum(map(model.drop, keys))


@command
def unlink(model: Model, *keys: bytes) -> Answer:
    return sum(map(model.drop, keys))


@command
def exists(model: Model, *keys: bytes) -> Answer:
    return sum(key in model.data for key in keys)


@command
def touch(model: Model, *keys: bytes) -> Answer:
    return sum(model.find(key) is not None for key in keys)


@command
def type_(model: Model, key: bytes) -> Answer:
    return {bytes: b"string", dict: b"zset", None: b"none"}[model.kind(key)]


@command
def object_(model: Model, asked: bytes, key: bytes) -> Answer:
    words = {b"encoding": {bytes: b"raw", dict: b"skiplist"}, b"refcount": {bytes: b"1", dict: b"1"}}
    kind = model.kind(key)
    if asked.lower() == b"idletime":
        return model.idle(key) if kind else None
    if asked.lower() not in words:
        raise Wrong("ERR unknown subcommand")
    return words[asked.lower()][kind] if kind else None


@command
def rename(model: Model, key: bytes, to: bytes) -> Answer:
    if key not in model.data:
        raise Wrong("ERR no such key")
    if key != to:
        model.move(key, to)
    return b"OK"


@command
def renamenx(model: Model, key: bytes, to: bytes) -> Answer:
    if key not in model.data:
        raise Wrong("ERR no such key")
    if to in model.data:
        return 0
    model.move(key, to)
    return 1


@command
def copy(model: Model, key: bytes, to: bytes, *options: bytes) -> Answer:
    if any(option.upper() != b"REPLACE" for option in options):
        raise Wrong("ERR syntax error")
    if key == to:
        raise Wrong("ERR source and destination objects are the same")
    if key not in model.data or (to in model.data and not options):
        return 0
    value, when = model.find(key), model.deadlines.get(key, 0)
    if isinstance(value, bytes):
        model.put(to, value, when)
        return 1
    pairs = model.ordered(key)
    model.drop(to)
    for score, member in pairs:
        model.zput(to, score, member)
    if when:
        model.set_deadline(to, when)
    return 1


# -- deadlines ------------------------------------------------------------------------------------------


def _expire(option: bytes, name: str) -> None:
    def function(model: Model, key: bytes, text: bytes, *options: bytes) -> Answer:
        chosen = {word.upper() for word in options}
        if chosen - {b"NX", b"XX", b"GT", b"LT"} or (b"NX" in chosen and len(chosen) > 1):
            raise Wrong("ERR ")
        if {b"GT", b"LT"} <= chosen:
            raise Wrong("ERR ")
        when = moment(model, option, text, -LARGEST - 1)
        if key not in model.data:
            return 0
        old = model.deadlines.get(key)
        later = old is not None and when > old
        sooner = old is None or when < old
        if (
            (b"NX" in chosen and old is not None)
            or (b"XX" in chosen and old is None)
            or (b"GT" in chosen and not later)
            or (b"LT" in chosen and not sooner)
        ):
            return 0
        model.set_deadline(key, when or -1)
        return 1

    function.__name__ = name
    command(function)


for _option, _name in ((b"EX", "expire"), (b"PX", "pexpire"), (b"EXAT", "expireat"), (b"PXAT", "pexpireat")):
    _expire(_option, _name)


@command
def persist(model: Model, key: bytes) -> Answer:
    model.find(key)
    if key not in model.deadlines:
        return 0
    model.set_deadline(key, 0)
    return 1


def _when(model: Model, key: bytes, since: int, unit: int) -> int:
    if key not in model.data:
        return -2
    if key not in model.deadlines:
        return -1
    return (model.deadlines[key] - since + unit // 2) // unit


@command
def ttl(model: Model, key: bytes) -> Answer:
    return _when(model, key, model.now, 1000)


@command
def pttl(model: Model, key: bytes) -> Answer:
    return _when(model, key, model.now, 1)


@command
def expiretime(model: Model, key: bytes) -> Answer:
    return _when(model, key, 0, 1000)


@command
def pexpiretime(model: Model, key: bytes) -> Answer:
    return _when(model, key, 0, 1)
