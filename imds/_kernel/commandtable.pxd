"""A command's name to its row, for the switch: an open hash table without deletion."""

from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    LONGEST = 32  # bytes of a command's name

ctypedef struct Row:
    uint8_t name[LONGEST]  # in lower case
    size_t size  # of the name; 0: nothing here
    uint32_t least  # tokens
    uint32_t most
    uint32_t first_key
    uint32_t step  # from one key to the next
    uint32_t single  # tokens of a request with one key, which is forwarded as it is; 0: any count is
    bint by_key
    bint write
    int number  # in the switch's list of commands


cdef inline uint8_t lower(uint8_t byte) noexcept nogil:
    return byte + 32 if c"A" <= byte <= c"Z" else byte


cdef inline uint32_t hash_name(const uint8_t *name, size_t size) noexcept nogil:
    """Return a hash of a name, whatever its case (FNV-1a)."""
    cdef uint32_t hash = 2166136261u
    cdef size_t index
    for index in range(size):
        hash = (hash ^ lower(name[index])) * 16777619u
    return hash ^ (hash >> 15)


cdef inline Row *find_row(Row *rows, uint32_t mask, const uint8_t *name, size_t size) noexcept nogil:
    """Return the row of a name in any case, or NULL. ``rows`` has an empty one among its ``mask + 1``."""
    cdef uint32_t at
    cdef size_t index
    cdef Row *row
    if size == 0 or size > LONGEST:
        return NULL
    at = hash_name(name, size) & mask
    while rows[at].size:
        row = &rows[at]
        if row.size == size:
            index = 0
            while index < size and row.name[index] == lower(name[index]):
                index += 1
            if index == size:
                return row
        at = (at + 1) & mask
    return NULL
