"""Every command on data beside a real redis-server 7: the same replies, but for what DIFFERENCES says.

In full: ``IMDS_REDIS_ROUNDS=100000 pytest tests/shard/test_redis.py``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

import pytest
from requests_at_random import Requests
from test_store import Shard

from imds.protocol import ERROR, LIST, MISSING, decode_list

ROUNDS = int(os.environ.get("IMDS_REDIS_ROUNDS", "3000"))
SERVER = shutil.which("redis-server")

# What is meant to be different. ``same`` maps or passes over exactly these.
DIFFERENCES = {
    "frozen": "get, set, del, zadd, zrange, zrank and zrem in their first form answer as they always did",
    "arity": "a wrong number of arguments is said without the command's name",
    "scores": "scores are written as Python's repr: 1.0, inf; Redis: 1, inf",
    "overflow": "1e400 is inf; for Redis it is no number. Neither is hexadecimal for us",
    "blanks": "a bound of scores that is empty or begins with a blank is refused; for Redis it is a number",
    "incrbyfloat": "decimals are added exactly; Redis' long double shows its error in the 17th place",
    "strings": "a key and its string have at most 64 MiB together, 512 MiB in Redis",
    "refcount": "the reference count is always 1; Redis shares small integers",
    "flat": "a reply within a reply is flattened: scan, zscan",
    "type": "with several errors in one request another one may be named first",
}


class Redis:
    """A connection that answers None, int, bytes, list, or an Exception with the error's text."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        for _ in range(400):
            try:
                self.sock.connect(path)
                break
            except OSError:
                time.sleep(0.01)
        self.file = self.sock.makefile("rb")

    def __call__(self, tokens):
        self.sock.sendall(
            b"*%d\r\n" % len(tokens) + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in tokens)
        )
        return self.read()

    def read(self):
        line = self.file.readline()[:-2]
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return Exception(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self.read() for _ in range(int(rest))]
        return rest


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    if SERVER is None:
        pytest.skip("redis-server is not installed")
    path = str(tmp_path_factory.mktemp("redis") / "r.sock")
    options = ["--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"]
    with subprocess.Popen([SERVER, *options], stdout=subprocess.DEVNULL) as process:
        connection = Redis(path)
        try:
            yield connection
        finally:
            connection.file.close()
            connection.sock.close()
            process.terminate()


def plain(reply):
    """What a reply of ours is in Redis' terms; numbers are still text."""
    status, payload = reply
    if status == ERROR:
        return Exception(payload.decode())
    if status == MISSING:
        return None
    return decode_list(payload) if status == LIST else payload


def number(item):
    try:
        return float(item)
    except (TypeError, ValueError):
        return item


def same(tokens, ours, theirs):
    """Whether the replies agree, but for DIFFERENCES."""
    name, count = tokens[0].lower(), len(tokens)
    if isinstance(theirs, Exception):
        text = str(theirs)
        if text.startswith("ERR wrong number of arguments"):
            return str(ours).startswith("ERR wrong number of arguments")
        if not isinstance(ours, Exception):
            return False
        if (name == b"zadd" and count == 4) or (name == b"zrange" and count == 4):
            return True
        return str(ours) == text or any(
            word in text + str(ours) for word in ("syntax error", "integer", "WRONGTYPE")
        )
    if isinstance(ours, Exception):
        return False
    if name == b"del" and count == 2:
        return (ours == b"OK") == (theirs == 1)
    if name == b"zrem" and count == 3:
        return (ours == b"OK") == (theirs == 1)
    if name == b"zadd" and count == 4:
        return ours == b"OK"
    if name == b"object":
        return (ours is None) == (theirs is None)
    if name == b"keys":
        return sorted(ours) == sorted(theirs)
    if isinstance(theirs, list):
        return [number(item) for item in ours] == [number(item) for item in theirs]
    if isinstance(theirs, int):
        if name in (b"ttl", b"pttl") and theirs > 0:
            return abs(int(ours) - theirs) <= (1 if name == b"ttl" else 2000)
        if name in (b"expiretime", b"pexpiretime") and theirs > 0:
            return abs(int(ours) - theirs) <= (2 if name == b"expiretime" else 2000)
        return int(ours) == theirs
    if name in (b"incrbyfloat", b"zscore", b"zincrby", b"zadd") and theirs is not None and ours is not None:
        return number(ours) == number(theirs) or abs(float(ours) - float(theirs)) < 1e-9
    return ours == theirs


def settled(tokens, redis):
    """The request in a form whose answer is not a matter of chance."""
    name = tokens[0].lower()
    if name == b"zrandmember":
        return [b"zcard", *tokens[1:2]]
    if name == b"zrange" and len(tokens) == 4:
        tokens = [*tokens, b"BYSCORE"]
    if b"score" in name or name in (b"zcount", b"zrange"):
        tokens = [token if token.strip() == token and token not in (b"", b"(") else b"x" for token in tokens]
        tokens = [b"x" if token.startswith(b"( ") else token for token in tokens]
    return tokens


@pytest.mark.timeout(0)
def test_the_same_as_redis(variant, redis):
    requests = Requests(ROUNDS, int(time.time()))
    shard = Shard(variant)
    redis([b"flushall"])
    done: set[bytes] = set()
    for step in range(ROUNDS):
        tokens = settled(requests(), redis)
        if step % 7 == 0:
            tokens = [b"zadd", b"lex", b"0", requests.member()]
        elif step % 5000 == 4999:
            tokens = [b"flushall"]
        shard.store.now = time.time_ns() // 1_000_000
        ours, theirs = plain(shard(*tokens)), redis(tokens)
        assert same(tokens, ours, theirs), (step, tokens, ours, theirs)
        if tokens[0].lower() == b"incrbyfloat" and isinstance(theirs, bytes):
            redis([b"set", tokens[1], ours, b"KEEPTTL"])
        if not isinstance(ours, Exception):
            done.add(tokens[0].lower())
        if step % 500 == 0:
            shard.store.commit()
            shard.store.check()
    assert len(done) > 60 or ROUNDS < 3000
