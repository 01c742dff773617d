"""Keys that expire, against a plain dict of deadlines; and scans of keys that come and go."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_store import SEED, Shard

from imds.protocol import decode_list, encode_error
from imds.shard import record

keys = st.sampled_from([b"a", b"b", b"c"])
times = st.integers(1, 60)
READONLY = (2, b"READONLY disk full")


class Machine(RuleBasedStateMachine):
    """A store beside ``table`` (key: its string, or None for a sorted set) and ``due`` (key: its deadline).

    Time goes in milliseconds and starts at 1000. What is over is dropped from the model when time moves; the
    store does so when somebody looks, or when it is told to, and logs it then.
    """

    variant = None

    def __init__(self):
        super().__init__()
        self.shard = Shard(self.variant)
        self.store.now = 1000
        self.table: dict[bytes, bytes | None] = {}
        self.due: dict[bytes, int] = {}
        self.records = b""
        self.saved = self.snapshot()

    @property
    def store(self):
        return self.shard.store

    def snapshot(self):
        return self.table.copy(), self.due.copy()

    def drop(self, key):
        self.table.pop(key, None)
        self.due.pop(key, None)

    def put(self, key, value, when=0):
        self.drop(key)
        self.table[key] = value
        if when:
            self.due[key] = when

    def ask(self, *tokens, expected):
        """Ask for a write; one that was refused has no effect."""
        expected = READONLY if self.store.readonly else expected()
        assert self.shard(*tokens) == expected, tokens

    def answer(self, number):
        return (0, b"%d" % number)

    # -- writes -----------------------------------------------------------------------------------

    @rule(key=keys, value=st.sampled_from([b"", b"v", b"1"]), after=st.none() | times)
    def set(self, key, value, after):
        def done():
            self.put(key, value, after and self.store.now + after)
            return (0, b"OK")

        self.ask(b"set", key, value, *([b"px", b"%d" % after] if after else []), expected=done)

    @rule(key=keys, value=st.sampled_from([b"k", b"l"]))
    def set_keepttl(self, key, value):
        def done():
            self.put(key, value, self.due.get(key, 0))
            return (0, b"OK")

        self.ask(b"set", key, value, b"keepttl", expected=done)

    @rule(key=keys)
    def zadd(self, key):
        def done():
            if self.table.get(key, None) is not None:
                return (2, b"WRONGTYPE Operation against a key holding the wrong kind of value")
            self.table[key] = None
            return (0, b"OK")

        self.ask(b"zadd", key, b"1", b"m", expected=done)

    @rule(key=keys, after=st.integers(-5, 60))
    def pexpire(self, key, after):
        def done():
            if key not in self.table:
                return self.answer(0)
            self.put(key, self.table[key], self.store.now + after)
            if after <= 0:
                self.drop(key)
            return self.answer(1)

        self.ask(b"pexpire", key, b"%d" % after, expected=done)

    @rule(key=keys)
    def persist(self, key):
        self.ask(b"persist", key, expected=lambda: self.answer(self.due.pop(key, 0) > 0))

    @rule(key=keys)
    def delete(self, key):
        def done():
            there = key in self.table
            self.drop(key)
            return (0, b"OK") if there else (1, b"")

        self.ask(b"del", key, expected=done)

    @rule(key=keys, to=keys)
    def rename(self, key, to):
        def done():
            if key not in self.table:
                return (2, b"ERR no such key")
            if key != to:
                value, when = self.table[key], self.due.get(key, 0)
                self.drop(key)
                self.put(to, value, when)
            return (0, b"OK")

        self.ask(b"rename", key, to, expected=done)

    # -- time, and what is behind it ------------------------------------------------------------------

    @rule(by=times)
    def time_goes_on(self, by):
        self.store.now += by
        for key in [key for key, when in self.due.items() if when <= self.store.now]:
            self.drop(key)

    @rule(most=st.integers(1, 3))
    @precondition(lambda self: not self.store.readonly)
    def expire(self, most):
        """The earliest go first, as many as are asked for."""
        left = self.store.keys - len(self.table)
        assert self.store.expire(most) == min(left, most)

    @rule(refused=st.sampled_from([False, False, False, True]))
    def refuse_writes(self, refused):
        self.store.readonly = encode_error("READONLY disk full") if refused else None

    @rule()
    def commit(self):
        self.records += self.store.log.pending()
        self.store.commit()
        self.saved = self.snapshot()

    @rule()
    def rollback(self):
        """All is as it was; what is over by now goes once more."""
        self.store.rollback()
        self.table, self.due = self.saved
        self.saved = self.snapshot()
        self.time_goes_on(0)

    @precondition(lambda self: not self.store.log.pending())
    @rule()
    def replay(self):
        """After a restart: the same deadlines; a log that is read meets none of them."""
        again = Shard(self.variant).store
        again.now = self.store.now
        assert record.verify_records(self.records, SEED, 1)[1:] == (len(self.records), None)
        again.replay(self.records)
        again.check()
        assert again.digest() == self.store.digest()
        assert again.next_deadline == self.store.next_deadline

    # -- what anybody sees ------------------------------------------------------------------------

    @rule(key=keys)
    def look(self, key):
        value = self.table.get(key, b"none")
        assert self.shard(b"exists", key) == self.answer(key in self.table)
        if value is None:
            assert self.shard(b"zscore", key, b"m") == (0, b"1.0")
        else:
            assert self.shard(b"get", key) == ((0, value) if key in self.table else (1, b""))
        expected = self.due.get(key, -1) if key in self.table else -2
        assert self.shard(b"pexpiretime", key) == self.answer(expected)
        assert self.shard(b"pttl", key) == self.answer(
            expected - self.store.now if expected > 0 else expected
        )

    @invariant()
    def right(self):
        self.store.check()
        found = {
            key: when for key, _value, when in self.store.entries() if when == 0 or when > self.store.now
        }
        assert found == {key: self.due.get(key, 0) for key in self.table}
        assert self.store.timed >= len(self.due)


def test_random_operations_match_a_dict_of_deadlines(variant):
    machine = type("Deadlines", (Machine,), {"variant": variant})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# -- scans ------------------------------------------------------------------------------------------


class Scan:
    """One walk over all keys."""

    def __init__(self, shard):
        self.shard = shard
        self.cursor = b"0"
        self.found: set[bytes | None] = set()
        self.over = False

    def step(self):
        if not self.over:
            _status, payload = self.shard(b"scan", self.cursor, b"count", b"7")
            self.cursor, *keys = decode_list(payload)
            self.found.update(keys)
            self.over = self.cursor == b"0"


@pytest.mark.parametrize(("going", "coming"), [(100, 5000), (5000, 50), (1500, 1500), (0, 300)])
def test_a_scan_finds_whatever_stays_while_the_table_grows_and_shrinks(variant, going, coming):
    """Between any two steps keys come and go, and the table is resized; a second scan begins in the midst."""
    shard = Shard(variant)
    staying = {b"stays %d" % number for number in range(60)}
    changes = [(b"del", b"goes %d" % number) for number in range(going)]
    shard.batch(*[(b"set", key, b"") for key in staying], *[(b"set", key, b"") for _del, key in changes])
    shard.store.commit()
    changes += [(b"set", b"comes %d" % number, b"") for number in range(coming)]
    random.Random(going).shuffle(changes)
    scans = [Scan(shard)]
    while not all(scan.over for scan in scans):
        for scan in scans:
            scan.step()
        if len(scans) == 1:
            scans.append(Scan(shard))
        now, changes = changes[:150], changes[150:]
        if now:
            shard.batch(*now)
            shard.store.commit()
    for scan in scans:
        assert staying <= scan.found
        assert all(key.split()[0] in (b"stays", b"goes", b"comes") for key in scan.found)
