"""What every decoder has to survive: its input whole, byte by byte, with bytes before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def feed(decode: Callable[[Any, int], tuple[Any, int] | None], frame: bytes, value: Any) -> None:
    """Check that ``decode(buffer, start) -> (value, end) | None`` finds ``value`` in whole frames only."""
    size = len(frame)
    for buffer in (frame, bytearray(frame), memoryview(frame)):
        assert decode(buffer, 0) == (value, size)
    for cut in range(size):
        assert decode(frame[:cut], 0) is None, f"found in the first {cut} of {size} bytes"
    for tail in (b"\x00", b"\xff" * 9, frame):
        assert decode(frame + tail, 0) == (value, size)
        assert decode(tail + frame, len(tail)) == (value, len(tail) + size)
