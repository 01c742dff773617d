"""Is a history of one register linearizable? The algorithm of Wing and Gong, with Lowe's memoisation.

A history is a list of operations on one key by several clients, each with the time of its call and of its
return. It is linearizable if the operations can be put in one order in which each lies between its call and
its return, and each read returns what the last write before it wrote. A write of unknown outcome returns
never: it may take effect at any time after its call, or not at all.

The search takes, again and again, one of the operations that no other one has to precede, and undoes that
where it leads nowhere. What it has tried once it never tries again: the set of operations that were taken (an
integer, one bit for each), and the value if anybody still has to read it. Most choices are none:

* A read that fits is taken at once: it stands in nobody's way.
* A write that nobody reads is taken at once when nobody has to read the present value any more.
* A value that somebody still has to read is not overwritten, unless it can be written again.

The search gives up after a number of steps, and then says so: a history that was not decided is no good one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

NEVER = float("inf")
STEPS = 200_000

Verdict = Literal["linearizable", "not linearizable", "undecided"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: ``write`` of ``value``, or a read that returned it. ``end`` is NEVER if unknown."""

    client: int
    start: float
    end: float
    write: bool
    value: Hashable


def check(history: Sequence[Operation], initial: Hashable = None, steps: int = STEPS) -> Verdict:
    """Decide a history of one register that first holds ``initial``. Exponential at worst."""
    # A read of unknown outcome says nothing; and a write of which nobody knows, and that nobody read, may as
    # well never have happened.
    read = {one.value for one in history if not one.write and one.end != NEVER}
    operations = sorted(
        (one for one in history if one.end != NEVER or (one.write and one.value in read)),
        key=lambda one: (one.start, one.end),
    )
    starts = [one.start for one in operations]
    ends = [one.end for one in operations]
    must = 0
    reads: dict[Hashable, int] = {}  # value: the operations that read it, as a set of bits
    writes: dict[Hashable, int] = {}
    for index, one in enumerate(operations):
        must |= (one.end != NEVER) << index
        kind = writes if one.write else reads
        kind[one.value] = kind.get(one.value, 0) | 1 << index

    def choices(taken: int, value: Hashable) -> list[int]:
        """Return which operations to try next, the last one first."""
        limit, able = NEVER, []
        index = (~taken & (taken + 1)).bit_length() - 1  # the first that is not taken
        while index < len(operations) and starts[index] <= limit:
            if not taken >> index & 1:
                able.append(index)
                limit = min(limit, ends[index])  # whoever starts after another one's end comes after it
            index += 1
        able = [index for index in able if starts[index] <= limit]
        for index in able:
            if not operations[index].write and operations[index].value == value:
                return [index]
        wanted = reads.get(value, 0) & ~taken
        if wanted and not writes.get(value, 0) & ~taken:
            return []
        useful = []
        for index in reversed(able):
            if operations[index].write:
                if reads.get(operations[index].value, 0) & ~taken:
                    useful.append(index)
                elif must >> index & 1:
                    if not wanted:
                        return [index]
                    useful.append(index)
        return useful

    tried: set[tuple[int, Hashable]] = set()
    stack: list[tuple[int, Hashable]] = [(0, initial)]
    while stack:
        taken, value = stack.pop()
        if taken & must == must:
            return "linearizable"
        state = taken, value if reads.get(value, 0) & ~taken else _NOBODYS
        if state in tried:
            continue
        tried.add(state)
        if len(tried) > steps:
            return "undecided"
        for index in choices(taken, value):
            one = operations[index]
            stack.append((taken | 1 << index, one.value if one.write else value))
    return "not linearizable"


_NOBODYS = object()
