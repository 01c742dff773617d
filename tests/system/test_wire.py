"""The protocol as clients out there speak it: bytes in, bytes out, over a plain connection."""

from __future__ import annotations

import random
import socket

import pytest
from serving import Server, converse, receive, receive_all, receive_replies, replies, request, until

from imds.protocol import ERROR, MAX_REQUEST, MAX_TOKENS

OK = b"\0\0\0\6\0\0\0\0OK"
MISSING = b"\0\0\0\4\0\0\0\1"
WRONG_ARITY = b"\0\0\0\x21\0\0\0\2ERR wrong number of arguments"
UNKNOWN = b"\0\0\0\x17\0\0\0\2ERR unknown command"
BAD_SCORE = b"\0\0\0\x1e\0\0\0\2ERR score must be a number"
WRONG_TYPE = b"\0\0\0\x45\0\0\0\2WRONGTYPE Operation against a key holding the wrong kind of value"

# A conversation in order: request, reply. Written out, so that no encoder of ours can be wrong on both sides.
FROZEN = [
    (b"\0\0\0\2\0\0\0\3get\0\0\0\3foo", MISSING),
    (b"\0\0\0\3\0\0\0\3set\0\0\0\3foo\0\0\0\3bar", OK),
    (b"\0\0\0\2\0\0\0\3get\0\0\0\3foo", b"\0\0\0\7\0\0\0\0bar"),
    (b"\0\0\0\3\0\0\0\3set\0\0\0\3foo\0\0\0\0", OK),
    (b"\0\0\0\2\0\0\0\3get\0\0\0\3foo", b"\0\0\0\4\0\0\0\0"),
    (b"\0\0\0\3\0\0\0\3SET\0\0\0\0\0\0\0\4\0\xff\r\n", OK),
    (b"\0\0\0\2\0\0\0\3gEt\0\0\0\0", b"\0\0\0\x08\0\0\0\0\0\xff\r\n"),
    (b"\0\0\0\2\0\0\0\3del\0\0\0\3foo", OK),
    (b"\0\0\0\2\0\0\0\3del\0\0\0\3foo", MISSING),
    (b"\0\0\0\2\0\0\0\3Del\0\0\0\0", OK),
    # sorted sets
    (b"\0\0\0\4\0\0\0\6zrange\0\0\0\1z\0\0\0\4-inf\0\0\0\3inf", MISSING),
    (b"\0\0\0\3\0\0\0\5zrank\0\0\0\1z\0\0\0\1a", MISSING),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\0022.\0\0\0\1b", OK),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\00210\0\0\0\1c", OK),
    (b"\0\0\0\4\0\0\0\4ZADD\0\0\0\1z\0\0\0\0012\0\0\0\1a", OK),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\3inf\0\0\0\1d", OK),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\0031e9\0\0\0\1d", OK),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\4-0.5\0\0\0\1e", OK),
    (
        b"\0\0\0\4\0\0\0\6zrange\0\0\0\1z\0\0\0\4-inf\0\0\0\3inf",
        b"\0\0\0\x2c\0\0\0\0-0.5:e,2.0:a,2.0:b,10.0:c,1000000000.0:d",
    ),
    (
        b"\0\0\0\4\0\0\0\6zrange\0\0\0\1z\0\0\0\0012\0\0\0\00210",
        b"\0\0\0\x16\0\0\0\0002.0:a,2.0:b,10.0:c",
    ),
    (b"\0\0\0\4\0\0\0\6zrange\0\0\0\1z\0\0\0\0013\0\0\0\0019", MISSING),
    (b"\0\0\0\3\0\0\0\5zrank\0\0\0\1z\0\0\0\1e", b"\0\0\0\5\0\0\0\0000"),
    (b"\0\0\0\3\0\0\0\5zrank\0\0\0\1z\0\0\0\1d", b"\0\0\0\5\0\0\0\0004"),
    (b"\0\0\0\3\0\0\0\5zrank\0\0\0\1z\0\0\0\1x", MISSING),
    (b"\0\0\0\3\0\0\0\4zrem\0\0\0\1z\0\0\0\1e", OK),
    (b"\0\0\0\3\0\0\0\4zrem\0\0\0\1z\0\0\0\1e", MISSING),
    (b"\0\0\0\3\0\0\0\5zrank\0\0\0\1z\0\0\0\1d", b"\0\0\0\5\0\0\0\0003"),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\3nan\0\0\0\1a", BAD_SCORE),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\0031_0\0\0\0\1a", BAD_SCORE),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\0\0\0\0\1a", BAD_SCORE),
    (b"\0\0\0\4\0\0\0\6zrange\0\0\0\1z\0\0\0\3low\0\0\0\0019", BAD_SCORE),
    # the wrong kind
    (b"\0\0\0\2\0\0\0\3get\0\0\0\1z", WRONG_TYPE),
    (b"\0\0\0\3\0\0\0\3set\0\0\0\3foo\0\0\0\3bar", OK),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\3foo\0\0\0\0012\0\0\0\1a", WRONG_TYPE),
    (b"\0\0\0\4\0\0\0\6zrange\0\0\0\3foo\0\0\0\0010\0\0\0\0019", WRONG_TYPE),
    (b"\0\0\0\3\0\0\0\5zrank\0\0\0\3foo\0\0\0\1a", WRONG_TYPE),
    (b"\0\0\0\3\0\0\0\4zrem\0\0\0\3foo\0\0\0\1a", WRONG_TYPE),
    (b"\0\0\0\3\0\0\0\3set\0\0\0\1z\0\0\0\1s", OK),  # replaces a sorted set
    (b"\0\0\0\2\0\0\0\3get\0\0\0\1z", b"\0\0\0\5\0\0\0\0s"),
    # the last member takes the set along
    (b"\0\0\0\2\0\0\0\3del\0\0\0\1z", OK),
    (b"\0\0\0\4\0\0\0\4zadd\0\0\0\1z\0\0\0\0011\0\0\0\1a", OK),
    (b"\0\0\0\3\0\0\0\4zrem\0\0\0\1z\0\0\0\1a", OK),
    (b"\0\0\0\2\0\0\0\3del\0\0\0\1z", MISSING),
    # requests that are none; the connection stays open
    (b"\0\0\0\1\0\0\0\3get", WRONG_ARITY),
    (b"\0\0\0\3\0\0\0\3get\0\0\0\3foo\0\0\0\1x", WRONG_ARITY),
    (b"\0\0\0\2\0\0\0\3set\0\0\0\3foo", WRONG_ARITY),
    (b"\0\0\0\1\0\0\0\3del", WRONG_ARITY),
    (b"\0\0\0\3\0\0\0\4zadd\0\0\0\1z\0\0\0\0011", WRONG_ARITY),
    (b"\0\0\0\2\0\0\0\6zrange\0\0\0\1z", WRONG_ARITY),
    (b"\0\0\0\2\0\0\0\5zrank\0\0\0\1z", WRONG_ARITY),
    (b"\0\0\0\2\0\0\0\4zrem\0\0\0\1z", WRONG_ARITY),
    (b"\0\0\0\2\0\0\0\5stats\0\0\0\1z", WRONG_ARITY),
    (b"\0\0\0\2\0\0\0\4nope\0\0\0\1z", UNKNOWN),
    (b"\0\0\0\2\0\0\0\4get\0\0\0\0\1z", UNKNOWN),
    (b"\0\0\0\1\0\0\0\0", UNKNOWN),
    (b"\0\0\0\0", UNKNOWN),
    (b"\0\0\0\2\0\0\0\3get\0\0\0\3foo", b"\0\0\0\7\0\0\0\0bar"),
    (b"\0\0\0\2\0\0\0\3del\0\0\0\3foo", OK),
]  # fmt: skip
REQUESTS = b"".join(asked for asked, _ in FROZEN)
REPLIES = b"".join(answered for _, answered in FROZEN)


