"""Memory: checked allocation, what the allocator takes for it, growing buffers, and big-endian integers.

Every allocation of the kernels goes through here. ``alloc_fails_at`` is for tests: n makes the n-th allocation
of this module from now on fail, once.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

cdef extern from *:
    """
    #include <stdlib.h>
    #include <string.h>

    static size_t alloc_fails_at = 0;

    static inline int alloc_may(void) {
        return !alloc_fails_at || --alloc_fails_at;
    }

    static inline void *alloc(size_t size) {
        return alloc_may() ? malloc(size) : NULL;
    }

    static inline void *alloc_grow(void *old, size_t size) {
        return alloc_may() ? realloc(old, size) : NULL;
    }

    /* Zeroed whole cache lines; `size` is a multiple of 64. */
    static inline void *alloc_lines(size_t size) {
        void *lines = NULL;
        if (!alloc_may() || posix_memalign(&lines, 64, size)) return NULL;
        return memset(lines, 0, size);
    }

    /* What glibc's malloc takes for `size` bytes: one word more, in steps of 16, at least 32. */
    static inline size_t chunk_size(size_t size) {
        return size <= 24 ? 32 : (size + 8 + 15) & ~(size_t)15;
    }

    /* At least `size` bytes, and all that this chunk has: as much for each size that takes the same. */
    static inline void *alloc_chunk(size_t size) {
        return alloc(chunk_size(size) - 8);
    }
    """
    size_t alloc_fails_at
    void *alloc(size_t size) noexcept nogil
    void *alloc_grow(void *old, size_t size) noexcept nogil
    void *alloc_lines(size_t size) noexcept nogil
    void *alloc_chunk(size_t size) noexcept nogil
    size_t chunk_size(size_t size) noexcept nogil
    void free(void *block) noexcept nogil


cdef inline uint32_t get_u32(const uint8_t *at) noexcept nogil:
    return (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | at[3]


cdef inline uint64_t get_u64(const uint8_t *at) noexcept nogil:
    return (<uint64_t>get_u32(at) << 32) | get_u32(at + 4)


cdef inline void set_u32(uint8_t *at, uint32_t value) noexcept nogil:
    at[0] = <uint8_t>(value >> 24)
    at[1] = <uint8_t>(value >> 16)
    at[2] = <uint8_t>(value >> 8)
    at[3] = <uint8_t>value


cdef inline void set_u64(uint8_t *at, uint64_t value) noexcept nogil:
    set_u32(at, <uint32_t>(value >> 32))
    set_u32(at + 4, <uint32_t>value)


cdef enum:
    # An empty buffer with more room is given back. A busy link's comes to twice the backlog limit, and to grow anew
    # each time would cost as much as what it holds.
    KEEP = 2 << 20

ctypedef struct Buffer:
    # ``data[:size]`` is filled, ``data[:room]`` is ours. All zero is an empty buffer.
    uint8_t *data
    size_t size
    size_t room


cdef inline bint buffer_reserve(Buffer *buffer, size_t more) noexcept nogil:
    """Make room for ``more`` bytes behind the filled ones; whether there is."""
    if buffer.room - buffer.size >= more:
        return True
    cdef size_t least = buffer.size + more
    if least < more or least > (<size_t>-1) // 4:
        return False
    cdef size_t room = least if least > 2 * buffer.room else 2 * buffer.room
    if room < 1024:
        room = 1024
    cdef void *data = alloc_grow(buffer.data, room)
    if data == NULL:
        return False
    buffer.data = <uint8_t *>data
    buffer.room = room
    return True


cdef inline void buffer_put(Buffer *buffer, const void *data, size_t size) noexcept nogil:
    """Append to a buffer that has the room."""
    if size:
        memcpy(buffer.data + buffer.size, data, size)
        buffer.size += size


cdef inline void buffer_put_u32(Buffer *buffer, uint32_t value) noexcept nogil:
    set_u32(buffer.data + buffer.size, value)
    buffer.size += 4


cdef inline void buffer_empty(Buffer *buffer) noexcept nogil:
    """Forget the content; keep a usual amount of room for the next."""
    buffer.size = 0
    if buffer.room > KEEP:
        free(buffer.data)
        buffer.data = NULL
        buffer.room = 0
