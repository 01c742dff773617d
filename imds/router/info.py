"""What ``info`` and ``memory stats`` say, from the shards' rows of ``stats``."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from imds import __version__
from imds._kernel import VARIANT
from imds.config import Config
from imds.process import resident_bytes

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RouterCounts:
    """What routers know: whose ``number`` it is, its start in seconds since 1970, the connections of all."""

    number: int
    started: float
    clients: int
    blocked: int


def report(rows: list[Row], config: Config, counts: RouterCounts, wanted: list[str]) -> str:
    """Return the sections ``wanted`` (all of them: none, ``all``, ``default`` or ``everything``) as text."""
    sections = {
        "server": _server(config, counts),
        "clients": {
            "connected_clients": counts.clients,
            "blocked_clients": counts.blocked,
            "maxclients": config.max_clients,
        },
        "memory": _memory(rows, config),
        "persistence": _persistence(rows, config),
        "stats": _stats(rows),
        "shards": {f"shard{row['shard']}": _shard(row) for row in rows},
        "keyspace": _keyspace(rows),
    }
    if not wanted or {"all", "default", "everything"} & set(wanted):
        wanted = list(sections)
    parts = []
    for name, values in sections.items():
        if name in wanted:
            lines = [f"{field}:{value}\r\n" for field, value in values.items()]
            parts.append(f"# {name.capitalize()}\r\n{''.join(lines)}")
    return "\r\n".join(parts)


def memory(rows: list[Row]) -> dict[str, int]:
    """Return what ``memory stats`` lists, in bytes."""
    keys = _sum(rows, "keys")
    used = _sum(rows, "used_bytes")
    router = resident_bytes()
    return {
        "keys.count": keys,
        "keys.bytes-per-key": used // keys if keys else 0,
        "dataset.bytes": used,
        "shards.rss": _sum(rows, "rss_bytes"),
        "router.rss": router,
        "total.rss": _sum(rows, "rss_bytes") + router,
    }


def _sum(rows: list[Row], field: str) -> int:
    return sum(row.get(field, 0) for row in rows)


def _server(config: Config, counts: RouterCounts) -> Row:
    return {
        "imds_version": __version__,
        "imds_mode": "standalone",
        "kernels": VARIANT,
        "python_version": sys.version.split()[0],
        "os": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
        "process_id": os.getpid(),
        "router": counts.number,
        "routers": config.routers,
        "shards": config.shards,
        "tcp_port": config.port,
        "uptime_in_seconds": int(time.time() - counts.started),
    }


def _memory(rows: list[Row], config: Config) -> Row:
    return {
        "used_memory": _sum(rows, "used_bytes"),
        "used_memory_rss": memory(rows)["total.rss"],
        "maxmemory": config.maxmemory,
        "maxmemory_policy": config.maxmemory_policy,
        "capacity": config.capacity,
    }


def _persistence(rows: list[Row], config: Config) -> Row:
    return {
        "loading": int(any(row["state"] == "loading" for row in rows)),
        "aof_enabled": 1,
        "aof_fsync": config.appendfsync,
        "aof_current_size": _sum(rows, "aof_bytes"),
        "aof_base_size": _sum(rows, "aof_base_bytes"),
        "aof_rewrite_in_progress": int(any(row.get("rewrite_running") for row in rows)),
        "aof_rewrites": _sum(rows, "rewrites"),
        "aof_last_write_status": "err" if any(row.get("readonly") for row in rows) else "ok",
    }


def _stats(rows: list[Row]) -> Row:
    return {
        "total_commands_processed": _sum(rows, "ops"),
        "keyspace_hits": _sum(rows, "hits"),
        "keyspace_misses": _sum(rows, "misses"),
        "evicted_keys": _sum(rows, "evictions"),
    }


def _shard(row: Row) -> str:
    shown = {"state": row["state"], "restarts": row["restarts"]}
    shown |= {field: row[field] for field in ("pid", "keys", "used_bytes", "ops") if field in row}
    return ",".join(f"{field}={value}" for field, value in shown.items())


def _keyspace(rows: list[Row]) -> Row:
    keys = _sum(rows, "keys")
    return {"db0": f"keys={keys}"} if keys else {}
