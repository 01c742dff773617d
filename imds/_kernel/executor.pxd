"""What a shard's links call in C: a batch of requests in, its replies out. The store is one."""

from libc.stdint cimport uint8_t, uint64_t

from imds._kernel.memory cimport Buffer
from imds._kernel.record cimport RecordEncoder


cdef class Executor:
    cdef public RecordEncoder log  # of the effects, until they are committed
    cdef public uint64_t now       # milliseconds since 1970, as requests see it
    cdef Buffer _out

    # Run the whole envelopes at the start of ``data`` and return how many bytes they take; the reply envelopes are in
    # ``_out`` then, which the caller empties. Raises ValueError for an envelope that no router makes, MemoryError.
    cdef size_t run_batch(self, const uint8_t *data, size_t size) except? 0

    # The pending effects are in the file: they stay.
    cpdef commit(self)
