"""A leaderboard: who is first, who is next to me, and where am I among millions.

::

    board = Leaderboard(client, "chess")
    board.submit("ada", 2850)           # keeps her best
    board.add("grace", 30)              # or adds points
    board.top(10)                       # [Entry(place=1, player="ada", score=2850.0), ...]
    board.around("grace", 2)            # two above her, herself, two below

* A sorted set holds the players by score. Each question costs O(log players), and the length of its answer.
* Equal scores share a place, and as many places after it are left out: 1, 2, 2, 4. Among themselves they
  stand in the reverse order of their names.
* A score is a double: whole numbers are exact up to 2^53.
* Where a question takes several round trips, what changes between them may show: in ``around``, a player who
  has just moved may be missing.

As a script it plays a few hundred games.
"""

from __future__ import annotations

import random
from math import inf
from typing import NamedTuple

import imds


class Entry(NamedTuple):
    place: int  # from 1
    player: str
    score: float


class Leaderboard:
    """The players of one game, highest score first."""

    def __init__(self, client: imds.Client[str], name: str) -> None:
        self._client = client
        self._key = f"board:{name}"

    def submit(self, player: str, score: float) -> bool:
        """Note a result if it is the player's best; return whether it is."""
        return self._client.zadd_many(self._key, {player: score}, gt=True, ch=True) > 0

    def add(self, player: str, points: float) -> float:
        """Add to the player's score, from 0; return what it is now. Not repeated on a lost connection."""
        return self._client.zincrby(self._key, points, player)

    def remove(self, player: str) -> None:
        """Forget a player."""
        self._client.zrem(self._key, player)

    def __len__(self) -> int:
        return self._client.zcard(self._key)

    def top(self, count: int) -> list[Entry]:
        """Return the first ``count``. One round trip."""
        return _placed(self._client.zrevrange(self._key, 0, count - 1), 0, 1) if count > 0 else []

    def place(self, player: str) -> int | None:
        """Return the player's place, None for one who is not on the board. Two round trips."""
        score = self._client.zscore(self._key, player)
        return None if score is None else self._above(score) + 1

    def around(self, player: str, neighbours: int) -> list[Entry]:
        """Return the player, and so many above and below; nothing without the player. Three round trips."""
        rank = self._client.zrevrank(self._key, player)
        if rank is None:
            return []
        start = max(0, rank - neighbours)
        found = self._client.zrevrange(self._key, start, rank + neighbours)
        return _placed(found, start, self._above(found[0][1]) + 1) if found else []

    def _above(self, score: float) -> int:
        return self._client.zcount(self._key, f"({score!r}", inf)


def _placed(found: list[tuple[str, float]], rank: int, place: int) -> list[Entry]:
    """Return entries of neighbours, the first of which has ``rank`` (from 0) and ``place``."""
    entries: list[Entry] = []
    for position, (player, score) in enumerate(found, rank + 1):
        if entries and score != entries[-1].score:
            place = position
        entries.append(Entry(place, player, score))
    return entries


def main() -> None:
    """Games among eight players."""
    players = ["Ada", "Grace", "Barbara", "Radia", "Frances", "Karen", "Shafi", "Lynn"]
    with imds.serve() as server, server.client(encoding="utf-8") as client:
        board = Leaderboard(client, "chess")
        for _ in range(300):
            winner, loser = random.sample(players, 2)
            board.add(winner, 3)
            board.add(loser, 1)
        for entry in board.top(3):
            print(f"{entry.place}. {entry.player}, {entry.score:g} points")
        print("around Ada:")
        for entry in board.around("Ada", 1):
            print(f"{entry.place}. {entry.player}, {entry.score:g} points")


if __name__ == "__main__":
    main()
