"""Commands about the server: time, command, where, slots, info, memory, config, randomkey, scan."""

from __future__ import annotations

import fnmatch
import json
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from imds.commands import COMMANDS, Command, lookup
from imds.config import OPTIONS, ConfigError, Option
from imds.protocol import (
    LIST,
    decode_list,
    decode_response,
    encode_error,
    encode_request,
)
from imds.router import info
from imds.router.replies import NONE, WRONG_ARITY, listed, number, text, unknown_subcommand
from imds.router.request import Request

if TYPE_CHECKING:
    from imds.router.requests import Requests

# Options that may change while the server runs.
CHANGEABLE = (
    "capacity",
    "maxmemory",
    "maxmemory_policy",
    "appendfsync",
    "aof_rewrite_percentage",
    "aof_rewrite_min_size",
    "max_clients",
    "log_level",
)

_NO_OPTION = "ERR Unknown option or number of arguments for CONFIG SET"
_INVALID_CURSOR = encode_error("ERR invalid cursor")
_NO_COMMAND = encode_error("ERR Invalid command specified")
_NO_KEYS = encode_error("ERR The command has no key arguments")


class ServerCommands:
    """The handlers."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._started = time.time()
        requests.handlers |= {
            "time": self._time,
            "command": self._command,
            "where": self._where,
            "slots": self._slots,
            "info": self._info,
            "memory": self._memory,
            "config": self._config,
            "randomkey": self._random_key,
            "scan": self._scan,
        }

    def _time(self, _request: Request) -> bytes:
        seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
        return listed([seconds, micros])

    # -- the table --------------------------------------------------------------------------------

    def _command(self, request: Request) -> bytes:
        """``command [list | count | docs | info name ... | getkeys ...]``, from the table."""
        words = request.tokens[1:]
        if not words:
            return listed(_row(command) for command in COMMANDS.values())
        word, names = words[0].lower(), words[1:]
        if word in (b"list", b"count") and names:
            return WRONG_ARITY
        if word == b"list":
            return listed(COMMANDS)
        if word == b"count":
            return number(len(COMMANDS))
        if word == b"info":
            rows = [lookup(name) for name in names] if names else list(COMMANDS.values())
            return listed(_row(row) if row else None for row in rows)
        if word == b"docs":
            rows = [lookup(name) for name in names] if names else list(COMMANDS.values())
            return listed(part for row in rows if row for part in (row.name, _docs(row)))
        if word == b"getkeys" and names:
            command = lookup(names[0])
            if command is None:
                return _NO_COMMAND
            if not command.arity_ok(len(names)):
                return encode_error("ERR Invalid number of arguments specified for command")
            keys = [names[position] for position in command.key_positions(names)]
            return listed(keys) if keys else _NO_KEYS
        return WRONG_ARITY if word == b"getkeys" else unknown_subcommand("command", word)

    # -- slots and shards -------------------------------------------------------------------------

    def _where(self, request: Request) -> bytes:
        """``where key``: its slot, its shard, and whether that is up or why not."""
        slots = self._requests.slots
        slot = slots.slot_of(request.tokens[1])
        shard = slots.owners[slot]
        return listed(["slot", slot, "shard", shard, "state", self._state(shard)])

    def _state(self, shard: int) -> str:
        if self._requests.switch.is_up(shard):
            return "up"
        return f"down: {self._requests.statuses[shard].note}"

    def _slots(self, _request: Request) -> bytes:
        """``slots``: a JSON object for each run of slots that one shard owns."""
        runs = self._requests.slots.ranges()
        return listed(
            json.dumps({"first": first, "last": last, "shard": shard, "state": self._state(shard)})
            for first, last, shard in runs
        )

    # -- statistics -------------------------------------------------------------------------------

    def _rows(self, use: Callable[[list[dict[str, Any]]], bytes], request: Request) -> None:
        """Answer a request by what ``use`` makes of the rows of ``stats``."""

        def done(reply: bytes) -> None:
            decoded = decode_response(reply)
            assert decoded is not None
            rows = [json.loads(row or b"") for row in decode_list(decoded[1])]
            self._requests.answer(request, use(rows))

        self._requests.gather(COMMANDS["stats"], encode_request([b"stats"]), done)

    def _info(self, request: Request) -> None:
        """``info [section ...]``: as Redis shows it."""
        wanted = [word.lower().decode(errors="replace") for word in request.tokens[1:]]
        requests = self._requests

        def counted(parts: list[bytes]) -> None:
            pairs = [part.split() for part in parts]
            clients, blocked = (sum(int(pair[at]) for pair in pairs) for at in (0, 1))
            counts = info.RouterCounts(int(requests.number), self._started, clients, blocked)
            self._rows(lambda rows: text(info.report(rows, requests.host.config, counts, wanted)), request)

        requests.peers.ask([b"count"], counted)

    def _memory(self, request: Request) -> bytes | None:
        """``memory stats``: what data and processes take. ``memory usage key [samples n]``: of one key."""
        word, words = request.tokens[1].lower(), request.tokens[2:]
        if word not in (b"stats", b"usage"):
            return unknown_subcommand("memory", word)
        if (word == b"usage") is not bool(words):
            return WRONG_ARITY
        if words:
            self._requests.forward(request, self._requests.slots.shard_of(words[0]))
            return None
        self._rows(lambda rows: listed(part for pair in info.memory(rows).items() for part in pair), request)
        return None

    # -- options ----------------------------------------------------------------------------------

    def _config(self, request: Request) -> bytes | None:
        """``config get pattern ...`` and ``config set name value [name value ...]``."""
        word, words = request.tokens[1].lower(), request.tokens[2:]
        if word == b"get" and words:
            patterns = [pattern.lower().decode(errors="replace") for pattern in words]
            values = {option.name: option.show(self._requests.host.config) for option in OPTIONS}
            return listed(
                part
                for name, value in values.items()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
                for part in (name, value)
            )
        if word == b"set" and words and len(words) % 2 == 0:
            return self._set_options(request, words)
        return WRONG_ARITY if word in (b"get", b"set") else unknown_subcommand("config", word)

    def _set_options(self, request: Request, words: list[bytes]) -> bytes | None:
        options = {option.name: option for option in OPTIONS}
        changes: dict[str, Any] = {}
        for name, value in zip(words[::2], words[1::2], strict=True):
            shown = name.lower().decode(errors="replace").replace("_", "-")
            option = options.get(shown)
            if option is None:
                return encode_error(f"{_NO_OPTION} - '{shown[:64]}'")
            if option.field not in CHANGEABLE:
                return encode_error(
                    f"ERR CONFIG SET failed (possibly related to argument '{shown}') - "
                    "can't set immutable config"
                )
            try:
                changes[option.field] = option.parse(value.decode(errors="replace"), shown)
                self._check_share(option, changes[option.field])
            except ConfigError as error:
                return encode_error(
                    f"ERR CONFIG SET failed (possibly related to argument '{shown}') - {error}"
                )
        requests = self._requests
        requests.host.channel.send("configure", changes=changes)
        for field, value in changes.items():
            requests.host.configure(field, value)
        frame = encode_request([b"_configure", json.dumps(changes).encode()])
        requests.gather(COMMANDS["sync"], frame, partial(requests.answer, request))
        return None

    def _check_share(self, option: Option, limit: Any) -> None:
        shards = self._requests.slots.shards
        if option.field in ("capacity", "maxmemory") and 0 < limit < shards:
            raise ConfigError(f"{limit} is less than one for each of {shards} shards")

    # -- keys of any shard ------------------------------------------------------------------------

    def _random_key(self, request: Request) -> None:
        """Ask a shard, drawn by the number of its keys; shards that do not say how many have none."""

        def counted(rows: list[dict[str, Any]]) -> None:
            weights = [row.get("keys", 0) for row in rows]
            if not any(weights):
                self._requests.answer(request, NONE)
                return
            shard = random.choices(range(len(weights)), weights)[0]
            self._requests.forward(request, shard)

        def done(reply: bytes) -> None:
            decoded = decode_response(reply)
            assert decoded is not None
            counted([json.loads(row or b"") for row in decode_list(decoded[1])])

        self._requests.gather(COMMANDS["stats"], encode_request([b"stats"]), done)

    def _scan(self, request: Request) -> bytes | None:
        """``scan cursor ...``: one shard after the other.

        A cursor is ``0`` to begin and at the end; between these the shard's number, a colon, and the shard's
        own cursor. It says all there is to know, so it may be used again, and by any router.
        """
        shard, cursor = self._cursor(request.tokens[1])
        if shard < 0:
            return _INVALID_CURSOR
        tokens = [request.tokens[0], cursor, *request.tokens[2:]]
        self._requests.ask(shard, encode_request(tokens), False, partial(self._scanned, request, shard))
        return None

    def _cursor(self, word: bytes) -> tuple[int, bytes]:
        """Return the shard, -1 if there is none, and its cursor."""
        if word == b"0":
            return 0, b"0"
        shard, colon, cursor = word.partition(b":")
        if not colon or not cursor or not shard.isdigit() or len(shard) > 3:
            return -1, b""
        return (int(shard) if int(shard) < self._requests.slots.shards else -1), cursor

    def _scanned(self, request: Request, shard: int, reply: bytes, _lost: bool) -> None:
        decoded = decode_response(reply)
        assert decoded is not None
        if decoded[0] == LIST:
            cursor, *found = decode_list(decoded[1])
            if cursor != b"0":
                following = b"%d:%b" % (shard, cursor or b"")
            else:
                following = b"%d:0" % (shard + 1) if shard + 1 < self._requests.slots.shards else b"0"
            reply = listed([following, *found])
        self._requests.answer(request, reply)


def _row(command: Command) -> str:
    """Return a command as ``command info`` shows it: what Redis has in a nested list, as JSON."""
    arity = command.min_tokens if command.min_tokens == command.max_tokens else -command.min_tokens
    flags = ["write" if command.write else "readonly"] + ["admin"] * command.admin
    return json.dumps(
        {
            "name": command.name,
            "arity": arity,
            "flags": flags,
            "first_key": command.first_key,
            "last_key": command.last_key if command.first_key else 0,
            "step": command.key_step if command.first_key else 0,
            "spread": command.spread.name.lower(),
        }
    )


def _docs(command: Command) -> str:
    return json.dumps({"summary": command.summary, "usage": command.usage, "spread": command.spread.value})
