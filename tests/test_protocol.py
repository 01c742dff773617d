"""The client protocol's encoders and decoders."""

import tracemalloc

import pytest
from feeding import feed
from hypothesis import example, given
from hypothesis import strategies as st

from imds import protocol
from imds.protocol import (
    ERROR,
    LIST,
    MAX_REQUEST,
    MAX_RESPONSE,
    MAX_TOKENS,
    MISSING,
    NO_ELEMENT,
    OK,
    U32,
    FrameScan,
    ProtocolError,
    decode_list,
    decode_request,
    decode_response,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
)

tokens = st.lists(st.binary(max_size=40), max_size=8)
items = st.lists(st.none() | st.binary(max_size=40), max_size=8)

REQUESTS = [
    ([], b"\0\0\0\0"),
    ([b""], b"\0\0\0\1\0\0\0\0"),
    ([b"get", b"key"], b"\0\0\0\2\0\0\0\3get\0\0\0\3key"),
    ([b"set", b"\0\xff", b""], b"\0\0\0\3\0\0\0\3set\0\0\0\2\0\xff\0\0\0\0"),
]
RESPONSES = [
    (OK, b"OK", b"\0\0\0\6\0\0\0\0OK"),
    (OK, b"", b"\0\0\0\4\0\0\0\0"),
    (MISSING, b"", b"\0\0\0\4\0\0\0\1"),
    (ERROR, b"ERR unknown command", b"\0\0\0\x17\0\0\0\2ERR unknown command"),
    (LIST, b"\0\0\0\1\xff\xff\xff\xff", b"\0\0\0\x0c\0\0\0\3\0\0\0\1\xff\xff\xff\xff"),
]


def response_at(buf, start):
    found = decode_response(buf, start)
    return found and (found[:2], found[2])


class TestRequests:
    @pytest.mark.parametrize(("parts", "frame"), REQUESTS)
    def test_bytes_are_the_frozen_ones(self, parts, frame):
        assert encode_request(parts) == frame
        feed(decode_request, frame, parts)

    @given(tokens)
    def test_round_trip(self, parts):
        feed(decode_request, encode_request(parts), parts)

    @given(st.lists(tokens, max_size=4))
    def test_back_to_back(self, requests):
        buf, pos = b"".join(map(encode_request, requests)), 0
        for parts in requests:
            found = decode_request(buf, pos)
            assert found is not None
            assert found[0] == parts
            pos = found[1]
        assert pos == len(buf)
        assert decode_request(buf, pos) is None

    @given(st.binary(max_size=60))
    @example(b"\0\0\0\1\xff\xff\xff\xff")
    def test_garbage_is_refused_or_is_a_frame(self, garbage):
        try:
            found = decode_request(garbage, max_tokens=5, max_request=50)
        except ProtocolError:
            return
        if found is not None:
            assert garbage[: found[1]] == encode_request(found[0])
            assert found[1] <= len(garbage)

    @pytest.mark.parametrize("count", [MAX_TOKENS + 1, 1 << 31, (1 << 32) - 1])
    def test_count_over_the_limit(self, count):
        with pytest.raises(ProtocolError, match=f"^ERR .*{count} tokens .* limit is {MAX_TOKENS}"):
            decode_request(U32.pack(count))

    def test_count_at_the_limit_is_waited_for_without_memory(self):
        tracemalloc.start()
        try:
            assert decode_request(U32.pack(MAX_TOKENS)) is None
            assert decode_request(U32.pack(1) + U32.pack(MAX_REQUEST - 8)) is None
            assert tracemalloc.get_traced_memory()[1] < 10_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("length", [MAX_REQUEST - 7, 1 << 31, (1 << 32) - 1])
    def test_length_over_the_limit(self, length):
        with pytest.raises(ProtocolError, match=rf"^ERR .*request of {8 + length} bytes .* is {MAX_REQUEST}"):
            decode_request(U32.pack(1) + U32.pack(length))

    def test_limits_are_inclusive(self):
        frame = encode_request([b"a", b"bc"])
        assert decode_request(frame, max_tokens=2, max_request=len(frame)) == ([b"a", b"bc"], len(frame))
        with pytest.raises(ProtocolError, match=r"limit is 1$"):
            decode_request(frame, max_tokens=1)
        with pytest.raises(ProtocolError, match=r"limit is 14$"):
            decode_request(frame, max_request=len(frame) - 1)

    def test_lengths_are_limited_in_sum(self):
        frame = U32.pack(3) + (U32.pack(10) + b"x" * 10) * 2 + U32.pack(10)
        assert decode_request(frame, max_request=46) is None
        with pytest.raises(ProtocolError, match="46 bytes"):
            decode_request(frame, max_request=45)


