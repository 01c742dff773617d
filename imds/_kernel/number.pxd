"""Scores as text: what ``float()`` reads, without its leniencies, and what ``repr()`` writes.

Most scores are short decimals, and for these a few integer operations are exact: with at most 15 digits both the
digits and the power of ten are doubles without rounding, so that their quotient is the nearest double. Everything
else goes to Python's own routines, which need the GIL.
"""

from cpython.mem cimport PyMem_Free
from libc.math cimport fabs
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memchr, memcpy, strlen

from imds._kernel.memory cimport alloc, free

cdef extern from "Python.h":
    double PyOS_string_to_double(const char *text, char **end, void *overflow) except? -1.0
    char *PyOS_double_to_string(double value, char code, int precision, int flags, int *kind)
    int Py_DTSF_ADD_DOT_0

cdef extern from *:
    """
    static const double TENS[] = {
        1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
    };
    static const char PAIRS[] =
        "0001020304050607080910111213141516171819202122232425262728293031323334353637383940414243444546474849"
        "5051525354555657585960616263646566676869707172737475767778798081828384858687888990919293949596979899";
    """
    const double TENS[16]
    const char PAIRS[201]

cdef enum:
    EXACT_DIGITS = 15
    SCORE_TEXT = 32  # bytes: repr of a double has at most 24


cdef inline bint _read_decimal(const uint8_t *text, size_t size, double *score) noexcept nogil:
    """Read ``[+-]digits[.digits]`` of at most 15 digits; False for anything else, good or bad."""
    cdef size_t i = 0
    cdef int digits = 0, places = -1
    cdef int64_t number = 0
    cdef bint negative = False
    if size and (text[0] == c'-' or text[0] == c'+'):
        negative = text[0] == c'-'
        i = 1
    if size - i > EXACT_DIGITS + 1:
        return False
    while i < size:
        if c'0' <= text[i] <= c'9':
            number = number * 10 + (text[i] - c'0')
            digits += 1
            if places >= 0:
                places += 1
        elif text[i] == c'.' and places < 0:
            places = 0
        else:
            return False
        i += 1
    if digits == 0 or digits > EXACT_DIGITS:
        return False
    score[0] = <double>number
    if places > 0:
        score[0] /= TENS[places]
    if negative and number:
        score[0] = -score[0]
    return True


cdef inline int read_score(const uint8_t *text, size_t size, double *score) except -1:
    """Read a score: 1, or 0 if the text is none. -0.0 becomes 0.0. Raises MemoryError only."""
    cdef char short_text[64]
    cdef char *copy = short_text
    cdef bint good = True
    if _read_decimal(text, size, score):
        return 1
    if size == 0 or memchr(text, 0, size) != NULL:
        return 0
    if size >= sizeof(short_text):
        copy = <char *>alloc(size + 1)
        if copy == NULL:
            raise MemoryError
    memcpy(copy, text, size)
    copy[size] = 0
    try:
        score[0] = PyOS_string_to_double(copy, NULL, NULL) + 0.0
    except ValueError:
        good = False
    finally:
        if copy != short_text:
            free(copy)
    return good and score[0] == score[0]


cdef inline size_t write_digits(uint8_t *to, uint64_t number) noexcept nogil:
    """Write ``number`` in decimal; return how many digits."""
    cdef uint8_t digits[20]
    cdef size_t at = 20
    while number >= 100:
        at -= 2
        memcpy(digits + at, PAIRS + number % 100 * 2, 2)
        number //= 100
    if number >= 10:
        at -= 2
        memcpy(digits + at, PAIRS + number * 2, 2)
    else:
        at -= 1
        digits[at] = c'0' + <uint8_t>number
    memcpy(to, digits + at, 20 - at)
    return 20 - at


cdef inline size_t _write_decimal(uint8_t *to, double score) noexcept nogil:
    """Write a score that is a decimal of at most 15 digits, 3 of them behind the point; 0 for any other."""
    cdef double size = fabs(score)
    cdef uint64_t number
    cdef size_t at = 0
    cdef int places
    if score < 0:
        to[0] = c'-'
        at = 1
    if size < 1e15:
        number = <uint64_t>size
        if <double>number == size:  # mostly
            at += write_digits(to + at, number)
            memcpy(to + at, b".0", 2)
            return at + 2
    if not 1e-3 <= size < 1e12:
        return 0
    for places in range(1, 4):
        number = <uint64_t>(size * TENS[places] + 0.5)
        if <double>number / TENS[places] == size:
            break
    else:
        return 0
    at += write_digits(to + at, number // <uint64_t>TENS[places])
    to[at] = c'.'
    at += 1
    number %= <uint64_t>TENS[places]
    while places:
        places -= 1
        to[at] = c'0' + <uint8_t>(number // <uint64_t>TENS[places] % 10)
        at += 1
    return at


cdef inline size_t write_score(uint8_t *to, double score) except 0:
    """Write ``repr(score)`` into the SCORE_TEXT bytes at ``to``; return its length."""
    cdef size_t size = _write_decimal(to, score)
    cdef char *text
    if size:
        return size
    text = PyOS_double_to_string(score, c'r', 0, Py_DTSF_ADD_DOT_0, NULL)
    if text == NULL:
        raise MemoryError
    size = strlen(text)
    memcpy(to, text, size)
    PyMem_Free(text)
    return size


cdef inline size_t write_integer(uint8_t *to, int64_t number) noexcept nogil:
    """Write the number in decimal, which takes up to 20 bytes; return how many."""
    if number >= 0:
        return write_digits(to, <uint64_t>number)
    to[0] = c'-'
    return 1 + write_digits(to + 1, 0 - <uint64_t>number)
