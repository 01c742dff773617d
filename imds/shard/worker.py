"""The shard process: one event loop around one UnifiedStore and its log.

One turn of the loop, for all routers together::

    links.turn:  select -> read every link -> execute (in memory, each effect noted with how to undo it)
                        -> no effects: send the replies
    settle:      append the effects to the log, one write
                     failed: undo the whole turn, turn read-only, execute it again
                 -> policy ``always``: fdatasync -> send the replies

What stays true:

* No reply leaves before the effects that it rests on are in the log (in the system's page cache, which
  survives the death of any process; under ``always`` on the disk, which survives a power cut).
* Memory never holds what the log does not, once a turn has ended.
* When the disk refuses a write, writes answer READONLY until a probe finds that it takes them again;
  reads go on.
* After a failed fdatasync nobody knows what is on the disk: the process ends without a further reply,
  and the supervisor starts it anew; what the log holds is then written to new files before it is served.
* ``sync`` has the whole turn synced before its replies go, as ``always`` does for each: who asks for it
  waits for the disk, and so does everybody else of that turn, but once for all.
* Another policy is in force from the end of the turn in which it was asked for; all that was written before
  is on the disk by then, so what any policy has promised by now is kept.
* Under ``everysec`` a turn that writes waits while the oldest unsynced write is more than 2 s old, and the
  process ends when it is 10 s old: a shard whose disk does not answer is better seen to be down.
* The store's clock stands still during a round of a turn. Keys whose deadline has come are gone for every
  request; those that nobody asks for are removed a few at a time, EXPIRE_MOST in a turn.
* Nothing in the loop is O(data), except what ``digest`` asks for, nor waits for a file but in the ways
  above. A rewrite of the log (imds/shard/rewrite.py) has a piece of the data saved after a turn, and the next
  one when the disk has taken that; a thread beside the loop has the files.
* While the log is loaded every request is answered LOADING, by the same loop.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from imds.commands import LOADING
from imds.config import Config
from imds.control import Channel
from imds.envelope import notice, refuse
from imds.process import EXIT_DISK, EXIT_REFUSED, ignore, resident_bytes, set_schedule, start_logging
from imds.protocol import OK, Buffer, encode_error, encode_response
from imds.shard.aof import (
    Aof,
    AofBroken,
    AofDamaged,
    AofStalled,
    AofSyncFailed,
    AofWriteError,
)
from imds.shard.background import Background
from imds.shard.kernel import Link, Links, RecordEncoder, UnifiedStore
from imds.shard.rewrite import PIECE, BaseFile
from imds.shard.transactions import Transactions
from imds.shard.waiting import Waiting
from imds.shard.watches import Watches

OUT_LIMIT = 4 << 20  # bytes of replies that a router has not taken above which its link is not read
PROBE_EVERY = 1.0  # seconds between two tries of a disk that refused a write
PROBE_LEAST = 1 << 16  # bytes that it must take then
CLOCK_EVERY = 60.0  # seconds after which a deadline is compared with a clock that may have been set
LOOK_EVERY = 1.0  # seconds between two looks at a sync that is under way
EXPIRE_EVERY = 0.1  # seconds between two looks for keys whose deadline has come
# Keys that are removed at a look: about a millisecond. If there are more, the next comes at once.
EXPIRE_MOST = 500
LOADED_MOST = 20_000  # keys that are removed at a time at the end of loading
REPORT_EVERY = 1.0  # seconds between two reports of loading
# How many times as long as a piece took to be saved nothing more is saved: requests come first, and so do the
# router and the other shards on the same processors.
SAVE_REST = 9

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

log = logging.getLogger("imds.shard")


class Loading:
    """What answers while the store is not ready."""

    log = RecordEncoder(0)  # stays empty
    now = 0

    def execute(self, data: Buffer) -> tuple[int, bytes]:
        """Refuse every request in the whole envelopes of ``data``."""
        return refuse(data, _LOADING)

    def commit(self) -> None:
        """There is nothing to commit."""


class Worker:
    """One shard process. :meth:`run` returns its exit code."""

    def __init__(self, config: Config, shard: int, aof: Aof, channel: Channel) -> None:
        self._config = config
        self._shard = shard
        self._aof = aof
        self._channel = channel
        self._log = RecordEncoder(0)
        self._watches = Watches(lambda: self._log.pending())
        self._transactions = Transactions(lambda: self._store, self._watches)
        self._waiting = Waiting(lambda frame: self._store.run(frame))
        self._store = self._new_store()
        self._selector = selectors.DefaultSelector()
        self._background = Background()
        self._links = Links()
        self._loading: Loading | None = Loading()
        self._stopping = False
        self._rewrite_asked = False  # of the supervisor, who says when
        self._rewriting = False
        self._base: BaseFile | None = None  # what is being saved to
        self._save: Generator[None, None, None] | None = None
        self._save_at = math.inf  # not before
        self._rewrites = 0
        self._rewrite_error = ""
        self._probe_at = 0.0
        self._expire_at = 0.0  # not before
        self._probe_size = PROBE_LEAST
        self._started = time.monotonic()
        self._measured = self._started, time.process_time()  # at the last ``stats``

    def _new_store(self) -> UnifiedStore:
        config, shard = self._config, self._shard
        hooks: dict[str, Callable[[list[bytes]], bytes]] = {
            "stats": self._stats,
            "sync": self._on_sync,
            "rewrite": self._on_rewrite,
            "digest": self._on_digest,
            "_configure": self._on_configure,
            "_watch": self._transactions.on_watch,
            "_unwatch": self._transactions.on_unwatch,
            "_exec": self._transactions.on_exec,
            "_block": self._waiting.on_block,
            "_cancel": self._waiting.on_cancel,
        }
        return UnifiedStore(
            self._log,
            capacity=config.share(config.capacity, shard),
            maxmemory=config.share(config.maxmemory, shard),
            evict=config.maxmemory_policy == "allkeys-lru",
            hooks={name: self._hook(hook) for name, hook in hooks.items()},
        )

    def _hook(self, answer: Callable[[list[bytes]], bytes]) -> Callable[[list[bytes]], bytes]:
        """Have a hook find the log's books in order, and the turn end: what it rests on may have changed."""

        def call(tokens: list[bytes]) -> bytes:
            self._count()
            self._links.end()
            return answer(tokens)

        return call

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Load the log, serve until told to stop, return the exit code."""
        self._selector.register(self._channel, READ)
        self._selector.register(self._background, READ)
        try:
            try:
                self._load()
            except OSError as error:
                log.critical("cannot load the log: %s", error)
                return EXIT_DISK
            while not self._stopping:
                self._turn(self._timeout())
                if self._store.readonly and time.monotonic() >= self._probe_at:
                    self._probe()
                self._aof.check()
            while self._turn(0):  # what the routers had sent before they went
                pass
            self._aof.close()
        except AofDamaged as error:
            log.critical("refusing to start: %s", error)
            self._channel.send("refused", reason=str(error))
            return EXIT_REFUSED
        except (AofBroken, AofStalled, AofSyncFailed) as error:
            log.critical("%s; ending without a reply to what is under way", error)
            return EXIT_DISK
        finally:
            self._close()
        return 0

    def _timeout(self) -> float | None:
        waits = [LOOK_EVERY] if self._aof.watched else []
        now = time.monotonic()
        if self._store.readonly:
            waits.append(PROBE_EVERY)
        elif when := self._store.next_deadline:
            waits += [CLOCK_EVERY, max(when / 1000 - time.time(), self._expire_at - now, 0.0)]
        if self._save_at < math.inf:
            waits.append(max(self._save_at - now, 0.0))
        return min(waits, default=None)

    def _expiry_due(self) -> bool:
        """Whether keys are to be removed whose deadline has come."""
        return (
            0 < self._store.next_deadline <= _now()
            and time.monotonic() >= self._expire_at
            and not self._store.readonly
            and not self._loading
        )

    def _turn(self, timeout: float | None) -> bool:
        """Wait for events and act on them; return whether any request arrived."""
        links = self._links
        # Who watches keys, or waits for one, has to be told what is logged, and so has a base.
        heard = self._watches or self._waiting or self._base
        quiet = not (self._loading or self._store.readonly or heard)
        links.grant = self._aof.grant() if quiet else None
        events = links.turn(self._selector, timeout, self._loading or self._store)
        if links.appended or links.torn:
            self._count()
        if self._expiry_due():
            self._store.now = _now()
            if self._store.expire(EXPIRE_MOST) < EXPIRE_MOST:
                self._expire_at = time.monotonic() + EXPIRE_EVERY
            self._settle()
        elif links.waiting:
            self._settle()
        if self._waiting and links.executed:
            self._notify()
        if links.changed:
            self._watch_links()
        for fd, _ in events or ():
            if fd == self._background.fileno():
                self._background.finish()
            else:
                self._on_control()
        if time.monotonic() >= self._save_at:
            self._save_piece(None)
        return links.executed > 0

    def _count(self) -> None:
        """Take note of what the turn has appended until now."""
        links = self._links
        if links.unsynced is not None:
            self._aof.fail_sync(links.unsynced)
        if links.appended:
            synced = links.grant is not None and links.grant.sync is not None
            self._aof.count(links.appended, links.length, synced=synced)
            links.appended = 0
            if not self._rewrite_asked:
                self._ask_if_grown()
        if links.torn:
            links.torn = False
            self._aof.take_back()

    def _settle(self) -> None:
        """Log, sync, reply: in this order, for all that was executed in this turn."""
        records = self._log.pending()
        if records:
            if self._waiting:
                self._waiting.serve(records)
                records = self._log.pending()
            try:
                self._aof.append(records)
            except AofWriteError as error:
                self._store.rollback()
                self._waiting.undo_batch()
                self._watches.undo_batch()
                self._refuse_writes(error, len(records))
                self._links.again(self._store)
            else:
                if self._base is not None:
                    self._base.copy(records)
            self._watches.end_batch(records)
        self._store.commit()
        self._follow_policy()
        if self._links.hold:
            self._aof.flush()
        elif records:
            self._aof.sync()
        if records and not self._rewrite_asked:
            self._ask_if_grown()
        self._links.reply()

    def _notify(self) -> None:
        """Tell the routers what their waiting clients have got in this turn."""
        links = {link.router: link for link in self._links.by_fd.values()}
        for router, frame in self._waiting.end_batch():
            link = links[router]
            self._links.push(link, notice(link.notices, frame))
            link.notices += 1

    # -- links ------------------------------------------------------------------------------------

    def _watch_links(self) -> None:
        """Drop the links that have ended; have the selector watch the others for what they wait for."""
        changed = set(self._links.changed)
        self._links.changed.clear()
        for link in changed:
            if link.ended:
                self._drop(link)
                continue
            mask = (WRITE if link.out else 0) | (READ if link.unsent < OUT_LIMIT else 0)
            if mask != link.mask:
                self._selector.modify(link.sock, mask)
                link.mask = mask

    def _drop(self, link: Link) -> None:
        self._selector.unregister(link.sock)
        self._links.drop(link)
        link.sock.close()
        self._watches.leave(link.router)
        self._waiting.leave(link.router)

    def _on_control(self) -> None:
        for message, fds in self._channel.receive():
            if message["kind"] == "link":
                self._add_link(fds[0], message["router"])
            elif message["kind"] == "configure":
                self._configure(message["changes"])
                if not self._loading:
                    self._follow_policy()
            elif message["kind"] == "stop":
                self._stopping = True
            elif message["kind"] == "rewrite":
                self._rewrite()
        if self._channel.closed:
            self._selector.unregister(self._channel)
            self._stopping = True

    def _add_link(self, fd: int, router: int) -> None:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        for old in [one for one in self._links.by_fd.values() if one.router == b"%d" % router]:
            self._drop(old)
        self._links.add(sock, b"%d" % router)
        self._selector.register(sock, READ)

    # -- the log ----------------------------------------------------------------------------------

    def _load(self) -> None:
        """Replay the log, answering LOADING meanwhile; evict down to the limits at its end."""
        started = reported = time.monotonic()
        for done, total, records in self._aof.load(self._store.replay):
            now = time.monotonic()
            if now - reported >= REPORT_EVERY:
                reported = now
                left = (now - started) * (total - done) / max(done, 1)
                self._channel.send("loading", done=done, total=total, records=records, left=left)
            self._turn(0)
            if self._stopping:
                return
        if self._aof.suspect:
            for _ in self._aof.renew(self._store):
                self._turn(0)
                if self._stopping:
                    return
        self._number_records(self._aof.sequence)
        self._store.now = _now()
        while self._store.expire(LOADED_MOST) and self._keep():
            self._turn(0)
            if self._stopping:
                return
        self._store.enforce_limits()
        self._keep()
        self._loading = None
        self._follow_policy()
        seconds = time.monotonic() - started
        log.debug("%d keys loaded in %.2f s", self._store.keys, seconds)
        self._channel.send("ready", keys=self._store.keys, seconds=seconds)
        self._ask_if_grown()

    def _keep(self) -> bool:
        """Log what was done while loading; return whether the disk took it."""
        records = self._log.pending()
        if records:
            try:
                self._aof.append(records)
            except AofWriteError as error:
                self._store.rollback()
                self._refuse_writes(error, len(records))
        self._store.commit()
        return not self._store.readonly

    def _number_records(self, sequence: int) -> None:
        """Log to the log's last segment from now on. Nothing may be pending."""
        self._log = RecordEncoder(self._aof.seed, sequence)
        self._store.log = self._log

    def _refuse_writes(self, error: AofWriteError, size: int) -> None:
        name = errno.errorcode.get(error.errno, str(error.errno))
        reason = f"the log takes no writes: {os.strerror(error.errno)} ({name})"
        if not self._store.readonly:
            log.error("read-only: %s", reason)
        self._store.readonly = encode_error(f"READONLY {reason}")
        self._probe_at = time.monotonic() + PROBE_EVERY
        self._probe_size = max(PROBE_LEAST, size)

    def _probe(self) -> None:
        self._probe_at = time.monotonic() + PROBE_EVERY
        if self._aof.probe(self._probe_size):
            log.warning("the log takes writes again")
            self._store.readonly = None

    def _on_sync(self, _arguments: list[bytes]) -> bytes:
        """The ``sync`` command: this turn is synced before its replies go."""
        self._links.hold = True
        return _DONE

    def _on_digest(self, _tokens: list[bytes]) -> bytes:
        """The ``digest`` command. O(data): nothing else is served meanwhile, so it is of one moment."""
        store = self._store
        values = {
            "state": "up",
            "keys": store.keys,
            "digest": f"{store.digest():016x}",
            "next_number": self._log.sequence,
        }
        return encode_response(OK, json.dumps(values).encode())

    # -- options ----------------------------------------------------------------------------------

    def _on_configure(self, arguments: list[bytes]) -> bytes:
        """``config set``, as a router passes it on. So does the supervisor, for those who start just now."""
        self._configure(json.loads(arguments[0]))
        self._links.hold |= self._aof.policy != self._config.appendfsync  # so that the turn is settled
        return _DONE

    def _configure(self, changes: dict[str, Any]) -> None:
        self._config = config = dataclasses.replace(self._config, **changes)
        store = self._store
        store.capacity = config.share(config.capacity, self._shard)
        store.maxmemory = config.share(config.maxmemory, self._shard)
        store.evict = config.maxmemory_policy == "allkeys-lru"
        logging.getLogger().setLevel(config.log_level.upper())

    def _follow_policy(self) -> None:
        if self._aof.policy != self._config.appendfsync:
            self._aof.set_policy(self._config.appendfsync)

    # -- rewriting it -----------------------------------------------------------------------------

    def _on_rewrite(self, _arguments: list[bytes]) -> bytes:
        """The ``rewrite`` command. The supervisor says when it is this shard's turn."""
        self._ask_rewrite(at_once=True)
        return _DONE

    def _ask_if_grown(self) -> None:
        config = self._config
        if self._aof.is_grown(config.aof_rewrite_percentage, config.aof_rewrite_min_size):
            self._ask_rewrite(at_once=False)

    def _ask_rewrite(self, *, at_once: bool) -> None:
        self._rewrite_asked = self._channel.send("rewrite", at_once=at_once)

    def _rewrite(self) -> None:
        """Begin: make the segment that comes next, beside the loop, then save what the store holds."""
        self._rewriting = True

        def prepared(error: BaseException | None) -> None:
            if error is not None:
                self._end_rewrite(error)
                return
            self._base = self._aof.new_base()
            self._save = self._store.save(self._base.log, PIECE)
            self._save_piece(None)

        self._background.start(self._aof.prepare_switch, prepared)

    def _save_piece(self, error: BaseException | None) -> None:
        """Go on saving, with the file beside the loop; at the end of the data, log to the next segment."""
        base, save = self._base, self._save
        assert base is not None
        assert save is not None
        started, self._save_at = time.monotonic(), math.inf
        error = error or base.failed
        ended = False
        if error is None:
            try:
                ended = next(save, base) is base
            except MemoryError as full:
                error = full
        if error is None and not ended:
            piece = base.take()
            rest = SAVE_REST * (time.monotonic() - started)
            self._background.start(lambda: base.write(piece), lambda error: self._rest(error, rest))
            return
        save.close()
        self._base = self._save = None
        if error is not None:
            self._background.start(base.discard, lambda _: self._end_rewrite(error))
            return
        last, sequence, clock = base.take(), self._log.sequence, self._aof.clock
        self._aof.switch()
        self._number_records(sequence)

        def adopt() -> None:
            self._aof.settle()
            try:
                base.write(last)
                made = base.finish(sequence, clock)
            except OSError:
                base.discard()
                raise
            self._aof.adopt(made)  # if that fails, the manifest may name it all the same

        self._background.start(adopt, self._end_rewrite)

    def _rest(self, error: BaseException | None, seconds: float) -> None:
        """A piece is in the file, or is not; the next one has time."""
        if error is not None:
            self._save_piece(error)
        else:
            self._save_at = time.monotonic() + seconds

    def _end_rewrite(self, error: BaseException | None) -> None:
        if isinstance(error, AofSyncFailed):
            raise error
        self._rewriting = False
        self._rewrite_error = "" if error is None else str(error) or type(error).__name__
        if error is None:
            self._rewrites += 1
            self._rewrite_asked = False
        self._channel.send("rewritten", error=self._rewrite_error)
        if not self._rewrite_asked:
            self._ask_if_grown()  # it may have grown as much again meanwhile

    # -- statistics and the end -------------------------------------------------------------------

    def _stats(self, _arguments: list[bytes]) -> bytes:
        store, aof, (since, before) = self._store, self._aof, self._measured
        self._measured = now, spent = time.monotonic(), time.process_time()
        values = {
            "state": "up",
            "pid": os.getpid(),
            "uptime_seconds": round(now - self._started, 3),
            "keys": store.keys,
            "keys_with_deadline": store.timed,
            "used_bytes": store.used,
            "rss_bytes": resident_bytes(),
            "cpu_seconds": round(spent, 2),
            "cpu_percent": round(100 * (spent - before) / max(now - since, 1e-9), 1),
            "ops": store.ops,
            "hits": store.hits,
            "misses": store.misses,
            "evictions": store.evictions,
            "expirations": store.expirations,
            "links": len(self._links.by_fd),
            "readonly": store.readonly is not None,
            **aof.stats(),
            "rewrites": self._rewrites,
            "rewrite_running": self._rewriting,
            "last_rewrite_error": self._rewrite_error,
        }
        return encode_response(OK, json.dumps(values).encode())

    def _close(self) -> None:
        if self._save is not None:
            self._save.close()
        for link in self._links.by_fd.values():
            link.sock.close()
        self._selector.close()
        self._background.close()
        self._channel.close()


def _now() -> int:
    """Return the time in milliseconds since 1970, by the clock that deadlines are told by."""
    return time.time_ns() // 1_000_000


_LOADING = encode_error(LOADING)
_DONE = encode_response(OK, b"OK")


def main(config: Config, shard: int, directory: Path, generation: int, channel: Channel) -> int:
    """Run a shard process to its end; return its exit code."""
    # A signal to the whole group is for the supervisor, which stops the shards last: what the routers still
    # have under way is carried out.
    ignore([signal.SIGTERM, signal.SIGINT])
    start_logging(f"shard-{shard}", config.log_level)
    set_schedule(config.sched)
    aof = Aof(directory, generation=generation, shard=shard, policy=config.appendfsync)
    return Worker(config, shard, aof, channel).run()
