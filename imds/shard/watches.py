"""Watched keys: whether anything has changed them since a client looked.

What changes a key is in the log: writes, evictions, expirations. So nothing but the effects of a batch is
looked at, and only while a key is watched at all. An effect that is no command of the table counts for each
of its words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from imds.commands import lookup
from imds.protocol import split_request
from imds.shard.record import each_effect

FEW = 16  # keys for which searching the effects as bytes comes before looking at each effect

EVERYTHING = (b"flushall",)  # effects that concern every key

Watcher = tuple[bytes, bytes]  # the number of a router, and of one of its clients


def touched(records: bytes, keys: Iterable[bytes]) -> set[bytes]:
    """Return those of ``keys`` that the effects in ``records`` are about. O(records), less for few keys."""
    wanted = set(keys)
    if len(wanted) <= FEW:
        wanted = {key for key in wanted if key in records}
        if not wanted and not any(name in records for name in EVERYTHING):
            return wanted
    found: set[bytes] = set()
    for _number, start, end in each_effect(records):
        tokens, _ = split_request(records[start:end])
        if tokens[0] in EVERYTHING:
            return set(keys)
        command = lookup(tokens[0])
        if command is None:
            found.update(wanted.intersection(tokens[1:]))
        else:
            found.update(tokens[at] for at in command.key_positions(tokens) if tokens[at] in wanted)
    return found


class Watches:
    """Which router watches which keys. ``pending`` returns the effects of the batch that is under way.

    A version names this process and a moment; a key is unchanged if it has not been touched since then.
    """

    def __init__(self, pending: Callable[[], bytes]) -> None:
        self._pending = pending
        self._seen = 0  # bytes of the batch's effects that have been looked at
        self._epoch = os.urandom(8).hex().encode()
        self._moment = 0
        self._touched: dict[bytes, int] = {}  # each watched key: the moment of its last change
        self._watchers: dict[bytes, set[Watcher]] = {}  # and who watches it

    def __bool__(self) -> bool:
        return bool(self._touched)

    def watch(self, router: bytes, client: bytes, keys: Iterable[bytes]) -> bytes:
        """Watch ``keys`` for a client of ``router``; return their version."""
        self.look()
        self._seen = len(self._pending())  # what is before is no change, whether it has been looked at or not
        for key in keys:
            self._touched.setdefault(key, self._moment)
            self._watchers.setdefault(key, set()).add((router, client))
        return b"%b:%d" % (self._epoch, self._moment)

    def unwatch(self, router: bytes, client: bytes, keys: Iterable[bytes]) -> None:
        """Take back :meth:`watch`; what is not watched does not matter."""
        for key in keys:
            self._dismiss(key, {(router, client)})

    def leave(self, router: bytes) -> None:
        """A router is gone, and all its clients with it."""
        for key, watchers in list(self._watchers.items()):
            self._dismiss(key, {one for one in watchers if one[0] == router})

    def _dismiss(self, key: bytes, gone: set[Watcher]) -> None:
        watchers = self._watchers.get(key)
        if watchers is not None:
            watchers -= gone
            if not watchers:
                del self._watchers[key], self._touched[key]

    def unchanged(self, key: bytes, version: bytes) -> bool:
        """Whether ``key`` is as it was when it had ``version``. Look first."""
        epoch, _, moment = version.partition(b":")
        return epoch == self._epoch and key in self._touched and self._touched[key] <= int(moment)

    def look(self) -> None:
        """Note what the batch has changed by now."""
        if self._touched:
            records = self._pending()
            self._note(records[self._seen :])
            self._seen = len(records)

    def undo_batch(self) -> None:
        """What the batch has changed was put back; it counts as touched nevertheless."""
        self._seen = 0

    def end_batch(self, records: bytes) -> None:
        """The same for the batch's last effects; ``records`` are all of them."""
        if self._touched and self._seen < len(records):
            self._note(records[self._seen :])
        self._seen = 0

    def _note(self, records: bytes) -> None:
        changed = touched(records, self._touched)
        if changed:
            self._moment += 1
            self._touched.update(dict.fromkeys(changed, self._moment))

    def check(self) -> None:
        """Assert that both tables have the same keys, each with a watcher. O(keys)."""
        assert self._touched.keys() == self._watchers.keys(), (self._touched, self._watchers)
        for key, watchers in self._watchers.items():
            assert watchers, key
            assert self._touched[key] <= self._moment, (key, self._touched[key], self._moment)
