"""A command line to its tokens, and a payload to text that may be typed again."""

from __future__ import annotations

import re

_PIECE = re.compile(
    rb"""(?P<space> \s+ )
       | ' (?P<single> [^']* ) '
       | " (?P<double> (?: [^"\\] | \\. )* ) "
       | \\ (?P<escaped> . )
       | (?P<plain> [^\s'"\\]+ )""",
    re.VERBOSE | re.DOTALL,
)
_SPECIAL = re.compile(rb"""['"\\]""")
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_CONTROLS = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"0": b"\0"}
_NAMES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def split_line(line: bytes) -> list[bytes]:
    """Return the tokens of a command line. Raises ValueError for a quote that is not closed.

    Spaces separate tokens. In single quotes everything is itself; in double quotes ``\\n \\r \\t \\0 \\xNN``
    are bytes, and a backslash before anything else stands for that; outside it makes the next byte plain.
    """
    if _SPECIAL.search(line) is None:  # the most of a bulk load, and ten times as fast
        return line.split()
    tokens: list[bytes] = []
    inside = False  # a token has begun: "a'b c'" is one token, and '' is one too
    pos = 0
    while pos < len(line):
        piece = _PIECE.match(line, pos)
        if piece is None:
            quote = line[pos : pos + 1].decode()
            raise ValueError("nothing follows the last \\" if quote == "\\" else f"no closing {quote}")
        pos = piece.end()
        if piece["space"] is not None:
            inside = False
            continue
        if not inside:
            tokens.append(b"")
            inside = True
        if piece["double"] is not None:
            tokens[-1] += _ESCAPE.sub(_unescape, piece["double"])
        else:
            tokens[-1] += piece[piece.lastgroup or 0]
    return tokens


def _unescape(escape: re.Match[bytes]) -> bytes:
    code = escape[1]
    if len(code) == 3:
        return bytes.fromhex(code[1:].decode())
    if code == b"x":
        raise ValueError("\\x needs two hexadecimal digits")
    return _CONTROLS.get(code, code)


def begun(line: bytes) -> tuple[list[bytes], bytes] | None:
    """Return the whole tokens of a line that is being typed, and its last one, empty after a space.

    None while a quote is open, or an escape: nobody can help there.
    """
    try:
        tokens = split_line(line)
    except ValueError:
        return None
    if not tokens or line[-1:].isspace():
        return tokens, b""
    return tokens[:-1], tokens[-1]


def quote(payload: bytes) -> str:
    """Return ``payload`` as it is if it is plain text, otherwise in double quotes and escaped."""
    text = payload.decode(errors="surrogateescape")
    if text and text.isprintable() and text == text.strip() and text[0] not in '"(':
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """Return ``text``, where bytes that are none are surrogates, in double quotes and escaped."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '\\"':
        return "\\" + char
    if char.isprintable():
        return char
    return _NAMES.get(char) or "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
