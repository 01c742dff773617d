"""The other routers of the server: what is about all connections is asked of each of them.

::

    router  -- ask {number}, a file for each peer -->  supervisor  -- ask {router, number}, 1 file -->  peer
            <-- answered {number} --                               <-- answered {router, number} --

The question is in the file, and so is the answer: control messages have to be short, and a list of ten
thousand connections is not. A router that is not there, or silent for PATIENCE seconds, is left out.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from imds.protocol import encode_request, split_request
from imds.router.request import Host

PATIENCE = 1.0  # seconds

Done = Callable[[list[bytes]], None]


@dataclass(slots=True, eq=False)
class Question:
    """What has been asked. ``files`` are those of the routers that have not answered yet, by number."""

    done: Done
    files: dict[int, int]
    answers: list[bytes]
    deadline: float = field(default_factory=lambda: time.monotonic() + PATIENCE)


class Peers:
    """Asks, and answers who asks. ``handlers`` answer a question by its first word, from the others."""

    def __init__(self, host: Host, number: int) -> None:
        self._host = host
        self._number = number
        self._questions: dict[int, Question] = {}
        self._last = random.getrandbits(32)  # not what a router asked that had this one's number before
        self.handlers: dict[bytes, Callable[[list[bytes]], bytes]] = {}

    def __bool__(self) -> bool:
        return bool(self._questions)

    def ask(self, words: list[bytes], done: Done) -> None:
        """Have every router answer; ``done`` is called with this one's own answer, then the others'."""
        own = self.handlers[words[0]](words[1:])
        others = [number for number in range(self._host.config.routers) if number != self._number]
        question = Question(done, {}, [own])
        frame = encode_request(words)
        try:
            for number in others:
                with tempfile.TemporaryFile() as file:
                    file.write(frame)
                    file.flush()
                    question.files[number] = os.dup(file.fileno())
        except OSError:
            self._close(question)
        if question.files:
            self._last += 1
            self._questions[self._last] = question
            if not self._host.channel.send("ask", tuple(question.files.values()), number=self._last):
                self._end(self._last)
        else:
            done(question.answers)

    def on_ask(self, router: int, number: int, fd: int) -> None:
        """Another router asks."""
        with suppress(OSError), os.fdopen(fd, "rb+", buffering=0) as file:
            words, _ = split_request(os.pread(fd, os.fstat(fd).st_size, 0))
            answer = self.handlers[words[0]](words[1:])
            file.truncate(0)
            file.seek(0)
            while answer:
                answer = answer[file.write(answer) :]
        self._host.channel.send("answered", router=router, number=number)

    def on_answered(self, number: int, peer: int, *, there: bool) -> None:
        """Another router has answered, or is not there."""
        question = self._questions.get(number)
        if question is None or peer not in question.files:
            return
        fd = question.files.pop(peer)
        if there:
            question.answers.append(os.pread(fd, os.fstat(fd).st_size, 0))
        os.close(fd)
        if not question.files:
            self._end(number)

    def on_time(self) -> None:
        """Wait no longer for who is silent."""
        now = time.monotonic()
        for number in [one for one, question in self._questions.items() if now >= question.deadline]:
            self._end(number)

    def _end(self, number: int) -> None:
        question = self._questions.pop(number)
        self._close(question)
        question.done(question.answers)

    @staticmethod
    def _close(question: Question) -> None:
        while question.files:
            os.close(question.files.popitem()[1])
