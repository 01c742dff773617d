"""Threads that take turns, and a clock that only waiting moves: the same seed gives the same run.

Real threads run the code under test, one at a time. The turn passes where a thread waits (a lock, a
condition, a selector, a sleep) and at each operation of the disk; who is next is drawn by the schedule's
random generator. When everybody waits, the clock jumps to the first deadline.
"""

from __future__ import annotations

import random
import selectors
import threading
from collections.abc import Callable
from typing import Any

from campaigns.simdisk import SimCrash

FOREVER = float("inf")


class Deadlock(AssertionError):
    """Everybody waits, and for nothing that time could bring."""


class Task:
    """One thread, the one that made the schedule among them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.baton = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None  # what it waits for, besides its deadline
        self.deadline = 0.0  # it runs again at this time at the latest
        self.done = False
        self.error: BaseException | None = None
        self.result: Any = None


class Schedule:
    """Who runs, and what time it is, in seconds."""

    def __init__(self, rng: random.Random, now: float) -> None:
        self.rng = rng
        self.now = now
        self.tick: Callable[[], None] = lambda: None  # called before the clock moves
        self.stopped = False  # every thread but the first unwinds, by SimCrash
        self.main = Task("main")
        self._tasks = [self.main]
        self._current = self.main
        self._threads: list[threading.Thread] = []

    @property
    def current(self) -> Task:
        """Whose turn it is."""
        return self._current

    def spawn(self, run: Callable[[], Any], name: str) -> Task:
        """Start ``run`` in a thread of its own; it gets its first turn some time later."""
        task = Task(name)

        def body() -> None:
            task.baton.acquire()
            try:
                if not self.stopped:
                    task.result = run()
            except SimCrash as crash:
                # Its frames go now, and what they hold is closed now, not in the course of a later run.
                task.error = crash.with_traceback(None)
            except BaseException as error:
                task.error = error
            task.done = True
            self._tasks.remove(task)
            self._pass_on()

        thread = threading.Thread(target=body, name=name, daemon=True)
        self._threads.append(thread)
        self._tasks.append(task)
        thread.start()
        return task

    def pause(self) -> None:
        """Let somebody else have a turn, perhaps."""
        if len(self._tasks) > 1:
            self.wait(lambda: True)

    def sleep(self, seconds: float) -> None:
        """Return when that much time has gone by."""
        self.wait(None, self.now + max(seconds, 0.0))

    def wait(self, ready: Callable[[], bool] | None, deadline: float = FOREVER) -> None:
        """Return when ``ready()`` is true or the deadline has come. Raises SimCrash in a stopped schedule."""
        task = self._current
        if self.stopped and task is not self.main:
            raise SimCrash("stopped")
        task.ready, task.deadline = ready, deadline
        self._pass_on()
        if self.stopped and task is not self.main:
            raise SimCrash("stopped")
        if task is self.main and task.error is not None:
            raise task.error

    def stop(self) -> None:
        """Unwind every other thread. To be called by the one that made the schedule."""
        self.stopped = True
        while len(self._tasks) > 1:
            self.wait(lambda: True)
        for thread in self._threads:
            thread.join()

    def _pass_on(self) -> None:
        """Give the turn to a thread that can run; return when it has come back."""
        here = self._current
        following = self._choose()
        if following is here:
            return
        self._current = following
        following.baton.release()
        if not here.done:
            here.baton.acquire()

    def _choose(self) -> Task:
        if self.stopped:
            return self._tasks[-1]
        while True:
            able = [
                task
                for task in self._tasks
                if task.deadline <= self.now or (task.ready is not None and task.ready())
            ]
            if able:
                return able[0] if len(able) == 1 else self.rng.choice(able)
            self.tick()
            self.now = min(task.deadline for task in self._tasks)
            if self.now == FOREVER:
                self.stopped = True
                self.main.error = Deadlock(f"all of {[task.name for task in self._tasks]} wait for ever")
                return self.main


# -- what stands in for threading, time and selectors ---------------------------------------------


class Lock:
    """threading.Lock."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._held:
            if not blocking:
                return False
            deadline = FOREVER if timeout < 0 else self._schedule.now + timeout
            self._schedule.wait(lambda: not self._held, deadline)
            if self._held:
                return False
        self._held = True
        return True

    def release(self) -> None:
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition(Lock):
    """threading.Condition, with a lock of its own."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self._waiting: list[list[bool]] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert self._held, "wait without the lock"
        told = [False]
        self._waiting.append(told)
        self.release()
        try:
            self._schedule.wait(
                lambda: told[0], FOREVER if timeout is None else self._schedule.now + max(timeout, 0.0)
            )
        finally:
            self._waiting = [one for one in self._waiting if one is not told]  # others are equal to it
        self.acquire()
        return told[0]

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = FOREVER if timeout is None else self._schedule.now + timeout
        while not (found := predicate()) and self._schedule.now < deadline:
            self.wait(None if timeout is None else deadline - self._schedule.now)
        return found

    def notify(self, count: int = 1) -> None:
        for told in self._waiting[:count]:
            told[0] = True
        del self._waiting[:count]

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    """threading.Event."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._set = False

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        self._schedule.wait(
            lambda: self._set, FOREVER if timeout is None else self._schedule.now + max(timeout, 0.0)
        )
        return self._set


class Thread:
    """threading.Thread, as far as it is started and joined."""

    def __init__(
        self,
        schedule: Schedule,
        target: Callable[..., Any],
        name: str = "thread",
        args: tuple[Any, ...] = (),
        daemon: bool = False,
    ) -> None:
        self._schedule = schedule
        self._run = lambda: target(*args)
        self.name = name
        self._task: Task | None = None

    def start(self) -> None:
        self._task = self._schedule.spawn(self._run, self.name)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self, timeout: float | None = None) -> None:
        task = self._task
        assert task is not None
        self._schedule.wait(lambda: task.done, FOREVER if timeout is None else self._schedule.now + timeout)


class Selector:
    """A real selector whose waiting is the schedule's."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._real = selectors.DefaultSelector()
        for name in ("register", "unregister", "modify", "close", "get_map", "get_key"):
            setattr(self, name, getattr(self._real, name))

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        deadline = FOREVER if timeout is None else self._schedule.now + max(timeout, 0.0)
        self._schedule.wait(lambda: bool(self._real.select(0)), deadline)
        return self._real.select(0)
