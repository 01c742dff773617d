"""The records of the append-only file: the compiled twin of ``imds/shard/record.py``, which has the picture."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from imds._kernel cimport memory
from imds._kernel.memory cimport Buffer, buffer_empty, buffer_reserve, get_u32, get_u64, set_u32, set_u64
from imds._kernel.xxh64 cimport xxh64 as hash64

from imds.shard import record as _twin

cdef size_t HEADER = 20  # checksum, length, sequence
cdef size_t CHECKSUM = 8
cdef size_t FEW = 8 << 10  # bytes of records that are still in the processor's first cache when they are sealed
cdef uint64_t MAX_EFFECT = _twin.MAX_EFFECT
assert _twin.HEADER.size == HEADER


cdef class RecordEncoder:
    """Collects the records of a batch until the file has taken them."""

    def __init__(self, uint64_t seed, uint64_t sequence=1):
        self.seed = seed
        self.sequence = sequence
        self._mark = sequence
        self._pending.size = 0

    def __dealloc__(self):
        memory.free(self._pending.data)

    cdef bint reserve(self, size_t size) noexcept:
        return buffer_reserve(&self._pending, HEADER + size)

    cdef uint8_t *begin(self) noexcept:
        return self._pending.data + self._pending.size + HEADER

    cdef void end(self, size_t size) noexcept:
        cdef uint8_t *at = self._pending.data + self._pending.size
        set_u32(at + CHECKSUM, <uint32_t>size)
        set_u64(at + CHECKSUM + 4, self.sequence)
        self._pending.size += HEADER + size
        self.sequence += 1
        if self._pending.size - self._sealed > FEW:
            self.seal()

    cdef size_t held(self) noexcept:
        return self._pending.size

    cdef void put(self, const uint8_t *effect, size_t size) noexcept:
        memory.memcpy(self.begin(), effect, size)
        self.end(size)

    cdef void seal(self) noexcept:
        """Write the checksums that are due.

        A checksum is a chain of multiplications which leaves most of the processor idle. One behind the other, those of
        several records are computed at a time.
        """
        cdef uint8_t *at = self._pending.data + self._sealed
        cdef uint8_t *end = self._pending.data + self._pending.size
        cdef size_t size
        while at < end:
            size = HEADER + get_u32(at + CHECKSUM)
            set_u64(at, hash64(at + CHECKSUM, size - CHECKSUM, self.seed))
            at += size
        self._sealed = self._pending.size

    def add(self, effect):
        """Append the record of ``effect``, a request frame."""
        cdef Py_buffer view
        PyObject_GetBuffer(effect, &view, PyBUF_SIMPLE)
        try:
            if <uint64_t>view.len > 0xFFFFFFFF:
                raise OverflowError("an effect of 4 GiB or more")
            if not self.reserve(<size_t>view.len):
                raise MemoryError
            self.put(<const uint8_t *>view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    def copy(self, records):
        """Append records with the effects of ``records``, which are whole."""
        cdef Py_buffer view
        cdef size_t pos = 0, size
        cdef const uint8_t *data
        PyObject_GetBuffer(records, &view, PyBUF_SIMPLE)
        try:
            data = <const uint8_t *>view.buf
            if not buffer_reserve(&self._pending, <size_t>view.len):
                raise MemoryError
            while pos < <size_t>view.len:
                size = get_u32(data + pos + CHECKSUM)
                self.put(data + pos + HEADER, size)
                pos += HEADER + size
        finally:
            PyBuffer_Release(&view)

    def pending(self):
        """Return the records added since the last commit or rollback, back to back."""
        self.seal()
        return PyBytes_FromStringAndSize(<const char *>self._pending.data, <Py_ssize_t>self._pending.size)

    def commit(self):
        """Forget the pending records: they are in the file."""
        buffer_empty(&self._pending)
        self._sealed = 0
        self._mark = self.sequence

    def rollback(self):
        """Forget the pending records and take their sequence numbers back."""
        buffer_empty(&self._pending)
        self._sealed = 0
        self.sequence = self._mark

    def place(self):
        """Return where the next record begins, for join and cut in the same batch."""
        return self._pending.size, self.sequence

    def join(self, tuple place not None):
        """Make one record of all since ``place``; return whether they fit into one: else nothing changes."""
        cdef size_t at = place[0], size, total
        cdef uint64_t first = place[1], records = self.sequence - first
        cdef uint8_t *data = self._pending.data
        cdef uint8_t *to = data + at + HEADER
        if records < 2:
            return True
        total = self._pending.size - at - HEADER * records
        if total > MAX_EFFECT:
            return False
        while at < self._pending.size:
            size = get_u32(data + at + CHECKSUM)
            memory.memmove(to, data + at + HEADER, size)
            to += size
            at += HEADER + size
        self.cut(place)
        self.end(total)
        return True

    def cut(self, tuple place not None):
        """Forget the records since ``place``, and take their sequence numbers back."""
        self._pending.size = place[0]
        self._sealed = min(self._sealed, self._pending.size)
        self.sequence = place[1]


def verify_records(buf, uint64_t seed, uint64_t sequence):
    """Return (records, bytes, damage) for the records at the start of ``buf``, as the twin says."""
    cdef Py_buffer view
    cdef size_t pos = 0, size
    cdef uint64_t length, number, count = 0
    cdef const uint8_t *at
    damage = None
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    try:
        size = <size_t>view.len
        while size - pos >= HEADER:
            at = <const uint8_t *>view.buf + pos
            length = get_u32(at + 8)
            number = get_u64(at + 12)
            if length > MAX_EFFECT:
                damage = f"record length {length} is over the limit of {MAX_EFFECT}"
                break
            if number != sequence:
                damage = f"record has sequence number {number}, expected {sequence}"
                break
            if length > size - pos - HEADER:
                break
            if hash64(at + CHECKSUM, HEADER - CHECKSUM + <size_t>length, seed) != get_u64(at):
                damage = "record does not match its checksum"
                break
            pos += HEADER + <size_t>length
            sequence += 1
            count += 1
    finally:
        PyBuffer_Release(&view)
    return count, pos, damage


def xxh64(data, uint64_t seed=0):
    """For tests: return the hash that the kernels use."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return hash64(<const uint8_t *>view.buf, <size_t>view.len, seed)
    finally:
        PyBuffer_Release(&view)


def alloc_fails_at(size_t n):
    """For tests: make the n-th allocation of this module fail, once; 0 ends it. Return what was left to count."""
    left = memory.alloc_fails_at
    memory.alloc_fails_at = n
    return left
