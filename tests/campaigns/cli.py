"""``scripts/campaign``: run one of the campaigns, or list them."""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib
import logging
import secrets
import sys
import time
import traceback
from collections.abc import Sequence

from campaigns.reporting import aloud

# name: (module, rounds of the full form, what a round is, what is shown)
CAMPAIGNS = {
    "crashes": ("crashes", 50_000, "crash states", "power cuts and kills of a shard on a simulated disk"),
    "faults": ("faults", 10, "workloads", "every operation on the disk fails, in every way"),
    "damage": ("damage", 10_000, "places", "a log is cut and flipped at every byte, others at random places"),
    "reshards": ("reshards", 3, "times each", "crashes and faults while the number of shards changes"),
    "machine": ("machine", 5_000, "examples", "a whole server against a dict, restarts and all"),
    "kills": ("kills", 1_000, "kills", "SIGKILL of any process of a real server under traffic"),
    "straces": ("straces", 3, "times each", "system calls of a real server fail, by strace"),
    "plants": ("plants", 1000, "trials each", "bugs planted in the code: the campaigns catch each of them"),
    "histories": ("histories", 1_000, "histories", "linearizability of what clients see, with kills"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; return 0 if it held, 1 if not, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="scripts/campaign", description="Try to catch the server in a lie about durability."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of the list; without it, the list")
    parser.add_argument("--rounds", type=int, metavar="N", help="how much of it; default: the full form")
    parser.add_argument("--seed", type=int, metavar="S", help="default: a random one, which is printed")
    options = parser.parse_args(arguments)
    if options.name is None:
        for name, (_, rounds, unit, what) in CAMPAIGNS.items():
            print(f"{name:<12} {rounds:>6} {unit:<14} {what}")
        return 0
    if options.name not in CAMPAIGNS:
        parser.error(f"no campaign {options.name!r}; there are {', '.join(CAMPAIGNS)}")
    module, rounds, unit, _ = CAMPAIGNS[options.name]
    if options.rounds is not None:
        rounds = options.rounds
    if rounds < 1:
        parser.error("--rounds: the rule is a whole number from 1 on")
    seed = secrets.randbits(31) if options.seed is None else options.seed
    print(f"{options.name}: {rounds} {unit}, seed {seed}", flush=True)
    logging.disable(logging.CRITICAL)  # the shards' own words about what is done to them
    started = time.monotonic()
    try:
        did = importlib.import_module(f"campaigns.{module}").campaign(rounds, seed, aloud(options.name))
    except Exception as error:
        traceback.print_exc()
        notes = "; ".join(getattr(error, "__notes__", []))
        reason = str(error).partition("\n")[0] or repr(error)
        print(f"{options.name}: FAILED, seed {seed}, {notes}: {reason}")
        return 1
    print(f"{options.name}: held, seed {seed}, {time.monotonic() - started:.0f} s: {did}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
