"""What a benchmark asks for: keys, values, mixes of commands, and their requests encoded in advance.

Everything follows from a :class:`Workload` and a seed, so a run can be repeated to the byte. The same
requests can be spelled in imds's protocol or in RESP, so that two servers are asked for the same work::

    strings       key:000000000000 ...                16-byte keys, each value ``value_size`` bytes
    sorted sets   z:0 ... z:63, members m:000000 ...  8-byte members, scores 0 to 999,999

``zrange`` asks for a score range that holds about ten members, whatever the size of the set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from imds.protocol import encode_request

Tokens = tuple[bytes, ...]

SCORES = 1_000_000
RANGE_MEMBERS = 10  # how many members a zrange finds, on average

# The requests of a process are encoded before the clock starts and then sent round and round. More
# would make every pass over them miss the processor's caches; these limits keep a pool in memory.
POOL_REQUESTS = 65_536
POOL_BYTES = 256 << 20


def resp_request(tokens: Sequence[bytes]) -> bytes:
    """Return the RESP frame of the request that imds spells ``tokens``."""
    if tokens[0] == b"zrange":
        tokens = (b"ZRANGEBYSCORE", *tokens[1:], b"WITHSCORES")
    return b"*%d\r\n" % len(tokens) + b"".join(b"$%d\r\n%b\r\n" % (len(token), token) for token in tokens)


ENCODERS: dict[str, Callable[[Sequence[bytes]], bytes]] = {"imds": encode_request, "resp": resp_request}


def zeta(count: int, theta: float) -> float:
    """Return the sum of 1 / i**theta for i from 1 to ``count``, to about ten digits. O(1) above 10,000."""
    exact = min(count, 10_000)
    total = math.fsum(i**-theta for i in range(1, exact + 1))
    if count > exact:  # Euler-Maclaurin: the integral, and half a step at both ends
        power = 1 - theta
        total += (count**power - exact**power) / power + (count**-theta - exact**-theta) / 2
    return total


def uniform(count: int, rng: Random) -> Callable[[], int]:
    """Return a function that draws from 0 to ``count`` - 1, each equally likely."""
    return lambda: int(rng.random() * count)


def zipf(count: int, rng: Random, theta: float = 0.99) -> Callable[[], int]:
    """Return a function that draws from 0 to ``count`` - 1 so that item i comes up like 1 / (i+1)**theta.

    Gray's method (Quickly Generating Billion-Record Synthetic Databases, 1994), as YCSB uses it.
    """
    if count == 1:
        return lambda: 0
    total = zeta(count, theta)
    second = 1 + 0.5**theta
    alpha = 1 / (1 - theta)
    eta = (1 - (2 / count) ** (1 - theta)) / (1 - second / total) if count > 2 else 0.0

    def draw() -> int:
        u = rng.random()
        scaled = u * total
        if scaled < 1:
            return 0
        if scaled < second:
            return 1
        return min(count - 1, int(count * (eta * u - eta + 1) ** alpha))

    return draw


DISTRIBUTIONS = {"uniform": uniform, "zipf": zipf}


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of one test. ``mix`` is pairs of command and weight."""

    mix: tuple[tuple[str, int], ...]
    keys: int = 100_000
    value_size: int = 64
    sets: int = 64
    members: int = 1000
    distribution: str = "uniform"
    seed: int = 1

    @property
    def value(self) -> bytes:
        """The one value that every set stores: letters, in a pattern."""
        return (b"abcdefghijklmnopqrstuvwxyz" * (self.value_size // 26 + 1))[: self.value_size]


class Source:
    """Draws requests of a workload, one method for each command, named like it. Returns tokens."""

    def __init__(self, workload: Workload, rng: Random) -> None:
        draw = DISTRIBUTIONS[workload.distribution]
        self._key = draw(workload.keys, rng)
        self._member = draw(workload.members, rng)
        self._set = uniform(workload.sets, rng)
        self._score = uniform(SCORES, rng)
        self._width = max(1, RANGE_MEMBERS * SCORES // workload.members)
        self._value = workload.value

    def get(self) -> Tokens:
        return b"get", key_name(self._key())

    def set(self) -> Tokens:
        return b"set", key_name(self._key()), self._value

    # "del" is no name in Python; COMMANDS below maps it
    def delete(self) -> Tokens:
        return b"del", key_name(self._key())

    def zadd(self) -> Tokens:
        return b"zadd", set_name(self._set()), b"%d" % self._score(), member_name(self._member())

    def zrem(self) -> Tokens:
        return b"zrem", set_name(self._set()), member_name(self._member())

    def zrank(self) -> Tokens:
        return b"zrank", set_name(self._set()), member_name(self._member())

    def zrange(self) -> Tokens:
        low = int(self._score() / SCORES * max(1, SCORES - self._width))
        return b"zrange", set_name(self._set()), b"%d" % low, b"%d" % (low + self._width)


def key_name(number: int) -> bytes:
    """Return the key of string ``number``, 16 bytes."""
    return b"key:%012d" % number


def set_name(number: int) -> bytes:
    """Return the key of sorted set ``number``."""
    return b"z:%d" % number


def member_name(number: int) -> bytes:
    """Return member ``number`` of every sorted set, 8 bytes."""
    return b"m:%06d" % number


COMMANDS: dict[str, Callable[[Source], Tokens]] = {
    "get": Source.get,
    "set": Source.set,
    "del": Source.delete,
    "zadd": Source.zadd,
    "zrem": Source.zrem,
    "zrank": Source.zrank,
    "zrange": Source.zrange,
}

# Names of mixes that --tests knows besides the commands themselves.
MIXES: dict[str, tuple[tuple[str, int], ...]] = {"mixed": (("get", 90), ("set", 10))}


def parse_mix(text: str) -> tuple[tuple[str, int], ...]:
    """Return the pairs that ``text``, such as ``get:90,set:10``, stands for. Raises ValueError."""
    pairs: dict[str, int] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        name = name.lower()
        if name not in COMMANDS:
            raise ValueError(f"no command {name!r} in a mix, there are: {', '.join(COMMANDS)}")
        if name in pairs:
            raise ValueError(f"{name} is in the mix twice")
        if colon and not (weight.isascii() and weight.isdigit() and int(weight)):
            raise ValueError(f"the weight {weight!r} of {name} must be a whole number above 0")
        pairs[name] = int(weight) if colon else 1
    return tuple(pairs.items())


class Batch:
    """Requests that go out in one write.

    ``names`` are their commands in order, ``counts`` the same added up. ``clean`` is a reply to the
    whole batch that has been looked through and holds neither errors nor misses: the same bytes
    again need no second look.
    """

    __slots__ = ("clean", "counts", "frame", "names")

    def __init__(self, frame: bytes, names: tuple[str, ...]) -> None:
        self.frame = frame
        self.names = names
        self.counts = tuple((name, names.count(name)) for name in dict.fromkeys(names))
        self.clean = b""


def pool(
    workload: Workload, protocol: str, pipeline: int, process: int = 0, requests: int = POOL_REQUESTS
) -> list[Batch]:
    """Return batches of ``pipeline`` requests each, about ``requests`` in all, different in each process."""
    rng = Random(f"{workload.seed}/{process}")
    source = Source(workload, rng)
    encode = ENCODERS[protocol]
    commands = [name for name, _ in workload.mix]
    weights = [weight for _, weight in workload.mix]
    alone = (commands[0],) * pipeline if len(commands) == 1 else ()
    batches: list[Batch] = []
    size = 0
    while len(batches) < 2 or (len(batches) * pipeline < requests and size < POOL_BYTES):
        names = alone or tuple(rng.choices(commands, weights, k=pipeline))
        frame = b"".join([encode(COMMANDS[name](source)) for name in names])
        batches.append(Batch(frame, names))
        size += len(frame)
    return batches


def fill(workload: Workload, kinds: Sequence[str], share: int = 0, shares: int = 1) -> Iterator[Tokens]:
    """Yield the requests that make part ``share`` of ``shares`` of the data.

    ``kinds`` says which data: "strings", "sets" or both.
    """
    if "strings" in kinds:
        value = workload.value
        for number in range(share, workload.keys, shares):
            yield b"set", key_name(number), value
    if "sets" in kinds:
        rng = Random(f"{workload.seed}/scores/{share}")
        score = uniform(SCORES, rng)
        for number in range(share, workload.sets * workload.members, shares):
            member, which = divmod(number, workload.sets)
            yield b"zadd", set_name(which), b"%d" % score(), member_name(member)


def kinds_of(mix: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return which kinds of data, as :func:`fill` names them, the commands of ``mix`` work on."""
    return tuple(sorted({"sets" if name.startswith("z") else "strings" for name, _ in mix}))
