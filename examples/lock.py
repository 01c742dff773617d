"""A lock over several processes and machines, which expires by itself and is safe against a late holder.

::

    with Lock(client, "report", seconds=30) as lock:
        ...                                       # at most 30 s, or lock.extend(30) in between
        fenced_set(client, "{report}", text, lock.number)

* It is a key with an owner's random word and a time to live. A holder that dies, or whose machine does, keeps
  the others waiting until that time is over, and no longer.
* To take, extend and release it are transactions that watch the key: nobody takes what another has taken, or
  releases what has become another's.
* Whoever is stopped for longer than the lock lives (a slow disk, a machine that slept) does not know that it
  is lost. No lock can help that. So each holder gets a number, higher than all before, and what the lock
  protects has to refuse a lower number than it has seen: :func:`fenced_set` does, for a key of this server.
  See https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html ("fencing").
* It is not fair: who asks at the right moment is next. And it is not reentrant: a second ``acquire`` waits.

As a script it shows three workers that take turns, and a fourth that comes back too late.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Self

import imds

LOOK_EVERY = 0.05  # seconds between two looks at a lock that is taken, on average


class LockLost(Exception):
    """The lock has expired, and may be another's now."""


class Lock:
    """The lock ``name``, which expires ``seconds`` after it was taken or extended.

    ``number`` is its holder's, 0 while it is not held. An instance is for one thread.
    """

    def __init__(self, client: imds.Client[bytes], name: str, *, seconds: float = 10.0) -> None:
        self._client = client
        self._key = f"lock:{{{name}}}"  # in one slot with the counter, so that a transaction can have both
        self._counter = f"lock:{{{name}}}:number"
        self._seconds = seconds
        self._owner = b""
        self.number = 0

    def acquire(self, wait: float = 0.0) -> bool:
        """Take the lock, if need be within ``wait`` seconds; return whether it is ours.

        An imds.ImdsError leaves that open. If it was taken nonetheless, it expires.
        """
        deadline = time.monotonic() + wait
        while not self._take():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, random.uniform(0, 2 * LOOK_EVERY)))
        return True

    def extend(self, seconds: float) -> None:
        """Have the lock expire ``seconds`` from now. Raises LockLost."""
        self._if_ours(lambda transaction: transaction.pexpire(self._key, _milliseconds(seconds)))

    def release(self) -> None:
        """Give the lock back. Raises LockLost if it was not ours any more; another's stays as it is."""
        try:
            self._if_ours(lambda transaction: transaction.delete(self._key))
        finally:
            self._owner, self.number = b"", 0

    def _take(self) -> bool:
        owner = secrets.token_bytes(16)
        try:
            with self._client.transaction(self._key) as transaction:
                if transaction.now.exists(self._key):
                    return False
                transaction.set(self._key, owner, px=_milliseconds(self._seconds)).incr(self._counter)
                _, self.number = transaction.execute()
        except imds.WatchError:  # somebody was faster
            return False
        self._owner = owner
        return True

    def _if_ours(self, then: Callable[[imds.Transaction[bytes]], object]) -> None:
        try:
            with self._client.transaction(self._key) as transaction:
                ours = self._owner and transaction.now.get(self._key) == self._owner
                if ours:
                    then(transaction)
        except imds.WatchError:  # it has expired since, and another has it
            ours = False
        if not ours:
            raise LockLost(self._key)

    def __enter__(self) -> Self:
        """Wait for the lock, however long that takes."""
        self.acquire(inf)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except LockLost as lost:
            if error is None:
                raise
            error.add_note(f"the lock was lost, too: {lost}")


def fenced_set(client: imds.Client[bytes], key: str, value: str | bytes, number: int) -> bool:
    """Set ``key``, which has a ``{tag}``, unless a later holder has; return whether it was done."""
    fence = f"{key}:number"
    while True:
        try:
            with client.transaction(fence) as transaction:
                if int(transaction.now.get(fence) or 0) > number:
                    return False
                transaction.set(key, value).set(fence, number)
            return True
        except imds.WatchError:  # somebody has written meanwhile: look again whose number is higher
            pass


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def main() -> None:
    """Three workers, then one that sleeps for too long."""
    with imds.serve() as server, server.client() as client:

        def work(name: str) -> None:
            with Lock(client, "report") as lock:
                print(f"{name} has the lock, number {lock.number}")
                time.sleep(0.1)
                fenced_set(client, "{report}", f"by {name}", lock.number)

        workers = [threading.Thread(target=work, args=(name,)) for name in ("Ada", "Grace", "Barbara")]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

        late = Lock(client, "report", seconds=0.1)
        late.acquire()
        number = late.number
        time.sleep(0.2)
        work("Radia")
        print("a late write is taken:", fenced_set(client, "{report}", "by a sleeper", number))
        try:
            late.release()
        except LockLost as lost:
            print("lost:", lost)
        print("the report is", (client.get("{report}") or b"").decode())


if __name__ == "__main__":
    main()
