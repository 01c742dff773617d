"""Real words through a real server, every answer checked against Python's own sort.

The 100,000 most frequent English words of the package wordfreq go in as strings (``word:the`` holds the
word's frequency) and into a sorted set for each first letter (``letter:t``, scored by frequency). Then every
word, every rank and several ranges of each letter are asked for. With ``--kill`` a shard is killed by
SIGKILL in the middle of the load, and what it could not answer is sent again: each of these commands may be
carried out twice. Last, the server is stopped, started again on the same directory, and asked everything
once more.

    pip install wordfreq        # it comes with imds[test]
    python examples/words.py --kill
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from wordfreq import top_n_list, word_frequency

import imds

T = TypeVar("T")
BATCH = 1000  # commands in one pipeline
PATIENCE = 60.0  # seconds that a killed shard has to come back

# Sent again, these commands do no harm, so an unknown outcome is as good as a refusal.
AGAIN = (imds.TryAgainError, imds.OutcomeUnknownError)


class Server:
    """An ``imds-router`` of our own, on a free port."""

    def __init__(self, directory: Path, shards: int) -> None:
        command = [
            sys.executable,
            "-m",
            "imds",
            "--shards",
            str(shards),
            "--port",
            "0",
            "--dir",
            str(directory),
        ]
        self.log = directory.with_name("log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log)
        self.port = self._wait_until_ready()

    def _wait_until_ready(self) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            if ready := re.search(r"ready on (\S+):(\d+)", self.log.read_text()):
                return int(ready[2])
            time.sleep(0.05)
        self.stop()
        sys.exit(f"the server did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        """Ask the server to end, and return its exit code."""
        self._process.terminate()
        return self._process.wait(60)


class Expected:
    """What the server must answer, computed by Python alone."""

    def __init__(self, count: int) -> None:
        words = top_n_list("en", count)
        self.frequency = {word: word_frequency(word, "en") for word in words}
        by_letter: dict[str, list[tuple[float, bytes]]] = defaultdict(list)
        for word, frequency in self.frequency.items():
            by_letter[word[0]].append((frequency, word.encode()))
        # The server orders by score, then by the member's bytes; so do tuples.
        self.letters = {letter: sorted(pairs) for letter, pairs in by_letter.items()}

    def ranges(self, letter: str) -> Iterator[tuple[float, float]]:
        """Yield score ranges of one letter: all, none, the ends, and three between random members."""
        scores = [score for score, _ in self.letters[letter]]
        yield float("-inf"), float("inf")
        yield 2.0, 3.0
        yield scores[0], scores[0]
        yield scores[-1], scores[-1]
        dice = random.Random(letter)
        for _ in range(3):
            low, high = sorted(dice.choices(scores, k=2))
            yield low, high

    def range_reply(self, letter: str, low: float, high: float) -> bytes:
        pairs = [b"%r:" % score + member for score, member in self.letters[letter] if low <= score <= high]
        return b",".join(pairs)


class Account:
    """Counts what was asked and what was wrong, and says so."""

    def __init__(self) -> None:
        self.wrong = 0
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:7.2f} s  {text}", flush=True)

    def compare(self, what: str, got: object, expected: object) -> None:
        if got != expected:
            self.wrong += 1
            if self.wrong <= 10:
                print(f"           WRONG: {what}: {got!r}, expected {expected!r}", file=sys.stderr)


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch


def run_all(client: imds.Client[bytes], commands: list[tuple[Any, ...]]) -> tuple[list[Any], int]:
    """Run pipeline calls (method name, arguments ...); return their results, and how many were sent again.

    What answers that it may be tried again, is; any other error is raised.
    """
    results: list[Any] = [None] * len(commands)
    left, again = list(range(len(commands))), 0
    deadline = time.monotonic() + PATIENCE
    while left:
        pipe = client.pipeline()
        for n in left:
            name, *arguments = commands[n]
            getattr(pipe, name)(*arguments)
        refused = []
        for n, result in zip(left, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(result, AGAIN):
                refused.append(n)
            elif isinstance(result, Exception):
                raise result
            results[n] = result
        left = refused
        if left:
            again += len(left)
            if time.monotonic() > deadline:
                raise results[left[0]]
            time.sleep(0.1)
    return results, again


def load(
    client: imds.Client[bytes], expected: Expected, account: Account, at_half: Callable[[], None]
) -> None:
    """Write every word as a string and as a member, and call ``at_half`` on the way."""
    commands: list[tuple[Any, ...]] = []
    for word, frequency in expected.frequency.items():
        commands.append(("set", f"word:{word}", frequency))
        commands.append(("zadd", f"letter:{word[0]}", frequency, word))
    sent = sent_again = 0
    for batch in batches(commands):
        if sent <= len(commands) // 2 < sent + len(batch):
            at_half()
        results, again = run_all(client, batch)
        account.compare("replies to writes", results, [True] * len(batch))
        sent += len(batch)
        sent_again += again
    note = f", {sent_again:,} of them more than once" if sent_again else ""
    account.say(f"loaded {len(expected.frequency):,} words by {sent:,} writes{note}")


def check(client: imds.Client[bytes], expected: Expected, account: Account) -> None:
    """Ask for every word, every rank, and ranges of every letter."""
    for batch in batches(expected.frequency.items()):
        results, _ = run_all(client, [("get", f"word:{word}") for word, _ in batch])
        for (word, frequency), got in zip(batch, results, strict=True):
            account.compare(f"get word:{word}", got, repr(frequency).encode())
    account.say(f"{len(expected.frequency):,} gets checked")

    ranks = [
        (letter, n, word) for letter, pairs in expected.letters.items() for n, (_, word) in enumerate(pairs)
    ]
    for some in batches(ranks):
        results, _ = run_all(client, [("zrank", f"letter:{letter}", word) for letter, _, word in some])
        for (letter, rank, member), got in zip(some, results, strict=True):
            account.compare(f"zrank letter:{letter} {member!r}", got, rank)
    account.say(f"{len(ranks):,} ranks checked")

    ranges = [(letter, *ends) for letter in expected.letters for ends in expected.ranges(letter)]
    members = 0
    for letter, low, high in ranges:
        # As it came: some words hold colons, and a word with a comma could make pairs ambiguous.
        (got,), _ = run_all(client, [("zrange_raw", f"letter:{letter}", low, high)])
        account.compare(f"zrange letter:{letter} {low} {high}", got, expected.range_reply(letter, low, high))
        members += len(imds.client.parse_pairs(got)) if got else 0
    account.say(
        f"{len(ranges):,} ranges of {len(expected.letters)} letters checked, {members:,} members in them"
    )


def kill_a_shard(client: imds.Client[bytes], account: Account) -> int:
    """End one shard the hard way, which its supervisor has to notice; return its process id."""
    victim = client.stats()[0]
    os.kill(victim["pid"], signal.SIGKILL)
    account.say(f"killed shard {victim['shard']}, process {victim['pid']}, with {victim['keys']:,} keys")
    pid: int = victim["pid"]
    return pid


def wait_until_up(client: imds.Client[bytes], account: Account, killed: Sequence[int] = ()) -> None:
    """Wait until every shard is up, none of them a process that was killed."""
    deadline = time.monotonic() + PATIENCE
    shards = client.stats()
    while any(shard["state"] != "up" for shard in shards):
        if time.monotonic() > deadline:
            sys.exit(f"shards did not come back: {shards}")
        time.sleep(0.1)
        shards = client.stats()
    keys = ", ".join(f"{shard['keys']:,}" for shard in shards)
    account.say(f"all {len(shards)} shards up, with {keys} keys")
    account.compare("killed processes still there", [s["pid"] for s in shards if s["pid"] in killed], [])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--words", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--shards", type=int, default=4, help="of the server that is started (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="use the server that runs there, and do not restart it")
    parser.add_argument("--kill", action="store_true", help="kill a shard in the middle of the load")
    options = parser.parse_args()

    account = Account()
    expected = Expected(options.words)
    account.say(f"{len(expected.frequency):,} words, {len(expected.letters)} first letters, sorted by Python")
    with tempfile.TemporaryDirectory(prefix="imds-words-") as scratch:
        server = None if options.port else Server(Path(scratch, "data"), options.shards)
        try:
            with imds.Client(port=server.port if server else options.port, timeout=30) as client:
                account.say(f"connected to {client.address}")
                killed: list[int] = []

                def at_half() -> None:
                    if options.kill:
                        killed.append(kill_a_shard(client, account))

                load(client, expected, account, at_half)
                wait_until_up(client, account, killed)
                check(client, expected, account)
            if server is not None:
                code = server.stop()
                account.compare("exit code of the server", code, 0)
                server = Server(Path(scratch, "data"), options.shards)
                account.say("stopped the server and started it again on its directory")
                with imds.Client(port=server.port, timeout=30) as client:
                    wait_until_up(client, account)
                    check(client, expected, account)
        finally:
            if server is not None:
                server.stop()
    account.say("every answer was right" if not account.wrong else f"{account.wrong:,} answers were WRONG")
    return 1 if account.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
