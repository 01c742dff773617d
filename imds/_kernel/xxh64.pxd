"""xxHash64 as the xxhash package computes it, for buffers that are whole in memory."""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #define XXH_P1 0x9E3779B185EBCA87ULL
    #define XXH_P2 0xC2B2AE3D27D4EB4FULL
    #define XXH_P3 0x165667B19E3779F9ULL
    #define XXH_P4 0x85EBCA77C2B2AE63ULL
    #define XXH_P5 0x27D4EB2F165667C5ULL
    """
    const uint64_t XXH_P1, XXH_P2, XXH_P3, XXH_P4, XXH_P5


cdef inline uint64_t _rotate(uint64_t x, int bits) noexcept nogil:
    return (x << bits) | (x >> (64 - bits))


cdef inline uint64_t _little32(const uint8_t *at) noexcept nogil:
    return <uint64_t>at[0] | <uint64_t>at[1] << 8 | <uint64_t>at[2] << 16 | <uint64_t>at[3] << 24


cdef inline uint64_t _little64(const uint8_t *at) noexcept nogil:
    # Compilers make one load of it.
    return (
        <uint64_t>at[0] | <uint64_t>at[1] << 8 | <uint64_t>at[2] << 16 | <uint64_t>at[3] << 24
        | <uint64_t>at[4] << 32 | <uint64_t>at[5] << 40 | <uint64_t>at[6] << 48 | <uint64_t>at[7] << 56
    )


cdef inline uint64_t _round(uint64_t lane, uint64_t word) noexcept nogil:
    return _rotate(lane + word * XXH_P2, 31) * XXH_P1


cdef inline uint64_t _merge(uint64_t hash, uint64_t lane) noexcept nogil:
    return (hash ^ _round(0, lane)) * XXH_P1 + XXH_P4


cdef inline uint64_t _end(const uint8_t *at, size_t left, uint64_t hash) noexcept nogil:
    """Add fewer than 32 bytes that are left, and mix."""
    while left >= 8:
        hash = _rotate(hash ^ _round(0, _little64(at)), 27) * XXH_P1 + XXH_P4
        at += 8
        left -= 8
    if left >= 4:
        hash = _rotate(hash ^ (_little32(at) * XXH_P1), 23) * XXH_P2 + XXH_P3
        at += 4
        left -= 4
    while left:
        hash = _rotate(hash ^ (at[0] * XXH_P5), 11) * XXH_P1
        at += 1
        left -= 1
    hash = (hash ^ (hash >> 33)) * XXH_P2
    hash = (hash ^ (hash >> 29)) * XXH_P3
    return hash ^ (hash >> 32)


cdef inline uint64_t xxh64(const uint8_t *at, size_t size, uint64_t seed) noexcept nogil:
    cdef uint64_t a, b, c, d, hash
    cdef size_t left = size
    if size < 32:
        return _end(at, size, seed + XXH_P5 + size)
    a = seed + XXH_P1 + XXH_P2
    b = seed + XXH_P2
    c = seed
    d = seed - XXH_P1
    while left >= 32:
        a = _round(a, _little64(at))
        b = _round(b, _little64(at + 8))
        c = _round(c, _little64(at + 16))
        d = _round(d, _little64(at + 24))
        at += 32
        left -= 32
    hash = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
    hash = _merge(_merge(_merge(_merge(hash, a), b), c), d)
    return _end(at, left, hash + size)
