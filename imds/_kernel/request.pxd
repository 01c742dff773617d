"""A request: a frame of ``imds/protocol.py``, its first tokens found; what their text says; and frames made of tokens."""

from libc.limits cimport LLONG_MAX
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from imds._kernel.memory cimport get_u32, set_u32
from imds._kernel.table cimport Item

cdef enum:
    MOST_TOKENS = 5  # that are found ahead of the command; others are looked for when it runs

ctypedef struct Token:
    const uint8_t *at
    size_t size

ctypedef struct Request:
    const uint8_t *frame     # NULL: malformed
    size_t size
    uint32_t count
    Token tokens[MOST_TOKENS]
    uint64_t hash            # of the key, if there are two tokens or more
    Item *entry              # where the key was found ahead of time, or NULL: a hint
    uint64_t member_hash     # of a member whose chain has been fetched, or 0


cdef inline const uint8_t *parse(const uint8_t *at, const uint8_t *end, Request *request) noexcept nogil:
    """Find the tokens of the request at ``at``; return where it ends, or NULL if it ends behind ``end``."""
    cdef uint32_t i
    cdef size_t size
    request.frame = NULL
    if at == NULL or end - at < 4:
        return NULL
    cdef const uint8_t *start = at
    request.count = get_u32(at)
    at += 4
    for i in range(request.count):
        if end - at < 4:
            return NULL
        size = get_u32(at)
        at += 4
        if <size_t>(end - at) < size:
            return NULL
        if i < MOST_TOKENS:
            request.tokens[i].at = at
            request.tokens[i].size = size
        at += size
    request.frame = start
    request.size = <size_t>(at - start)
    return at


cdef inline void skip(Token *token) noexcept nogil:
    """Move to the next token of a frame that has one."""
    token.at += token.size
    token.size = get_u32(token.at)
    token.at += 4


cdef inline Token token_of(bytes text):
    """Return the bytes object's content, which lives as long as that does."""
    return Token(<const uint8_t *><char *>text, <size_t>len(text))


cdef inline bint read_number(const Token *text, uint64_t most, uint64_t *number) noexcept nogil:
    """Read a decimal number up to ``most``, without leading zeros; False if it is none."""
    cdef size_t i
    cdef uint64_t value = 0
    if text.size == 0 or text.size > 19 or (text.at[0] == c'0' and text.size > 1):
        return False
    for i in range(text.size):
        if not c'0' <= text.at[i] <= c'9':
            return False
        value = 10 * value + (text.at[i] - c'0')
    number[0] = value
    return value <= most


cdef inline bint read_integer(const Token *text, int64_t *number) noexcept nogil:
    """Read a 64-bit integer as imds/shard/arguments.py does: no sign but ``-``, no leading zero; False if it is none."""
    cdef Token digits = text[0]
    cdef uint64_t value
    cdef bint negative = text.size > 0 and text.at[0] == c'-'
    if negative:
        digits.at += 1
        digits.size -= 1
    if not read_number(&digits, <uint64_t>LLONG_MAX + negative, &value) or (negative and value == 0):
        return False
    number[0] = <int64_t>(0 - value) if negative else <int64_t>value
    return True


cdef inline bint is_word(const Token *text, const char *word) noexcept nogil:
    """Whether the token is ``word``, which is in small letters, in any case."""
    cdef size_t i
    for i in range(text.size):
        if word[i] == 0 or text.at[i] | 0x20 != <uint8_t>word[i]:
            return False
    return word[text.size] == 0


cdef inline bint is_lower(const Token *name) noexcept nogil:
    """Whether a name, which is letters, has no capital."""
    cdef uint8_t all = 0x20
    cdef size_t i
    for i in range(name.size):
        all &= name.at[i]
    return all != 0


cdef inline uint8_t *put_token(uint8_t *at, const void *data, size_t size) noexcept nogil:
    set_u32(at, <uint32_t>size)
    if size:
        memcpy(at + 4, data, size)
    return at + 4 + size


cdef inline size_t put_frame(
    uint8_t *start,
    const char *name,
    size_t size,
    uint32_t count,
    const Token *key,
    const Token *second,
    const Token *third,
) noexcept nogil:
    """Write the frame of ``count`` tokens, the name among them, the last ones NULL if there are fewer; return its size."""
    cdef uint8_t *at
    set_u32(start, count)
    at = put_token(put_token(start + 4, name, size), key.at, key.size)
    if second != NULL:
        at = put_token(at, second.at, second.size)
    if third != NULL:
        at = put_token(at, third.at, third.size)
    return <size_t>(at - start)
