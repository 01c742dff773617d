"""Where a request frame ends: FrameScan of ``imds/protocol.py``, which says what the numbers mean."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from imds._kernel.memory cimport get_u32

cdef enum:
    PART = 0
    WHOLE = 1
    TOO_MANY = 2
    TOO_LONG = 3

ctypedef struct Scan:
    int64_t left  # tokens whose header has not been read; -1: ntokens itself has not
    uint64_t position  # where the next header begins
    uint64_t need  # bytes below which looking again is in vain


cdef inline void scan_reset(Scan *scan) noexcept nogil:
    scan.left = -1
    scan.position = 0
    scan.need = 4


cdef inline int scan_advance(
    Scan *scan, const uint8_t *at, size_t have, uint64_t max_tokens, uint64_t max_request, uint64_t *value
) noexcept nogil:
    """Look on in the frame at ``at``, of which ``have`` bytes are there; WHOLE, PART, TOO_MANY or TOO_LONG.

    ``value`` gets the frame's length, or the count or length that is over the limit.
    """
    cdef int64_t left = scan.left
    cdef uint64_t position = scan.position
    if left < 0:
        if have < 4:
            return PART
        left = get_u32(at)
        if <uint64_t>left > max_tokens:
            value[0] = <uint64_t>left
            return TOO_MANY
        position = 4
    while left and position + 4 <= have:
        position += 4 + <uint64_t>get_u32(at + position)
        left -= 1
        if position > max_request:
            value[0] = position
            return TOO_LONG
    if left or position > have:
        scan.position = position
        scan.left = left
        scan.need = position + 4 if left else position
        return PART
    scan_reset(scan)
    value[0] = position
    return WHOLE