def test_each_reply_is_as_it_always_was(shared: Server) -> None:
    sock = shared.connect()
    for asked, answered in FROZEN:
        sock.sendall(asked)
        assert receive(sock, len(answered)) == answered, asked


def test_the_same_in_one_piece_and_byte_by_byte(shared: Server) -> None:
    sock = shared.connect()
    assert converse(sock, [REQUESTS], len(REPLIES)) == REPLIES
    pieces = [bytes([byte]) for byte in REQUESTS]
    assert converse(sock, pieces, len(REPLIES)) == REPLIES


@pytest.mark.parametrize(
    ("frame", "limit"),
    [
        (b"\0\x10\0\1", MAX_TOKENS),
        (b"\xff\xff\xff\xff", MAX_TOKENS),
        (b"\0\0\0\2\0\0\0\3get\x04\0\0\0", MAX_REQUEST),
        (b"\0\0\0\2\0\0\0\3get\xff\xff\xff\xff", MAX_REQUEST),
        (b"\0\0\0\3\xff\xff\xff\xff", MAX_REQUEST),
    ],
)
@pytest.mark.parametrize("more", [0, 4 << 20])
def test_a_malformed_frame_gets_one_error_and_the_end(
    shared: Server, frame: bytes, limit: int, more: int
) -> None:
    sock = shared.connect()
    sock.sendall(request(b"get", b"nothing") + frame + bytes(more))  # the client goes on as if nothing were
    answered = replies(receive_all(sock))
    assert answered[0] == (1, b""), "what came before the frame is answered"
    assert len(answered) == 2
    status, text = answered[1]
    assert status == ERROR
    assert text.startswith(b"ERR protocol error: ")
    assert text.endswith(b"the limit is %d" % limit)


