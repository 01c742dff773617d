from libc.stdint cimport uint8_t, uint64_t

from imds._kernel.memory cimport Buffer


cdef class RecordEncoder:
    cdef readonly uint64_t seed
    cdef readonly uint64_t sequence
    cdef uint64_t _mark
    cdef Buffer _pending
    cdef size_t _sealed  # bytes of it whose records have their checksums

    # The two halves of add(): room for a record with an effect of ``size`` bytes, or False; then the record, which
    # cannot fail. ``begin`` returns where the effect's bytes go, ``end`` is told that they are there; ``put`` does both
    # for bytes that are elsewhere. Checksums wait for ``seal``: call it before ``_pending`` is read.
    cdef bint reserve(self, size_t size) noexcept
    cdef uint8_t *begin(self) noexcept
    cdef void end(self, size_t size) noexcept
    cdef size_t held(self) noexcept  # bytes that are pending
    cdef void put(self, const uint8_t *effect, size_t size) noexcept
    cdef void seal(self) noexcept
