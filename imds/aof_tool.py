"""``imds-aof``: work on logs and data directories while no server has them; only ``digest`` can ask one."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imds import __version__, logtools, rebuild
from imds.client import Client, ImdsError
from imds.datadir import DEFAULT_DIR, DataDirError
from imds.hashslots import MAX_SHARDS
from imds.logtools import Digest
from imds.shard.aof import AofError
from imds.textlog import import_text

# Exit codes. 2 is argparse's own.
DONE = 0
FAILED = 1  # could not, or a log is damaged
PARTLY = 3  # lines were skipped, a start has something to mend, or what was compared differs


def _import(args: argparse.Namespace) -> int:
    done, skipped, shards = import_text(args.source, args.dir, args.shards)
    where = f"{args.dir} ({shards} shards)"
    print(f"{done} commands imported from {args.source} to {where}, {skipped} lines skipped")
    return PARTLY if skipped else DONE


def _check(args: argparse.Namespace) -> int:
    verdict = logtools.check(args.dir, args.shard)
    print("\n".join(verdict.lines))
    return FAILED if verdict.damaged else PARTLY if verdict.mended else DONE


def _repair(args: argparse.Namespace) -> int:
    if wrong := rebuild.problem(args.dir):
        print(wrong)
        rebuild.rebuild(
            args.dir, generation=args.generation, prefix=args.prefix, dry_run=args.dry_run, say=print
        )
        if args.dry_run:
            return FAILED
    healthy = logtools.repair(args.dir, args.shard, prefix=args.prefix, dry_run=args.dry_run, say=print)
    return DONE if healthy else FAILED


def _stat(args: argparse.Namespace) -> int:
    rows = logtools.stat(args.dir, args.shard)
    print(json.dumps(rows, indent=2) if args.json else "\n".join(logtools.stat_lines(rows)))
    whole = all(one["whole"] for row in rows for one in row["files"])
    return DONE if whole and not any(row["lost"] or row["problem"] for row in rows) else FAILED


def _dump(args: argparse.Namespace) -> int:
    return DONE if logtools.dump(args.dir, args.shard, args.first, args.last, sys.stdout) else FAILED


def _digest(args: argparse.Namespace) -> int:
    found = logtools.digests(args.directory)
    print("\n".join(_digest_lines(str(args.directory), found)))
    if args.other is None and args.port is None:
        return DONE
    if args.other is not None:
        name, other = str(args.other), logtools.digests(args.other)
    else:
        name, other = f"{args.host}:{args.port}", _ask(args.host, args.port)
    print("\n".join(_digest_lines(name, other)))
    same = logtools.total(found) == logtools.total(other)
    print("the same data" if same else "DIFFERENT data")
    return DONE if same else PARTLY


def _digest_lines(name: str, found: list[Digest]) -> list[str]:
    keys, digest = logtools.total(found)
    rows = [f"  shard {one.shard}: {one.keys} keys, {one.digest:016x}" for one in found]
    return [f"{name}: {keys} keys, {digest:016x}", *rows]


def _ask(host: str, port: int) -> list[Digest]:
    """Return a server's digests. Raises ImdsError; DataDirError where a shard did not say."""
    with Client(host, port) as client:
        rows = client.digest()
    silent = [row["shard"] for row in rows if "digest" not in row]
    if silent:
        raise DataDirError(f"{host}:{port}: no answer from shards {silent}")
    return [Digest(row["shard"], row["keys"], int(row["digest"], 16), row["next_number"]) for row in rows]


def _number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if text.isdecimal() else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return number

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="imds-aof", description=__doc__)
    parser.add_argument("--version", action="version", version=f"imds-aof {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str, exits: str) -> Any:
        one = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}", epilog=f"Exit code: {exits}."
        )
        one.set_defaults(run=run)
        return one

    one = add(
        "import",
        _import,
        "read an older text log into a data directory",
        "One command per line: SET, DEL, ZADD, ZREM. Lines that are no command are named on standard error "
        "and skipped.",
        "0 all imported, 1 could not import, 2 usage, 3 imported, but lines were skipped",
    )
    one.add_argument("source", type=Path, metavar="OLD.aof", help="the text log")
    one.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help="data directory (%(default)s)")
    one.add_argument(
        "--shards",
        type=_number(1, MAX_SHARDS),
        help="shards of a new data directory (default: one for each core)",
    )
    one = add(
        "check",
        _check,
        "say what the next start would find",
        "Reads all of the logs as a start does, and changes nothing. Of a damaged log it says where the "
        "damage is, and what can be read around it.",
        "0 all whole, 1 damaged, 2 usage, 3 a start will mend something: a torn tail, a failed sync",
    )
    _add_dir(one)
    one = add(
        "repair",
        _repair,
        "make damaged logs loadable with what can be read of them",
        "First copies all files of the shard to DIR/repaired. Then it writes what can be read, before and "
        "after the damage, to new files. That may be a state which never was: with --prefix only what is "
        "before the first damage is kept, which was the state at an earlier moment. Whole logs are left "
        "alone. Where the directory's own manifest is missing or wrong, it is made anew of the logs: with "
        "its old seed if that can still be read and proves right, otherwise with a new one, which moves all "
        "keys.",
        "0 nothing is damaged now, 1 something is, 2 usage",
    )
    _add_dir(one)
    one.add_argument("--prefix", action="store_true", help="keep only what is before the first damage")
    one.add_argument("--dry-run", action="store_true", help="say what would be kept, and change nothing")
    one.add_argument(
        "--generation",
        type=_number(1, 999_999_999),
        help="the one that is the data, where the directory's manifest is lost and several are there",
    )
    one = add(
        "stat",
        _stat,
        "count what is in the logs",
        "Files with their bytes, records, numbers and times, and effects by command.",
        "0 all whole, 1 damaged, 2 usage",
    )
    _add_dir(one)
    one.add_argument("--json", action="store_true", help="as JSON")
    one = add(
        "dump",
        _dump,
        "print every record",
        "One line each: shard, file, offset, number, command. Times and damage are lines with a #.",
        "0 all whole, 1 damaged, 2 usage",
    )
    _add_dir(one)
    one.add_argument("--first", type=_number(1, 1 << 63), default=1, help="number of the first record")
    one.add_argument("--last", type=_number(1, 1 << 63), help="of the last; those of a base are shown anyway")
    one = add(
        "digest",
        _digest,
        "print 64 bits that are equal where the data is, and compare",
        "For each shard and for all together, which does not depend on how many shards there are. A server "
        "answers for what it holds in memory; a shard serves nothing meanwhile: about a tenth of a second "
        "for each million of its keys.",
        "0 the same, 1 could not, 2 usage, 3 different",
    )
    one.add_argument("directory", type=Path, metavar="DIR", help="a data directory, or a backup")
    one.add_argument("other", type=Path, metavar="DIR", nargs="?", help="another one, to compare")
    one.add_argument("--host", default="127.0.0.1", help="of a server to compare with (%(default)s)")
    one.add_argument("--port", type=_number(1, 65535), help="its port")
    return parser


def _add_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help="data directory (%(default)s)")
    parser.add_argument("--shard", type=_number(0, MAX_SHARDS - 1), help="only this one")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        code: int = args.run(args)
    except (AofError, DataDirError, ImdsError, OSError) as error:
        print(f"imds-aof: {error}", file=sys.stderr)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