def test_a_half_closed_client_gets_all_its_answers(shared: Server) -> None:
    sock = shared.connect()
    sock.sendall(REQUESTS * 20 + b"\0\0\0\2\0\0\0\3ge")  # the last one never becomes whole
    sock.shutdown(socket.SHUT_WR)
    assert receive_all(sock) == REPLIES * 20


def test_a_half_closed_client_that_reads_late_gets_all_its_answers(shared: Server) -> None:
    value = random.Random(1).randbytes(100_000)
    asked = request(b"set", b"wire:late", value) + request(b"get", b"wire:late") * 100
    sock = shared.connect()
    sock.sendall(asked)
    sock.shutdown(socket.SHUT_WR)
    until("all is executed", lambda: sum(row["hits"] for row in shared.stats()) >= 100)
    assert replies(receive_all(sock)) == [(0, b"OK")] + [(0, value)] * 100


def test_an_announced_length_allocates_nothing(shared: Server) -> None:
    router = shared.router()
    shared.stats()
    before = router.memory_info().rss
    announced = b"\0\0\0\2\0\0\0\3get\x03\xff\xff\0"  # a key of 64 MiB, of which nothing comes
    tokens = b"\0\x10\0\0"  # a million tokens, likewise
    socks = [shared.connect() for _ in range(40)]
    for sock in socks:
        sock.sendall(announced if sock is not socks[-1] else tokens)
    shared.stats()  # the router has seen them all
    assert router.memory_info().rss - before < 16 << 20
    for sock in socks:
        sock.close()


def test_a_large_value_goes_in_and_out_unchanged(shared: Server) -> None:
    value = random.Random(2).randbytes(8 << 20)
    sock = shared.connect()
    answer = OK + (4 + len(value)).to_bytes(4) + b"\0\0\0\0" + value
    asked = request(b"set", b"wire:large", value) + request(b"get", b"wire:large")
    assert converse(sock, [asked], len(answer)) == answer
    sock.sendall(request(b"del", b"wire:large"))
    assert receive(sock, len(OK)) == OK


def test_a_connection_outlives_a_thousand_unknown_commands(shared: Server) -> None:
    sock = shared.connect()
    sock.sendall(request(b"flushdb", b"now") * 1000 + request(b"get", b"nothing"))
    assert receive_replies(sock, 1001) == [(ERROR, b"ERR unknown command")] * 1000 + [(1, b"")]
