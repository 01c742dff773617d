r"""Sorted sets: members (bytes) in the order of (score, member bytes).

What always holds (:meth:`SortedSet.check` asserts all of it):

* ``_score_of`` has each member once; the chunks have exactly its members and scores.
* The chunks, one after the other, are in order; none is empty, none is longer than 2 x LOAD.
* ``_last`` has the last pair of each chunk, in a chunk's own form.
* ``_tree`` is None, or the Fenwick tree over the chunks' lengths.
* No score is NaN, and none is -0.0: it becomes 0.0, which it equals.

::

    _last      2.0 7.5 9.0 ...           bisect finds the chunk
               c   k   a
                |   \   \______
    _chunks    1.0  \____     8.0 9.0    bisect finds the place in it
               1.5  2.0  7.1  x   a
               2.0  d ...7.5
               a b c     j k
    _tree      3    8         2          sums of lengths: the pairs before a chunk, in O(log chunks)

A chunk keeps its scores apart from its members, as machine doubles: a search reads a few hundred adjacent
bytes, where pairs would cost three memory accesses at each step (half the speed and twice the memory at
10^5 members).

The compiled twin (``_kernel/sortedset.pyx``) has chunks too, smaller ones, found by a skip list with spans.
In Python that costs an object and several interpreted steps for each link; bisect over arrays, all of it in
C, is several times faster. An insertion moves at most 2 x LOAD entries. Both keep interface and order.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

LOAD = 500  # pairs: a chunk splits at twice as many, and joins a neighbour at half as many

# Bytes that CPython takes (measured by tracemalloc, as tests/shard/test_sortedset.py does).
SET_COST = 680  # an empty set: the object, its dict, lists and first chunk
MEMBER_COST = 120  # a member: bytes object without its text, float, share of dict and chunk


class Chunk:
    """A run of pairs: ``scores[i]`` belongs to ``members[i]``."""

    __slots__ = ("members", "scores")

    def __init__(self, scores: array[float], members: list[bytes]) -> None:
        self.scores = scores
        self.members = members

    def place(self, score: float, member: bytes) -> int:
        """Return how many pairs are less than this one. O(log n)."""
        scores, members = self.scores, self.members
        at = bisect_left(scores, score)
        if at == len(scores) or scores[at] != score or members[at] >= member:  # mostly
            return at
        return bisect_left(members, member, at + 1, bisect_right(scores, score, at + 1))


class SortedSet:
    """Members with scores. ``used`` is the counted memory in bytes."""

    __slots__ = ("_chunks", "_last", "_score_of", "_tree", "used")

    def __init__(self) -> None:
        self._score_of: dict[bytes, float] = {}
        self._chunks: list[Chunk] = []
        self._last = Chunk(array("d"), [])
        self._tree: list[int] | None = None
        self.used = SET_COST

    def __len__(self) -> int:
        return len(self._score_of)

    def cost_of(self, member: bytes) -> int:
        """Return the bytes that ``member`` adds to ``used`` when it comes, and takes from it when it goes."""
        return MEMBER_COST + len(member)

    def score(self, member: bytes) -> float | None:
        """Return the score of ``member``, or None if it is not here. O(1)."""
        return self._score_of.get(member)

    def add(self, member: bytes, score: float) -> bool | None:
        """Give ``member`` this score: True if it is new, False if it moved, None if nothing changed.

        Raises ValueError for NaN. O(log n + LOAD).
        """
        if score != score:
            raise ValueError("NaN is no score")
        score += 0.0  # -0.0 becomes 0.0
        old = self._score_of.get(member)
        if old == score:
            return None
        if old is not None:
            self._take_out(old, member)
        else:
            self.used += self.cost_of(member)
        self._score_of[member] = score
        self._put_in(score, member)
        return old is None

    def remove(self, member: bytes) -> bool:
        """Remove ``member``; return whether it was here. O(log n + LOAD)."""
        score = self._score_of.pop(member, None)
        if score is None:
            return False
        self._take_out(score, member)
        self.used -= self.cost_of(member)
        return True

    def rank(self, member: bytes) -> int | None:
        """Return how many pairs come before ``member``'s, or None if it is not here. O(log n)."""
        score = self._score_of.get(member)
        if score is None:
            return None
        return self.place(score, member)

    def range(self, low: float, high: float) -> list[tuple[float, bytes]]:
        """Return the pairs with ``low <= score <= high`` in order. O(log n) and the pairs returned."""
        last = self._last.scores
        first = bisect_left(last, low)
        if first == len(last) or low > high:
            return []
        final = min(bisect_right(last, high, first), len(last) - 1)
        start = bisect_left(self._chunks[first].scores, low)
        stop = bisect_right(self._chunks[final].scores, high)
        pairs: list[tuple[float, bytes]] = []
        for at in range(first, final + 1):
            chunk = self._chunks[at]
            part = slice(start if at == first else 0, stop if at == final else None)
            pairs += zip(chunk.scores[part], chunk.members[part], strict=True)
        return pairs

    def place(self, score: float, member: bytes) -> int:
        """Return how many pairs come before (score, member). O(log n)."""
        if not self._chunks:
            return 0
        at = self._chunk_of(score, member)
        rank = self._chunks[at].place(score, member)
        if not at:
            return rank
        tree = self._tree
        if tree is None:
            tree = self._tree = self._lengths()
        while at:
            rank += tree[at]
            at &= at - 1
        return rank

    def slice(self, start: int, stop: int) -> list[tuple[float, bytes]]:
        """Return the pairs from rank ``start`` to before ``stop``. O(chunks) and the pairs returned."""
        pairs: list[tuple[float, bytes]] = []
        for chunk in self._chunks:
            size = len(chunk.members)
            if start < size and stop > 0:
                part = slice(max(start, 0), stop)
                pairs += zip(chunk.scores[part], chunk.members[part], strict=True)
            start -= size
            stop -= size
            if stop <= 0:
                break
        return pairs

    def _chunk_of(self, score: float, member: bytes) -> int:
        """Return which chunk has this pair, or would have it. O(log chunks)."""
        end = len(self._chunks) - 1
        return min(self._last.place(score, member), end) if end else 0

    def _put_in(self, score: float, member: bytes) -> None:
        last, chunks = self._last, self._chunks
        if not chunks:
            self._replace(0, 0, [Chunk(array("d", [score]), [member])])
            return
        at = self._chunk_of(score, member)
        chunk = chunks[at]
        place = chunk.place(score, member)
        chunk.scores.insert(place, score)
        chunk.members.insert(place, member)
        size = len(chunk.members)
        if size > 2 * LOAD:
            self._replace(at, at + 1, _halves(chunk.scores, chunk.members))
            return
        if place == size - 1:
            last.scores[at], last.members[at] = score, member
        self._count(at, 1)

    def _take_out(self, score: float, member: bytes) -> None:
        last, chunks = self._last, self._chunks
        at = self._chunk_of(score, member)
        chunk = chunks[at]
        place = chunk.place(score, member)
        del chunk.scores[place], chunk.members[place]
        size = len(chunk.members)
        if size < LOAD // 2 and len(chunks) > 1:
            at = max(at - 1, 0)
            left, right = chunks[at : at + 2]
            both = Chunk(left.scores + right.scores, left.members + right.members)
            fits = len(both.members) <= 3 * LOAD // 2
            self._replace(at, at + 2, [both] if fits else _halves(both.scores, both.members))
        elif not size:
            self._replace(at, at + 1, [])
        else:
            if place == size:
                last.scores[at], last.members[at] = chunk.scores[-1], chunk.members[-1]
            self._count(at, -1)

    def _replace(self, start: int, stop: int, chunks: list[Chunk]) -> None:
        """Put ``chunks`` in the place of those from ``start`` to ``stop``. O(chunks)."""
        self._chunks[start:stop] = chunks
        self._last.scores[start:stop] = array("d", [chunk.scores[-1] for chunk in chunks])
        self._last.members[start:stop] = [chunk.members[-1] for chunk in chunks]
        self._tree = None

    def _count(self, at: int, change: int) -> None:
        """Tell the tree that chunk ``at`` grew by ``change``. O(log chunks)."""
        tree = self._tree
        if tree is None:
            return
        at += 1
        while at < len(tree):
            tree[at] += change
            at += at & -at

    def _lengths(self) -> list[int]:
        """Return the Fenwick tree over the chunks' lengths, 1-based. O(chunks)."""
        tree = [0, *(len(chunk.members) for chunk in self._chunks)]
        for at in range(1, len(tree)):
            parent = at + (at & -at)
            if parent < len(tree):
                tree[parent] += tree[at]
        return tree

    def check(self) -> None:
        """Raise AssertionError unless every rule at the top of this file holds. O(n log n)."""
        state = f"{len(self)} members, chunks of {[len(chunk.members) for chunk in self._chunks]}"
        pairs: list[tuple[float, bytes]] = []
        for chunk in self._chunks:
            assert 1 <= len(chunk.members) <= 2 * LOAD, f"chunk length: {state}"
            pairs += zip(chunk.scores, chunk.members, strict=True)
        assert pairs == sorted(pairs), f"out of order: {state}"
        assert len(pairs) == len(self), f"{len(pairs)} pairs: {state}"
        assert {member: score for score, member in pairs} == self._score_of, (
            f"pairs are not the members: {state}"
        )
        assert list(self._last.scores) == [chunk.scores[-1] for chunk in self._chunks], (
            f"last scores: {state}"
        )
        assert self._last.members == [chunk.members[-1] for chunk in self._chunks], f"last members: {state}"
        assert self._tree is None or self._tree == self._lengths(), f"tree {self._tree}: {state}"
        assert not any(score != score or str(score) == "-0.0" for score, _member in pairs), f"score: {state}"
        used = SET_COST + sum(map(self.cost_of, self._score_of))
        assert self.used == used, f"used {self.used}, counted {used}: {state}"


def _halves(scores: array[float], members: list[bytes]) -> list[Chunk]:
    half = len(members) // 2
    return [Chunk(scores[:half], members[:half]), Chunk(scores[half:], members[half:])]
