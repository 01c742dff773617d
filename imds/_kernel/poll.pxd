"""Waiting for descriptors by epoll(7), where the system has it."""

from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    READ = 1  # as selectors has them
    WRITE = 2

cdef extern from *:
    """
    #include <errno.h>
    #include <time.h>

    #ifdef __linux__
    #include <sys/epoll.h>
    #define HAVE_EPOLL 1
    typedef struct epoll_event PollEvent;
    static inline int poll_wait(int poll, PollEvent *events, int most, int milliseconds) {
        return epoll_wait(poll, events, most, milliseconds);
    }
    static inline int poll_fd(const PollEvent *event) { return event->data.fd; }
    static inline unsigned poll_mask(const PollEvent *event) { return event->events; }
    #else
    #define HAVE_EPOLL 0  /* nothing here is called then */
    #define EPOLLIN 1u
    #define EPOLLOUT 4u
    typedef struct { int fd; } PollEvent;
    static inline int poll_wait(int poll, PollEvent *events, int most, int milliseconds) {
        (void)poll; (void)events; (void)most; (void)milliseconds;
        errno = ENOSYS;
        return -1;
    }
    static inline int poll_fd(const PollEvent *event) { return event->fd; }
    static inline unsigned poll_mask(const PollEvent *event) { (void)event; return 0; }
    #endif

    static inline double poll_clock(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    }

    static inline unsigned long long poll_microseconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        return (unsigned long long)now.tv_sec * 1000000 + (unsigned long long)now.tv_nsec / 1000;
    }
    """
    const bint HAVE_EPOLL
    const uint32_t EPOLLIN, EPOLLOUT
    ctypedef struct PollEvent:
        pass
    int poll_wait(int poll, PollEvent *events, int most, int milliseconds) noexcept nogil
    int poll_fd(const PollEvent *event) noexcept nogil
    uint32_t poll_mask(const PollEvent *event) noexcept nogil
    double poll_clock() noexcept nogil  # time.monotonic()
    uint64_t poll_microseconds() noexcept nogil  # since 1970


cdef inline int poll_milliseconds(object timeout) except -2:
    """Return a timeout in seconds, or None for none, as epoll takes it: rounded up, -1 for none."""
    cdef double wait
    if timeout is None:
        return -1
    wait = timeout
    if wait <= 0:
        return 0
    return <int>(wait * 1000 + 0.999) if wait < 1e6 else 1000000000


cdef inline int poll_gather(int poll, PollEvent *events, int most, int milliseconds) except -1:
    """Wait, without the interpreter's lock; return how many events there are. Raises OSError."""
    cdef int count
    with nogil:
        count = poll_wait(poll, events, most, milliseconds)
    if count >= 0:
        return count
    if errno != EINTR:
        PyErr_SetFromErrno(OSError)
        return -1
    PyErr_CheckSignals()
    return 0


cdef inline int poll_selected(const PollEvent *event) noexcept nogil:
    """Return an event as selectors tells it: an error or the end is something to read and to write."""
    cdef uint32_t mask = poll_mask(event)
    return (READ if mask & ~EPOLLOUT else 0) | (WRITE if mask & ~EPOLLIN else 0)


ctypedef struct Rounds:
    # The time of one turn of a loop: see imds/rounds.py.
    double until
    double turn
    int milliseconds  # that the next round may wait; -1: for ever
    bint first


cdef inline Rounds rounds_begin(int milliseconds, double turn) noexcept nogil:
    return Rounds(poll_clock() + milliseconds * 1e-3, turn, milliseconds, True)


cdef inline bint rounds_go_on(Rounds *rounds) noexcept nogil:
    """After a round: whether there is time for another one."""
    cdef double now = poll_clock()
    if rounds.first:
        rounds.first = False
        if rounds.milliseconds < 0 or rounds.until > now + rounds.turn:
            rounds.until = now + rounds.turn
    if rounds.until <= now:
        return False
    rounds.milliseconds = <int>((rounds.until - now) * 1000 + 0.999)
    return True
