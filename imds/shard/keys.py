"""The commands on keys, whatever they hold. How a command is written: ``keyspace.py``."""

from __future__ import annotations

from imds.shard.arguments import integer, syntax
from imds.shard.glob import matcher
from imds.shard.keyspace import Item, Keyspace, command, error

DONE = b"OK"
NO_KEY = "ERR no such key"

# Keys that randomkey draws before it gives up: on a read-only shard those that met their deadline stay.
DRAWS = 1000
STEP = 1000  # keys that a walk over all of them takes at a time
RECENT = 10  # keys that recent answers
MOST_RECENT = 10_000  # keys that it may be asked for: about a millisecond


@command
def del_(store: Keyspace, *keys: bytes) -> int:
    """Remove several keys; return how many there were. One alone is answered by the store itself."""
    return sum(store.remove(key) for key in keys)


@command
def unlink(store: Keyspace, *keys: bytes) -> int:
    """Remove keys; return how many there were. Here no removal waits for memory to be freed."""
    return sum(store.remove(key) for key in keys)


@command
def exists(store: Keyspace, *keys: bytes) -> int:
    """Return how many of the keys there are; one that is named twice counts twice."""
    return sum(store.kind(key) is not None for key in keys)


@command
def touch(store: Keyspace, *keys: bytes) -> int:
    """Make the keys the most recently used; return how many there are."""
    return sum(store.touch(key) for key in keys)


@command
def type_(store: Keyspace, key: bytes) -> bytes:
    """Return string, zset or none."""
    return (store.kind(key) or "none").encode()


@command
def rename(store: Keyspace, key: bytes, newkey: bytes) -> bytes:
    """Give the value another key, with its deadline."""
    if store.kind(key) is None:
        raise error(NO_KEY)
    if key != newkey:
        store.move(key, newkey)
    return DONE


@command
def renamenx(store: Keyspace, key: bytes, newkey: bytes) -> int:
    """Give the value another key, if that is free."""
    if store.kind(key) is None:
        raise error(NO_KEY)
    if store.kind(newkey):
        return 0
    store.move(key, newkey)
    return 1


@command
def copy(store: Keyspace, key: bytes, newkey: bytes, *options: bytes) -> int:
    """Copy the value, with its deadline. O(value)."""
    if any(option.upper() != b"REPLACE" for option in options):
        raise syntax()
    if key == newkey:
        raise error("ERR source and destination objects are the same")
    kind = store.kind(key)
    if kind is None or (store.kind(newkey) and not options):
        return 0
    when = store.deadline(key) or 0
    if kind == "string":
        store.put(newkey, store.string(key) or b"", when)
        return 1
    pairs = store.zslice(key, 0, store.members(key))
    store.remove(newkey)
    for score, member in pairs:
        store.zput(newkey, score, member)
    if when:
        store.set_deadline(newkey, when)
    return 1


@command
def dbsize(store: Keyspace) -> int:
    """Return how many keys there are."""
    return store.keys


@command
def flushall(store: Keyspace, *options: bytes) -> bytes:
    """Remove every key. Large sorted sets are always freed in the course of what follows."""
    if len(options) > 1 or (options and options[0].upper() not in (b"SYNC", b"ASYNC")):
        raise syntax()
    store.flush()
    return DONE


@command
def randomkey(store: Keyspace) -> bytes | None:
    """Return a key by chance."""
    for _ in range(DRAWS):
        key = store.random_key()
        if key is None or store.kind(key):
            return key
    return None


@command
def recent(store: Keyspace, *count: bytes) -> list[bytes]:
    """Return the keys that were used last, latest first, which does not count as use. O(count)."""
    wanted = integer(count[0]) if count else RECENT
    if not 0 < wanted <= MOST_RECENT:
        raise error(f"ERR value is out of range, must be from 1 to {MOST_RECENT}")
    return store.recent(wanted)


@command
def keys(store: Keyspace, pattern: bytes) -> list[bytes]:
    """Return all keys that match. O(keys): the shard does nothing else meanwhile."""
    matches = matcher(pattern)
    found: dict[bytes, None] = {}
    cursor = -1
    while cursor:
        cursor, some = store.scan(max(cursor, 0), STEP)
        found.update((key, None) for key in some if matches(key))
    return list(found)


def scan_options(options: tuple[bytes, ...], names: tuple[bytes, ...]) -> dict[bytes, bytes]:
    """Return the options of a scan by name; those that may be there are ``names``."""
    found = {}
    for name, value in zip(options[::2], (*options[1::2], None), strict=False):
        if name.upper() not in names or value is None:
            raise syntax()
        found[name.upper()] = value
    return found


def scan_count(options: dict[bytes, bytes]) -> int:
    """Return how many to look at."""
    count = integer(options.get(b"COUNT", b"10"))
    if count < 1:
        raise syntax()
    return count


def scan_cursor(text: bytes) -> int:
    """Return the cursor."""
    return integer(text, "ERR invalid cursor") & ((1 << 48) - 1)


@command
def scan(store: Keyspace, cursor: bytes, *options: bytes) -> list[Item]:
    """Return the next cursor, then keys."""
    start = scan_cursor(cursor)
    chosen = scan_options(options, (b"MATCH", b"COUNT", b"TYPE"))
    following, found = store.scan(start, scan_count(chosen))
    if b"MATCH" in chosen:
        matches = matcher(chosen[b"MATCH"])
        found = [key for key in found if matches(key)]
    kind = chosen[b"TYPE"].lower().decode(errors="replace") if b"TYPE" in chosen else None
    return [following, *(key for key in found if kind in (None, store.kind(key)))]


@command
def object_(store: Keyspace, subcommand: bytes, key: bytes) -> Item:
    """Return what is known of how the key is kept."""
    asked = subcommand.lower()
    if asked not in (b"encoding", b"refcount", b"idletime", b"freq"):
        shown = asked.decode(errors="backslashreplace")[:128]
        raise error(f"ERR unknown subcommand '{shown}'. Try OBJECT HELP.")
    kind = store.kind(key)
    if kind is None:
        return None
    if asked == b"encoding":
        return b"raw" if kind == "string" else b"skiplist"
    if asked == b"refcount":
        return 1
    if asked == b"idletime":
        return store.idle(key)
    raise error("ERR An LFU maxmemory policy is not selected, access frequency not tracked")


@command
def memory(store: Keyspace, subcommand: bytes, *rest: bytes) -> int | None:
    """Return the bytes that the key is counted with: all of them, so SAMPLES changes nothing.

    The router answers the other forms.
    """
    if subcommand.lower() != b"usage" or len(rest) not in (1, 3):
        raise syntax()
    if len(rest) == 3 and (rest[1].upper() != b"SAMPLES" or integer(rest[2]) < 0):
        raise syntax()
    return store.memory(rest[0])
