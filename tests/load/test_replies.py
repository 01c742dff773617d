"""The reply counters: whole, cut anywhere, with a tail, with garbage, against a model."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds.load.replies import MAX_LINE, ImdsReplies, Replies, RespReplies, exchange
from imds.protocol import ERROR, LIST, MISSING, OK, ProtocolError, encode_error, encode_list, encode_response

# (bytes of one reply, what the counter notes about it: nothing, a miss, or the text of an error)
NOTHING = "nothing"
IMDS = [
    (encode_response(OK, b"OK"), NOTHING),
    (encode_response(OK), NOTHING),
    (encode_response(OK, b"x" * 300), NOTHING),
    (encode_response(MISSING), None),
    (encode_error("ERR unknown command"), "ERR unknown command"),
    (encode_response(ERROR), ""),
    (encode_response(LIST, encode_list([b"a", None])), NOTHING),
]
RESP = [
    (b"+OK\r\n", NOTHING),
    (b"+\r\n", NOTHING),
    (b":0\r\n", NOTHING),
    (b":42\r\n", NOTHING),
    (b":-1234567\r\n", NOTHING),
    (b"$3\r\nfoo\r\n", NOTHING),
    (b"$0\r\n\r\n", NOTHING),
    (b"$13\r\n$-1\r\n*2\r\n\r\n\r\n\r\n", NOTHING),  # a value that looks like the protocol
    (b"$300\r\n" + b"\r\n" * 150 + b"\r\n", NOTHING),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"*0\r\n", None),
    (b"_\r\n", None),
    (b"-ERR no\r\n", "ERR no"),
    (b"*2\r\n$1\r\na\r\n$-1\r\n", NOTHING),  # a null inside an array is an element
    (b"*2\r\n*0\r\n*1\r\n-ERR inner\r\n", NOTHING),
    (b"%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n_\r\n", NOTHING),
    (b"~1\r\n,3.5\r\n", NOTHING),
    (b"#t\r\n", NOTHING),
    (b"(123456789012345678901234567890\r\n", NOTHING),
    (b"=8\r\ntxt:abcd\r\n", NOTHING),
    (b"*1\r\n*1\r\n*1\r\n$2\r\nhi\r\n", NOTHING),
]
CASES = [
    *(pytest.param(ImdsReplies, *case, id=f"imds-{n}") for n, case in enumerate(IMDS)),
    *(pytest.param(RespReplies, *case, id=f"resp-{n}") for n, case in enumerate(RESP)),
]


def odd(position: int, note: str | None) -> list[tuple[int, str | None]]:
    return [] if note == NOTHING else [(position, note)]


@pytest.mark.parametrize(("counter", "frame", "note"), CASES)
def test_whole_cut_anywhere_and_with_a_tail(counter: type[Replies], frame: bytes, note: str | None) -> None:
    replies = counter()
    replies.feed(frame)
    assert (replies.count, replies.odd, replies.at_rest) == (1, odd(0, note), True)

    replies = counter()
    for byte in frame[:-1]:
        replies.feed(bytes([byte]))
        assert replies.count == 0
        assert not replies.at_rest
    replies.feed(frame[-1:])
    assert (replies.count, replies.odd, replies.at_rest) == (1, odd(0, note), True)

    for cut in range(1, len(frame)):  # a whole one with a part of the next, then the rest
        replies = counter()
        replies.feed(frame + frame[:cut])
        assert (replies.count, replies.at_rest) == (1, False)
        replies.feed(frame[cut:])
        assert (replies.count, replies.odd, replies.at_rest) == (2, odd(0, note) + odd(1, note), True)


@pytest.mark.parametrize(("counter", "cases"), [(ImdsReplies, IMDS), (RespReplies, RESP)])
def test_any_replies_cut_in_any_way(counter: type[Replies], cases: list[tuple[bytes, str | None]]) -> None:
    @given(st.lists(st.sampled_from(cases), max_size=20), st.lists(st.integers(0, 400), max_size=30))
    def run(sent: list[tuple[bytes, str | None]], sizes: list[int]) -> None:
        stream = b"".join(frame for frame, _ in sent)
        replies = counter()
        pos = 0
        for size in sizes:
            replies.feed(stream[pos : pos + size])
            pos += size
        replies.feed(stream[pos:])
        assert replies.count == len(sent)
        assert replies.odd == [pair for n, (_, note) in enumerate(sent) for pair in odd(n, note)]
        assert replies.at_rest

    run()


def test_reset_counts_from_zero_in_the_middle_of_a_reply() -> None:
    replies = ImdsReplies()
    frame = encode_response(OK, b"x" * 100)
    replies.feed(frame + encode_response(MISSING) + frame[:50])
    replies.reset()
    replies.feed(frame[50:] + encode_response(MISSING))
    assert (replies.count, replies.odd) == (2, [(1, None)])


@pytest.mark.parametrize(
    ("counter", "garbage"),
    [
        (ImdsReplies, b"-ERR wrong protocol\r\n"),
        (ImdsReplies, b"HTTP/1.1 400 Bad Request\r\n"),
        (ImdsReplies, b"\x00\x00\x00\x03\x00\x00\x00\x00"),  # shorter than its own status
        (ImdsReplies, b"\x00\x00\x00\x04\x00\x00\x00\x04"),  # no such status
        (ImdsReplies, b"\xff\xff\xff\xff\x00\x00\x00\x00"),
        (ImdsReplies, b"\x00\x10\x00\x00\x00\x00\x00\x02"),  # an error text of a megabyte
        (RespReplies, b"\x00\x00\x00\x04\x00\x00\x00\x01"),
        (RespReplies, b"HTTP/1.1 400 Bad Request\r\n"),
        (RespReplies, b"$abc\r\n"),
        (RespReplies, b"$-2\r\n"),
        (RespReplies, b"*99999999999\r\n"),
        (RespReplies, b"+" + b"x" * (MAX_LINE + 1)),
    ],
)
def test_garbage_is_refused(counter: type[Replies], garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        counter().feed(garbage)


@pytest.mark.parametrize(
    ("counter", "header"),
    [(ImdsReplies, b"\x3f\xff\xff\xff\x00\x00\x00\x00"), (RespReplies, b"$1000000000\r\n")],
)
def test_a_payload_is_not_kept(counter: type[Replies], header: bytes) -> None:
    replies = counter()
    replies.feed(header)
    for _ in range(100):
        replies.feed(b"x" * 65536)
    assert replies.count == 0
    assert not replies._tail


def test_exchange_over_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answer = threading.Thread(target=lambda: (theirs.recv(10), theirs.sendall(b"+OK\r\n-ERR no\r\n")))
        answer.start()
        replies = exchange(ours, "resp", b"two asked", 2)
        answer.join()
        assert (replies.count, replies.odd) == (2, [(1, "ERR no")])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="closed by the server"):
            exchange(ours, "resp", b"")
