"""recv(2), send(2) and shutdown(2). A peer that is gone is an error of send, never a signal."""

cdef extern from "sys/socket.h" nogil:
    Py_ssize_t recv(int fd, void *data, size_t size, int flags)
    Py_ssize_t send(int fd, const void *data, size_t size, int flags)
    int shutdown(int fd, int how)
    int SHUT_RDWR

cdef extern from *:
    """
    #ifdef MSG_NOSIGNAL
    #define QUIETLY MSG_NOSIGNAL
    #else
    #define QUIETLY 0  /* Python ignores SIGPIPE */
    #endif
    """
    const int QUIETLY
