"""Replies in each form, and colours."""

import csv
import io
import json
import os
import pty

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds.client import ImdsError, Response
from imds.protocol import ERROR, LIST, MISSING, OK, encode_list, encode_response
from imds.shell.output import Form, csv_row, encode, render, value, wants_colour

BYTES = b'a\xff,"\n'


def many(*items):
    return Response(LIST, encode_list(items))


@pytest.mark.parametrize(
    ("reply", "raw", "as_json", "as_csv"),
    [
        (Response(OK, b"ab"), b"ab", '"ab"', b'"ab"'),
        (Response(OK, b""), b"", '""', b'""'),
        (Response(OK, "ü".encode()), "ü".encode(), '"ü"', '"ü"'.encode()),
        (Response(OK, BYTES), BYTES, '{"base64": "Yf8sIgo="}', b'"a\xff,""\n"'),
        (Response(MISSING, b""), b"", "null", b""),
        (many(), b"", "[]", b""),
        (many(b"a", None, b"b"), b"a\n\nb", '["a", null, "b"]', b'"a",,"b"'),
        (Response(ERROR, b"ERR no"), b"ERR no", '{"error": "ERR no"}', b'"ERR no"'),
    ],
)
def test_forms(reply, raw, as_json, as_csv):
    shown = value(reply)
    assert encode(shown, Form.RAW) == raw
    assert encode(shown, Form.JSON) == as_json.encode()
    assert encode(shown, Form.CSV) == as_csv


def test_replies_within_the_reply_of_exec():
    inner = [
        encode_response(OK, b"OK"),
        encode_response(MISSING),
        encode_response(ERROR, b"ERR no"),
        encode_response(LIST, encode_list([b"a", b"b"])),
    ]
    reply = many(*(frame[4:] for frame in inner))
    assert render(reply, b"EXEC") == "1) OK\n2) (nil)\n3) (error) ERR no\n4) 1) a\n   2) b"
    assert encode(value(reply, b"exec"), Form.JSON) == b'["OK", null, {"error": "ERR no"}, ["a", "b"]]'
    assert encode(value(reply, b"exec"), Form.RAW) == b"OK\n\nERR no\na\nb"
    assert encode(value(reply, b"exec"), Form.CSV) == b'"OK",,"ERR no","[""a"", ""b""]"'
    assert render(many(b"\0\0\0\0OK")) == '1) "\\x00\\x00\\x00\\x00OK"'
    with pytest.raises(ImdsError, match="no reply"):
        render(many(b"OK"), b"exec")


def test_a_status_that_nobody_knows():
    with pytest.raises(ImdsError, match="status 9"):
        value(Response(9, b""))


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=4))
def test_what_is_written_can_be_read(items):
    shown = value(many(*items))
    (row,) = csv.reader(io.StringIO(csv_row(shown).decode("latin-1"), newline=""))
    assert [cell.encode("latin-1") for cell in row] == items
    line = encode(shown, Form.JSON)
    assert b"\n" not in line
    for item, read in zip(items, json.loads(line), strict=True):
        assert isinstance(read, dict) or read.encode() == item


def test_colours_only_on_a_terminal(monkeypatch, tmp_path):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    fd, inner = pty.openpty()
    with open(inner, "w") as terminal, open(tmp_path / "file", "w") as file:
        assert wants_colour(terminal)
        assert not wants_colour(file)
        assert not wants_colour(io.StringIO())
        monkeypatch.setenv("NO_COLOR", "1")
        assert not wants_colour(terminal)
        monkeypatch.setenv("NO_COLOR", "")
        assert wants_colour(terminal)
        for term in ("dumb", None):
            monkeypatch.setenv("TERM", term) if term else monkeypatch.delenv("TERM")
            assert not wants_colour(terminal)
    os.close(fd)
    assert render(Response(ERROR, b"ERR no"), colour=True) == "\x1b[31m(error) ERR no\x1b[0m"
    assert render(many(b"a"), colour=True) == "\x1b[90m1)\x1b[0m a"
