"""Every option of the server, once: flag, environment variable, default, rule, help.

An option's value comes from its flag, else from its environment variable (``IMDS_`` and the flag's name in
capitals), else from the TOML file named by ``--config``, else from its default. A value that breaks
its rule is reported by option, source, value and rule, and the server does not start.

To add an option, add a field to :class:`Config` and a row to ``OPTIONS``; nothing else parses anything.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imds import __version__
from imds._kernel import VARIANT
from imds.hashslots import MAX_SHARDS
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT

if TYPE_CHECKING:
    import argparse

MAX_ROUTERS = 16


class ConfigError(Exception):
    """An option's value breaks its rule; the text names option, value and rule."""


@dataclass(frozen=True, slots=True)
class Config:
    """The options of one server, checked. Sizes in bytes; 0 is no limit."""

    shards: int = 1
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    unix: str = ""
    dir: str = "imds-data"
    appendfsync: str = "everysec"
    aof_rewrite_percentage: int = 100
    aof_rewrite_min_size: int = 64 << 20
    capacity: int = 0
    maxmemory: int = 0
    maxmemory_policy: str = "noeviction"
    max_clients: int = 10_000
    routers: int = 1
    sched: str = "batch"
    log_level: str = "info"

    def share(self, total: int, shard: int) -> int:
        """Return shard's part of a limit on the whole server: equal within one, in sum exactly ``total``."""
        return total // self.shards + (shard < total % self.shards)


def _integer(low: int, high: int) -> tuple[Callable[[str], int], str]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse, f"a whole number from {low} to {high}"


def _choice(*words: str) -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return parse, f"one of {', '.join(words)}"


def _text(rule: str, *, empty: bool = False) -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        if (not text and not empty) or "\0" in text:
            raise ValueError
        return text

    return parse, rule


_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 10**6, "mb": 1 << 20, "g": 10**9, "gb": 1 << 30}


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` names: ``1048576``, ``512mb`` (2^20), ``2g`` (10^9); as Redis has it."""
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError
    return int(match[1]) * _UNITS[match[2]]


_A_SIZE = "a number of bytes such as 1048576, 512mb or 2gb"


def _unix_path(text: str) -> str:
    if "\0" in text or len(os.fsencode(Path(text).absolute())) > 100:
        raise ValueError
    return text


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table. ``default`` is how help shows it, where that is not the value itself."""

    field: str
    metavar: str
    parser: tuple[Callable[[str], Any], str]
    help: str
    default: str | None = None

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def variable(self) -> str:
        return "IMDS_" + self.field.upper()

    @property
    def name(self) -> str:
        """What ``config get`` and ``config set`` call it."""
        return self.field.replace("_", "-")

    def show(self, config: Config) -> str:
        """Return the value as ``config get`` shows it, which :meth:`parse` takes."""
        return str(getattr(config, self.field))

    def parse(self, value: str, source: str) -> Any:
        """Return the value that ``value`` stands for. Raises ConfigError."""
        parse, rule = self.parser
        try:
            return parse(value)
        except ValueError:
            raise ConfigError(f"{source}: {value!r} is not {rule}") from None


OPTIONS = (
    Option("shards", "N", _integer(1, MAX_SHARDS), "worker processes", "the number of cores"),
    Option("host", "ADDRESS", _text("an address to listen on"), "address to listen on"),
    Option("port", "PORT", _integer(0, 65535), "TCP port; 0 picks a free one, named in the ready line"),
    Option("unix", "PATH", (_unix_path, "a path of at most 100 bytes"), "also listen on this Unix socket"),
    Option("dir", "DIR", _text("a path"), "data directory, made if it does not exist"),
    Option(
        "appendfsync",
        "POLICY",
        _choice("always", "everysec", "no"),
        "when writes reach the disk: always (before each reply), everysec, no (when the system likes)",
    ),
    Option(
        "aof_rewrite_percentage",
        "PERCENT",
        _integer(0, 1_000_000),
        "a shard's log is rewritten when it has grown by that part of its size after the last time; 0: never",
    ),
    Option(
        "aof_rewrite_min_size",
        "BYTES",
        (parse_size, _A_SIZE),
        "and has at least this size",
        "64mb",
    ),
    Option("capacity", "KEYS", _integer(0, 1 << 62), "most keys in the whole server; 0: no limit"),
    Option(
        "maxmemory",
        "BYTES",
        (parse_size, _A_SIZE),
        "most bytes of data in the whole server; 0: no limit",
    ),
    Option(
        "maxmemory_policy",
        "POLICY",
        _choice("noeviction", "allkeys-lru"),
        "at a limit: refuse writes (noeviction), or drop the least recently used keys (allkeys-lru)",
    ),
    Option("max_clients", "N", _integer(1, 1_000_000), "most client connections of one router"),
    Option("routers", "R", _integer(1, MAX_ROUTERS), "router processes that share the port"),
    Option("sched", "POLICY", _choice("batch", "other"), "scheduling policy of routers and shards"),
    Option("log_level", "LEVEL", _choice("debug", "info", "warning", "error"), "least level that is logged"),
)


def _parser() -> argparse.ArgumentParser:
    import argparse  # not at the top: a server's children, which have to start fast, parse nothing

    parser = argparse.ArgumentParser(
        prog="imds-router",
        description="Start an imds server: one router for the clients, N shard workers for the data.",
        epilog="Each option may also be set as an environment variable (IMDS_PORT=7000) or in the TOML "
        "file of --config (port = 7000). A flag wins over the environment, the environment over the file. "
        "Exit codes: 0 stopped as asked, 1 could not start or go on, 2 bad option.",
        allow_abbrev=False,
    )
    defaults = Config()
    for option in OPTIONS:
        default = option.default or getattr(defaults, option.field)
        note = "" if default == "" else f"; default: {default}"
        parser.add_argument(option.flag, metavar=option.metavar, help=option.help + note)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    parser.add_argument("--version", action="version", version=f"imds {__version__} ({VARIANT} kernels)")
    return parser


def _from_file(path: str) -> dict[str, str]:
    import tomllib

    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not TOML: {error}") from None
    values = {}
    known = {option.field for option in OPTIONS}
    for name, value in table.items():
        field = name.replace("-", "_")
        if field not in known:
            raise ConfigError(f"--config: {path} has an unknown option {name!r}")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ConfigError(f"--config: {path}: {name} must be a text or a whole number")
        values[field] = str(value)
    return values


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Return the configuration. Raises ConfigError; argparse exits by itself for --help and unknown flags."""
    flags = vars(_parser().parse_args(arguments))
    path = flags["config"] or environment.get("IMDS_CONFIG")
    file = _from_file(path) if path else {}
    values: dict[str, Any] = {"shards": min(os.cpu_count() or 1, MAX_SHARDS)}
    for option in OPTIONS:
        if flags[option.field] is not None:
            values[option.field] = option.parse(flags[option.field], option.flag)
        elif option.variable in environment:
            values[option.field] = option.parse(environment[option.variable], option.variable)
        elif option.field in file:
            values[option.field] = option.parse(file[option.field], f"{path}: {option.field}")
    config = Config(**values)
    for field in ("capacity", "maxmemory"):
        limit = getattr(config, field)
        if 0 < limit < config.shards:
            raise ConfigError(f"--{field}: {limit} is less than one for each of {config.shards} shards")
    return config


def to_json(config: Config) -> dict[str, Any]:
    """Return the configuration as a child process is given it."""
    return dataclasses.asdict(config)