class TestFrameScan:
    @given(st.lists(tokens, min_size=1, max_size=3), st.integers(0, 7))
    def test_byte_by_byte(self, requests, before):
        """One scan finds the frames one after another, and never asks for more than the frame has."""
        buf, start, scan = b"\xee" * before, before, FrameScan()
        for parts in requests:
            frame = encode_request(parts)
            for n, byte in enumerate(frame, 1):
                buf += bytes([byte])
                assert scan.need <= len(frame)
                waiting = n < scan.need
                found = scan.advance(buf, start, len(buf))
                assert found == (len(frame) if n == len(frame) else None)
                assert not (waiting and found)
            start = len(buf)

    @given(tokens, st.data())
    def test_any_pieces(self, parts, data):
        frame = encode_request(parts)
        cuts = data.draw(st.lists(st.integers(0, len(frame) - 1), max_size=6).map(sorted))
        scan = FrameScan()
        for cut in cuts:
            assert scan.advance(frame, 0, cut) is None
        assert scan.advance(frame, 0, len(frame)) == len(frame)

    def test_end_hides_what_is_behind_it(self):
        frame = encode_request([b"get", b"key"])
        assert FrameScan().advance(frame, 0, len(frame) - 1) is None

    def test_each_header_is_read_once(self, monkeypatch):
        class Counting:
            reads = 0

            def unpack_from(self, buf, pos):
                self.reads += 1
                return U32.unpack_from(buf, pos)

        counting = Counting()
        frame = encode_request([b"x"] * 300)
        monkeypatch.setattr(protocol, "U32", counting)
        scan = FrameScan()
        for end in range(len(frame) + 1):
            scan.advance(frame, 0, end)
        assert counting.reads == 301

    def test_reset_forgets_a_partial_frame(self):
        scan = FrameScan()
        assert scan.advance(encode_request([b"get", b"key"]), 0, 9) is None
        scan.reset()
        assert scan.advance(encode_request([b"x"]), 0, 9) == 9


class TestResponses:
    @pytest.mark.parametrize(("status", "payload", "frame"), RESPONSES)
    def test_bytes_are_the_frozen_ones(self, status, payload, frame):
        assert encode_response(status, payload) == frame
        feed(response_at, frame, (status, payload))

    @given(st.integers(0, (1 << 32) - 1), st.binary(max_size=60))
    def test_round_trip(self, status, payload):
        feed(response_at, encode_response(status, payload), (status, payload))

    def test_error_text_is_utf8(self):
        assert encode_error("ERR é") == encode_response(ERROR, "ERR é".encode())

    @pytest.mark.parametrize("length", [0, 3, MAX_RESPONSE + 1, 1 << 31, (1 << 32) - 1])
    def test_impossible_length(self, length):
        with pytest.raises(ProtocolError, match=f"{length} bytes"):
            decode_response(U32.pack(length))

    def test_limit_is_inclusive_and_costs_no_memory(self):
        tracemalloc.start()
        try:
            assert decode_response(U32.pack(MAX_RESPONSE)) is None
            assert tracemalloc.get_traced_memory()[1] < 10_000
        finally:
            tracemalloc.stop()
        frame = encode_response(OK, b"abc")
        assert decode_response(frame, max_response=7) == (OK, b"abc", 11)
        with pytest.raises(ProtocolError, match=r"limit is 6$"):
            decode_response(frame, max_response=6)

    @given(st.binary(max_size=60))
    def test_garbage_is_refused_or_is_a_frame(self, garbage):
        try:
            found = decode_response(garbage, max_response=50)
        except ProtocolError:
            return
        if found is not None:
            status, payload, end = found
            assert garbage[:end] == encode_response(status, payload)


class TestLists:
    def test_bytes_are_the_frozen_ones(self):
        payload = b"\0\0\0\3\0\0\0\1a\xff\xff\xff\xff\0\0\0\0"
        assert encode_list([b"a", None, b""]) == payload
        assert decode_list(payload) == [b"a", None, b""]
        assert encode_list([]) == b"\0\0\0\0"

    @given(items)
    def test_round_trip(self, values):
        payload = encode_list(iter(values))
        for buffer in (payload, bytearray(payload), memoryview(payload)):
            assert decode_list(buffer) == values

    @given(items)
    def test_cut_short_or_with_a_tail(self, values):
        payload = encode_list(values)
        for cut in range(len(payload)):
            with pytest.raises(ProtocolError):
                decode_list(payload[:cut])
        with pytest.raises(ProtocolError, match="1 bytes after"):
            decode_list(payload + b"\0")

    @pytest.mark.parametrize("count", [1, 1 << 31, (1 << 32) - 1])
    def test_count_without_elements(self, count):
        with pytest.raises(ProtocolError, match=f"{count} elements"):
            decode_list(U32.pack(count))

    @pytest.mark.parametrize("length", [2, 1 << 31, NO_ELEMENT - 1])
    def test_element_past_the_end(self, length):
        with pytest.raises(ProtocolError, match="past the end"):
            decode_list(U32.pack(1) + U32.pack(length) + b"x")

    @given(st.binary(max_size=60))
    def test_garbage_is_refused_or_is_a_list(self, garbage):
        try:
            found = decode_list(garbage)
        except ProtocolError:
            return
        assert encode_list(found) == garbage
