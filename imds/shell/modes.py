"""What imds-cli does instead of running commands: its modes, the options of each, and who carries it out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imds.client import Client
from imds.shell import bulk, hot, keys, latency, watch
from imds.shell.options import EX_OK, Parser, seconds
from imds.shell.output import Form


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "number"


def _scan(client: Client[bytes], args: argparse.Namespace) -> int:
    keys.print_keys(client, _selection(args), args.form)
    return EX_OK


def _bigkeys(client: Client[bytes], args: argparse.Namespace) -> int:
    found = keys.largest_keys(client, _selection(args), args.top or 5)
    keys.print_largest(found, args.form or Form.TEXT)
    return EX_OK


def _hotkeys(client: Client[bytes], args: argparse.Namespace) -> int:
    interval = hot.INTERVAL if args.interval is None else args.interval
    looks = hot.look(client, interval, hot.DURATION if args.duration is None else args.duration)
    hot.print_hottest(looks, args.top or 10, args.form or Form.TEXT)
    return EX_OK


def _stat(client: Client[bytes], args: argparse.Namespace) -> int:
    return watch.watch(client, args.interval or watch.INTERVAL, args.duration, args.form or Form.TEXT)


def _latency(client: Client[bytes], args: argparse.Namespace) -> int:
    tokens = [os.fsencode(word) for word in args.command] or [b"ping"]
    interval = latency.INTERVAL if args.interval is None else args.interval
    latency.measure_latency(client, tokens, interval, args.duration, args.form or Form.TEXT)
    return EX_OK


def _pipe(client: Client[bytes], args: argparse.Namespace) -> int:
    load = bulk.Load(
        client,
        window=args.window or bulk.WINDOW,
        stop=args.on_error != "continue",
        resume_from=args.resume_from or 1,
        state=args.state,
    )
    return load.run(sys.stdin.buffer, args.form or Form.TEXT)


def _selection(args: argparse.Namespace) -> keys.Selection:
    pattern = None if args.pattern is None else os.fsencode(args.pattern)
    return keys.Selection(pattern, args.type, args.count)


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode: ``run`` returns the exit code; ``options`` are those that it alone, or with others, has."""

    name: str
    help: str
    run: Callable[[Client[bytes], argparse.Namespace], int]
    options: frozenset[str]
    command: bool = False  # takes one


_SELECT = frozenset({"pattern", "count", "type"})
_TIMES = frozenset({"interval", "duration"})

MODES = (
    Mode("scan", "print every key on a line", _scan, _SELECT),
    Mode("bigkeys", "find the largest keys; looking at a key counts as use", _bigkeys, _SELECT | {"top"}),
    Mode(
        "hotkeys",
        "find the keys that are used most: for 10 s, look again and again at those used last",
        _hotkeys,
        _TIMES | {"top"},
    ),
    Mode("stat", "print a row every second: keys, memory, requests ...", _stat, _TIMES),
    Mode(
        "latency",
        "time one request after another: ping, which the router answers, or the command that follows",
        _latency,
        _TIMES,
        command=True,
    ),
    Mode(
        "pipe",
        "mass insertion: carry out the lines of the standard input, many at a time, and count the replies",
        _pipe,
        frozenset({"window", "on_error", "resume_from", "state"}),
    ),
)


def add_modes(parser: Parser) -> None:
    """Add the modes and their options to a parser."""
    modes = parser.add_argument_group("instead of a command").add_mutually_exclusive_group()
    for mode in MODES:
        modes.add_argument(f"--{mode.name}", dest="mode", action="store_const", const=mode, help=mode.help)
    some = parser.add_argument_group("options of these")
    some.add_argument("--pattern", metavar="GLOB", help="of --scan, --bigkeys: keys that match alone")
    some.add_argument("--type", choices=("string", "zset"), help="of these: keys that hold this alone")
    some.add_argument(
        "--count", metavar="N", type=_positive, help=f"keys to look at in a step (default {keys.SCAN_COUNT})"
    )
    some.add_argument(
        "--top", metavar="N", type=_positive, help="how many keys: --bigkeys (default 5), --hotkeys (10)"
    )
    some.add_argument(
        "--interval",
        metavar="SECONDS",
        type=seconds,
        help=f"of --stat (default {watch.INTERVAL:g}), --latency ({latency.INTERVAL:g}), "
        f"--hotkeys ({hot.INTERVAL:g})",
    )
    some.add_argument(
        "--duration", metavar="SECONDS", type=seconds, help="of these: end then (default: Ctrl-C)"
    )
    some.add_argument(
        "--window",
        metavar="N",
        type=_positive,
        help=f"of --pipe: lines under way at a time (default {bulk.WINDOW})",
    )
    some.add_argument(
        "--on-error",
        choices=("stop", "continue"),
        help="of --pipe: after a line that fails (default stop, when the window that it is in is answered)",
    )
    some.add_argument(
        "--resume-from", metavar="LINE", type=_positive, help="of --pipe: skip the lines before"
    )
    some.add_argument(
        "--state",
        metavar="FILE",
        type=Path,
        help="of --pipe: note there how far it is, go on there if the file exists, remove it at the end",
    )


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Leave with a usage error where an option or a command does not go with the mode."""
    for name in sorted({name for mode in MODES for name in mode.options}):
        if getattr(args, name) is not None and (args.mode is None or name not in args.mode.options):
            takers = ", ".join(f"--{mode.name}" for mode in MODES if name in mode.options)
            parser.error(f"--{name.replace('_', '-')} is an option of {takers}")
    if args.mode is not None and args.command and not args.mode.command:
        parser.error(f"--{args.mode.name} takes no command")
