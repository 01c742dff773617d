"""What travels between a router and a shard."""

import pytest
from feeding import feed
from hypothesis import given
from hypothesis import strategies as st

from imds.envelope import DIALECT_IMDS, LENGTH, REPLY, TICKETS, envelopes, refuse, seal
from imds.protocol import encode_error, encode_request, encode_response

u32 = st.integers(0, TICKETS - 1)
frames = st.lists(st.lists(st.binary(max_size=9), max_size=3).map(encode_request), max_size=3)
LOADING = encode_error("LOADING the shard is reading its log")


def first(buf, start):
    """Decode one envelope at ``start`` as the other decoders do: (value, end) or None."""
    for ticket, count, dialect, begin, end in envelopes(buf[start:]):
        return (ticket, count, dialect, bytes(buf[start + begin : start + end])), start + end
    return None


def test_bytes():
    sealed = seal(7, 2, b"abcd", 1)
    assert sealed == b"\0\0\0\x10\0\0\0\7\0\0\0\2\0\0\0\1abcd"
    assert seal(7, 0, b"") == b"\0\0\0\x0c\0\0\0\7" + b"\0\0\0\0" * 2
    assert DIALECT_IMDS == 0


@given(u32, u32, u32, st.binary(max_size=40))
def test_round_trip(ticket, count, dialect, body):
    feed(first, seal(ticket, count, body, dialect), (ticket, count, dialect, body))


@pytest.mark.parametrize("ticket", [0, (1 << 31) - 1, 1 << 31, TICKETS - 1])
def test_tickets_at_the_limits(ticket):
    assert first(seal(ticket, 1, b"x"), 0) == ((ticket, 1, 0, b"x"), 17)


@given(st.lists(frames, max_size=4), st.data())
def test_back_to_back_and_cut_short(batches, data):
    sealed = [seal(ticket, len(batch), b"".join(batch)) for ticket, batch in enumerate(batches)]
    buf = b"".join(sealed)
    cut = data.draw(st.integers(0, len(buf)))
    whole, size = 0, 0
    while whole < len(sealed) and size + len(sealed[whole]) <= cut:
        size += len(sealed[whole])
        whole += 1
    found = list(envelopes(buf[:cut]))
    assert [(ticket, count) for ticket, count, *_ in found] == [(t, len(batches[t])) for t in range(whole)]
    assert [buf[start:end] for *_, start, end in found] == [b"".join(batch) for batch in batches[:whole]]


@given(st.binary(max_size=60))
def test_garbage_never_reads_past_the_end(garbage):
    ends = [end for *_, end in envelopes(garbage)]
    assert ends == sorted(set(ends))
    assert all(end <= len(garbage) for end in ends)


@given(st.lists(frames, max_size=4), st.binary(max_size=15))
def test_refuse_answers_every_request(batches, part):
    """Each whole envelope is answered by its ticket and as many replies as it has requests."""
    buf = b"".join(seal(40 + n, len(batch), b"".join(batch)) for n, batch in enumerate(batches))
    used, out = refuse(buf + part, LOADING)
    assert used == len(buf)
    pos = 0
    for n, batch in enumerate(batches):
        length, ticket, count = REPLY.unpack_from(out, pos)
        assert (ticket, count) == (40 + n, len(batch))
        end = pos + LENGTH + length
        assert out[pos + REPLY.size : end] == LOADING * len(batch)
        pos = end
    assert pos == len(out)


def test_refuse_of_a_part_of_an_envelope():
    assert refuse(seal(1, 1, b"frame")[:-1], encode_response(0)) == (0, b"")
