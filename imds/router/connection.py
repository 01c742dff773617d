"""Commands about a connection: ping, echo, hello, quit, select, auth, client."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

from imds import __version__
from imds._kernel import VARIANT
from imds.protocol import encode_error
from imds.router.replies import (
    DONE,
    NONE,
    NOT_AN_INTEGER,
    SYNTAX_ERROR,
    WRONG_ARITY,
    listed,
    number,
    text,
    unknown_subcommand,
)
from imds.router.request import Handler, Request

if TYPE_CHECKING:
    from imds.router.requests import Requests

PROTOCOL = b"1"  # the only version there is

_PONG = text("PONG")
_NO_DATABASE = encode_error("ERR DB index is out of range")
_NO_PROTOCOL = encode_error("NOPROTO unsupported protocol version")
_NO_PASSWORD = encode_error(
    "ERR AUTH <password> called without any password configured for the default user. "
    "Are you sure your configuration is correct?"
)
_WRONG_PASSWORD = encode_error("WRONGPASS invalid username-password pair or user is disabled.")
_BAD_NAME = encode_error("ERR Client names cannot contain spaces, newlines or special characters.")
_NO_CLIENT = encode_error("ERR No such client")
_INVALID_CLIENT_ID = encode_error("ERR Invalid client ID")
_BAD_CLIENT_ID = encode_error("ERR client-id should be greater than 0")


class ConnectionCommands:
    """The handlers. What is about all connections is answered when every router has answered."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        requests.handlers |= {
            "ping": self._ping,
            "echo": self._echo,
            "hello": self._hello,
            "quit": self._quit,
            "select": self._select,
            "auth": self._auth,
            "client": self._client,
        }
        self._subcommands: dict[bytes, tuple[range, Handler]] = {
            b"id": (range(2, 3), lambda request: number(request.session.number)),
            b"list": (range(2, 99), self._list),
            b"info": (range(2, 3), lambda request: text(self._line(request.client.owner))),
            b"kill": (range(3, 99), self._kill),
            b"setname": (range(3, 4), self._set_name),
            b"getname": (range(2, 3), lambda request: text(name) if (name := request.session.name) else NONE),
        }
        requests.peers.handlers |= {b"list": self._lines, b"kill": self._kill_some, b"count": self._count}

    def _ping(self, request: Request) -> bytes:
        return text(request.tokens[1]) if len(request.tokens) > 1 else _PONG

    def _echo(self, request: Request) -> bytes:
        return text(request.tokens[1])

    def _hello(self, request: Request) -> bytes:
        """``hello [protocol [auth user password] [setname name]]``: who the server is."""
        tokens = request.tokens
        if len(tokens) > 1 and tokens[1] != PROTOCOL:
            return _NO_PROTOCOL
        at = 2
        while at < len(tokens):
            word = tokens[at].lower()
            if word == b"auth" and at + 2 < len(tokens):
                refusal = _check(tokens[at + 1])
                at += 3
            elif word == b"setname" and at + 1 < len(tokens):
                refusal = self._name(request, tokens[at + 1])
                at += 2
            else:
                refusal = SYNTAX_ERROR
            if refusal is not DONE:
                return refusal
        about: dict[str, str | bytes | int] = {
            "server": "imds",
            "version": __version__,
            "proto": PROTOCOL,
            "id": request.session.number,
            "mode": "standalone",
            "role": "master",
            "shards": self._requests.slots.shards,
            "kernels": VARIANT,
        }
        return listed(word for pair in about.items() for word in pair)

    def _quit(self, request: Request) -> bytes:
        request.client.closing = True
        return DONE

    def _select(self, request: Request) -> bytes:
        try:
            index = int(request.tokens[1])
        except ValueError:
            return NOT_AN_INTEGER
        return DONE if index == 0 else _NO_DATABASE

    def _auth(self, request: Request) -> bytes:
        """Without users there is one, who needs no password."""
        return _NO_PASSWORD if len(request.tokens) == 2 else _check(request.tokens[1])

    # -- client -----------------------------------------------------------------------------------

    def _client(self, request: Request) -> bytes | None:
        word = request.tokens[1].lower()
        if word not in self._subcommands:
            return unknown_subcommand("client", word)
        counts, handler = self._subcommands[word]
        return handler(request) if len(request.tokens) in counts else WRONG_ARITY

    def _set_name(self, request: Request) -> bytes:
        return self._name(request, request.tokens[2])

    @staticmethod
    def _name(request: Request, name: bytes) -> bytes:
        if any(not 33 <= byte <= 126 for byte in name):
            return _BAD_NAME
        request.session.name = name
        return DONE

    def _list(self, request: Request) -> bytes | None:
        """``client list [id n ...]``: a line for each connection."""
        words = request.tokens[2:]
        if words and (words[0].lower() != b"id" or len(words) == 1):
            return SYNTAX_ERROR
        if not all(word.isdigit() for word in words[1:]):
            return _INVALID_CLIENT_ID

        def done(parts: list[bytes]) -> None:
            lines = b"".join(parts).splitlines(keepends=True)
            lines.sort(key=lambda line: int(line[len(b"id=") : line.index(b" ")]))
            self._requests.answer(request, text(b"".join(lines)))

        self._requests.peers.ask([b"list", *words[1:]], done)
        return None

    def _lines(self, words: list[bytes]) -> bytes:
        """Return the lines of this router's connections, of all or of those with these numbers."""
        numbers = set(map(int, words))
        chosen = [
            one for one in self._requests.host.connections if not words or one.session.number in numbers
        ]
        return "".join(map(self._line, chosen)).encode()

    def _count(self, _words: list[bytes]) -> bytes:
        """Return how many connections this router has, and how many of them wait."""
        connections = self._requests.host.connections
        return b"%d %d" % (len(connections), sum(one.session.waits is not None for one in connections))

    def _line(self, connection: Any) -> str:
        session, client = connection.session, connection.client
        flags = ("x" if session.queue else "") + ("b" if session.waits else "")
        fields = {
            "id": session.number,
            "addr": address(connection.sock),
            "fd": connection.fd,
            "name": session.name.decode(),
            "age": int(time.monotonic() - session.since),
            "flags": flags or "N",
            "db": 0,
            "multi": len(session.queue.frames) if session.queue else -1,
            "watch": len(session.watched.versions) if session.watched else 0,
            "qbuf": client.held,
            "inflight": client.inflight,
            "router": self._requests.number.decode(),
        }
        return " ".join(f"{name}={value}" for name, value in fields.items()) + "\n"

    def _kill(self, request: Request) -> bytes | None:
        """``client kill addr`` or ``client kill [id n] [addr a] [skipme yes|no]``."""
        words = request.tokens[2:]
        alone = len(words) == 1
        if alone:
            words = [b"addr", *words, b"skipme", b"no"]
        if len(words) % 2:
            return SYNTAX_ERROR
        filters = {name.lower(): value for name, value in zip(words[::2], words[1::2], strict=True)}
        skip = filters.pop(b"skipme", b"yes").lower()
        if skip not in (b"yes", b"no") or not filters.keys() <= {b"id", b"addr"}:
            return SYNTAX_ERROR
        if not filters.get(b"id", b"1").isdigit():
            return _BAD_CLIENT_ID

        def done(parts: list[bytes]) -> None:
            killed = sum(map(int, parts))
            reply = number(killed) if not alone else DONE if killed else _NO_CLIENT
            self._requests.answer(request, reply)

        asker = b"%d" % request.session.number
        self._requests.peers.ask([b"kill", asker, skip, *[x for pair in filters.items() for x in pair]], done)
        return None

    def _kill_some(self, words: list[bytes]) -> bytes:
        """Close this router's connections that match, one's own after the reply; return how many."""
        asker, skip, *rest = words
        filters = dict(zip(rest[::2], rest[1::2], strict=True))
        found = [
            one
            for one in self._requests.host.connections
            if filters.get(b"addr") in (None, address(one.sock).encode())
            and (b"id" not in filters or int(filters[b"id"]) == one.session.number)
            and not (skip == b"yes" and one.session.number == int(asker))
        ]
        for connection in found:
            if connection.session.number == int(asker):
                connection.client.closing = True
            else:
                self._requests.host.drop(connection)
        return b"%d" % len(found)


def _check(user: bytes) -> bytes:
    return DONE if user == b"default" else _WRONG_PASSWORD


def address(sock: socket.socket) -> str:
    """Return where the other end of a connection is, as ``client list`` shows it."""
    try:
        peer = sock.getpeername()
    except OSError:
        return "?"
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host = f"[{peer[0]}]" if sock.family == socket.AF_INET6 else peer[0]
    return f"{host}:{peer[1]}"
