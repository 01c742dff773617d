"""A stream of bytes: they come in at the end and leave at the front."""

from libc.string cimport memmove, memset

from imds._kernel cimport memory
from imds._kernel.memory cimport Buffer, buffer_put, buffer_reserve, uint8_t

ctypedef struct Stream:
    Buffer held
    size_t start  # held.data[start:held.size] is the content


cdef inline size_t stream_size(const Stream *stream) noexcept nogil:
    return stream.held.size - stream.start


cdef inline uint8_t *stream_front(Stream *stream) noexcept nogil:
    return stream.held.data + stream.start


cdef inline bint stream_reserve(Stream *stream, size_t more) noexcept nogil:
    """Make room for ``more`` bytes; whether there is. Amortised cost: O(bytes that came in)."""
    cdef Buffer *held = &stream.held
    if held.room - held.size >= more:
        return True
    if stream.start and stream.start >= stream_size(stream):  # to move the rest costs less than what left has
        memmove(held.data, held.data + stream.start, stream_size(stream))
        held.size -= stream.start
        stream.start = 0
    return buffer_reserve(held, more)


cdef inline bint stream_add(Stream *stream, const void *data, size_t size) noexcept nogil:
    """Append; whether there was memory for it."""
    if not stream_reserve(stream, size):
        return False
    buffer_put(&stream.held, data, size)
    return True


cdef inline bint stream_take(Stream *stream, Buffer *more) noexcept nogil:
    """Append what ``more`` holds: an empty stream takes its memory, and gives its own for it. As stream_add."""
    cdef Buffer held
    if stream_size(stream):
        return stream_add(stream, more.data, more.size)
    held = stream.held
    stream.held = more[0]
    stream.start = 0
    more[0] = held
    more.size = 0
    return True


cdef inline void stream_free(Stream *stream) noexcept nogil:
    memory.free(stream.held.data)
    memset(stream, 0, sizeof(Stream))


cdef inline void stream_drop(Stream *stream, size_t size, size_t keep) noexcept nogil:
    """Remove ``size`` bytes from the front; give an empty buffer back if it has more room than ``keep``."""
    stream.start += size
    if stream.start == stream.held.size:
        stream.start = stream.held.size = 0
        if stream.held.room > keep:
            stream_free(stream)
