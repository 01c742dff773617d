"""What is shown of a reply: text for people, or raw bytes, JSON, CSV for programs.

=====  ==============  ===================================  =======================  ====================
form   a string        a list                               missing                  an error
=====  ==============  ===================================  =======================  ====================
text   quoted if need  a numbered line for each element     ``(nil)``                ``(error) ERR ...``
raw    its bytes       a line for each element              an empty line            on stderr
json   a string        an array                             ``null``                 ``{"error": "..."}``
csv    in quotes       a row of its elements                nothing between commas   on stderr
=====  ==============  ===================================  =======================  ====================

A string that is not UTF-8 is ``{"base64": "..."}`` in JSON; numbers are strings there, since a reply does not
say what is one. The elements of ``exec`` are replies themselves.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from enum import Enum
from typing import Any, TextIO

from imds.client import ImdsError, Response, ServerError
from imds.protocol import ERROR, LIST, MISSING, OK, U32
from imds.shell.line import quote

Value = bytes | ServerError | list["Value"] | None

_RED, _GREY, _BOLD = "31", "90", "1"


class Form(Enum):
    """How replies are written."""

    TEXT = "text"
    RAW = "raw"
    JSON = "json"
    CSV = "csv"


def value(reply: Response, command: bytes = b"") -> Value:
    """Return what a reply to ``command`` says. Raises ImdsError where it is none that is known."""
    if error := reply.error():
        return error
    if reply.status == MISSING:
        return None
    if reply.status == OK:
        return reply.payload
    if reply.status != LIST:
        raise ImdsError(f"a reply of the unknown status {reply.status}")
    items: list[Value] = list(reply.items())
    if command.lower() == b"exec":
        return [_nested(item) if isinstance(item, bytes) else item for item in items]
    return items


def _nested(item: bytes) -> Value:
    if len(item) < 4:
        raise ImdsError("an element of exec that is no reply")
    return value(Response(U32.unpack_from(item)[0], item[4:]))


def render(reply: Response, command: bytes = b"", colour: bool = False) -> str:
    """Return a reply as people read it: one line, or one for each element of a list."""
    if reply.status not in (OK, MISSING, ERROR, LIST):
        return f"(status {reply.status}) {quote(reply.payload)}"
    return _text(value(reply, command), colour)


def _text(shown: Value, colour: bool) -> str:
    if isinstance(shown, bytes):
        return quote(shown)
    if shown is None:
        return paint("(nil)", _GREY, colour)
    if isinstance(shown, ServerError):
        return error_text(quote(shown.message.encode()), colour)
    width = len(str(len(shown)))
    lines = []
    for number, item in enumerate(shown, 1):
        text = _text(item, colour).replace("\n", "\n" + " " * (width + 2))
        lines.append(f"{paint(f'{number:>{width}})', _GREY, colour)} {text}")
    return "\n".join(lines) or paint("(empty list)", _GREY, colour)


def encode(shown: Value, form: Form) -> bytes:
    """Return a value in a form for programs, without the newline at its end."""
    if form is Form.JSON:
        return dump_json(jsonable(shown))
    if form is Form.CSV:
        return csv_row(shown if isinstance(shown, list) else [shown])
    return _raw(shown)


def _raw(shown: Value) -> bytes:
    if isinstance(shown, list):
        return b"\n".join(map(_raw, shown))
    return shown.message.encode() if isinstance(shown, ServerError) else shown or b""


def jsonable(shown: Value) -> Any:
    """Return what json.dumps takes for a value."""
    if isinstance(shown, list):
        return [jsonable(item) for item in shown]
    if isinstance(shown, ServerError):
        return {"error": shown.message}
    if shown is None:
        return None
    try:
        return shown.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(shown).decode()}


def dump_json(shown: Any) -> bytes:
    """Return an object as one line of JSON, in UTF-8."""
    return json.dumps(shown, ensure_ascii=False).encode()


def csv_row(cells: list[Value]) -> bytes:
    """Return a row as RFC 4180 has it; a list within is a cell of JSON."""
    return b",".join(map(_cell, cells))


def _cell(shown: Value) -> bytes:
    if shown is None:
        return b""
    text = dump_json(jsonable(shown)) if isinstance(shown, list) else _raw(shown)
    return b'"' + text.replace(b'"', b'""') + b'"'


# Writing.


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to ``stream``: a terminal, unless NO_COLOR or TERM speak against it."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        return os.isatty(stream.fileno())
    except (OSError, ValueError):
        return False


def paint(text: str, style: str, colour: bool) -> str:
    """Return ``text`` between the escape sequences of ``style``, if there is to be ``colour``."""
    return f"\x1b[{style}m{text}\x1b[0m" if colour else text


def error_text(text: str, colour: bool) -> str:
    """Return ``text`` as errors are shown."""
    return paint(f"(error) {text}", _RED, colour)


def heading(text: str, colour: bool) -> str:
    """Return ``text`` as a heading."""
    return paint(text, _BOLD, colour)


def say(text: str) -> None:
    """Print ``text``, whatever the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def write(data: bytes) -> None:
    """Write bytes to the standard output, after what was printed there."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
