"""What a shard's links call in C; see ``executor.pxd``."""

from libc.stdint cimport uint8_t


cdef class Executor:
    """The base of what executes requests."""

    cdef size_t run_batch(self, const uint8_t *data, size_t size) except? 0:
        raise NotImplementedError

    cpdef commit(self):
        """The pending effects are in the file: they stay."""
        raise NotImplementedError
