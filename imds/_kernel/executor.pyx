"""What a shard's links call in C; see ``executor.pxd``."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t

from imds._kernel.memory cimport buffer_empty


cdef class Executor:
    """The base of what executes requests."""

    cdef size_t run_batch(self, const uint8_t *data, size_t size) except? 0:
        raise NotImplementedError

    def execute(self, data):
        """Run the whole envelopes in ``data``; return how many bytes they took, and the reply envelopes."""
        cdef Py_buffer view
        cdef size_t used
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            used = self.run_batch(<const uint8_t *>view.buf, <size_t>view.len)
            return used, PyBytes_FromStringAndSize(<const char *>self._out.data, <Py_ssize_t>self._out.size)
        finally:
            PyBuffer_Release(&view)
            buffer_empty(&self._out)

    cpdef commit(self):
        """The pending effects are in the file: they stay."""
        raise NotImplementedError
