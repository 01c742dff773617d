"""The typed methods against the table of commands."""

import inspect
from pathlib import Path

import mypy.api
import pytest

import imds.asyncio
from imds import Client
from imds.commands import COMMANDS
from imds.methods import AllCommands, DataCommands
from imds.protocol import decode_request
from imds.replies import ReplyReader, to_frame
from imds.session import TransactionQueue

# Commands of a connection, which a client with several has no methods for.
BY_OTHER_MEANS = {
    "auth": "the option password",
    "hello": "the protocol has one version",
    "select": "there is one database",
    "quit": "close()",
    "multi": "transaction()",
    "exec": "transaction()",
    "discard": "transaction()",
    "watch": "transaction()",
    "unwatch": "transaction()",
}


def methods():
    found = inspect.getmembers(AllCommands, inspect.isfunction)
    return [(name, method) for name, method in found if not name.startswith("_")]


class Recorder(AllCommands):
    """Its methods return their request."""

    _reader = ReplyReader(None)

    def _run(self, request):
        return request


def example(parameter):
    """Return a value that the parameter's annotation allows."""
    annotation = str(parameter.annotation)
    if annotation in ("Scores", "Values"):
        return {"m": 1.0}
    if annotation in ("int", "float"):
        return 1
    assert annotation in ("Token", "str"), f"{parameter} has a type that this test does not know"
    return "1"


def requests_of(method):
    """Yield a request with as little as possible, and one with all that is optional."""
    parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    least = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for chosen in (least, parameters):
        positional, named = [], {}
        for parameter in chosen:
            if parameter.default is not parameter.empty and parameter.default is not None:
                value = not parameter.default if isinstance(parameter.default, bool) else parameter.default
            elif parameter.default is None:
                value = {"Sequence[float] | None": [1.0]}.get(str(parameter.annotation), 1)
            else:
                value = example(parameter)
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        yield method(Recorder(), *positional, **named)


def tokens_of(request):
    tokens, _ = decode_request(to_frame(request.tokens))
    return tokens


def test_every_command_has_a_method():
    have = {tokens_of(request)[0].decode() for _, method in methods() for request in requests_of(method)}
    assert set(COMMANDS) - have - set(BY_OTHER_MEANS) == set()


def methods_of_the_table():
    """Return the methods whose command, or whose form of a frozen command, this server has.

    The others are answered by an error that says so.
    """
    found = []
    for name, method in methods():
        command = COMMANDS.get(tokens_of(next(requests_of(method)))[0].decode())
        longer = name in ("set_get", "zadd_many", "zadd_incr")
        if command and not (longer and command.min_tokens == command.max_tokens):
            found.append((name, method))
    return found


@pytest.mark.parametrize(("name", "method"), methods_of_the_table())
def test_requests_are_as_the_table_wants_them(name, method):
    least, most = requests_of(method)
    command = COMMANDS[tokens_of(least)[0].decode()]
    assert command.arity_ok(len(tokens_of(least)))
    if name not in ("set", "set_get", "getex", "zadd_many", "zadd_incr"):  # their options exclude each other
        assert command.arity_ok(len(tokens_of(most)))
    if name not in ("touch", "getset"):
        assert least.repeatable <= (not command.write or name in REPEATABLE_WRITES)


REPEATABLE_WRITES = {"set", "setex", "psetex", "setrange", "mset", "zadd"}


@pytest.mark.parametrize(("name", "method"), methods())
def test_methods_are_documented_and_typed(name, method):
    assert method.__doc__
    kind = inspect.signature(method).return_annotation
    assert kind.startswith("Request[")


def test_kinds_of_clients_have_the_same_methods():
    names = {name for name, _ in methods()}
    for kind in (Client, imds.asyncio.Client, imds.Pipeline, imds.asyncio.Pipeline):
        assert all(getattr(kind, name) is getattr(AllCommands, name) for name in names)
    for kind in (imds.Transaction, imds.asyncio.Transaction, TransactionQueue):
        assert issubclass(kind, DataCommands)
        assert not hasattr(kind, "stats")


def test_a_plain_set_may_be_repeated_and_no_other():
    recorder = Recorder()
    assert recorder.set("k", 1, ex=5).repeatable
    assert not recorder.set("k", 1, nx=True).repeatable
    assert not recorder.set("k", 1, xx=True).repeatable
    assert not recorder.set_get("k", 1).repeatable
    assert not recorder.incr("k").repeatable


def test_one_pair_is_counted_like_many():
    """The frozen form of zadd answers OK; the second pair makes it answer a number."""
    assert tokens_of(Recorder().zadd_many("k", {"m": 1})) == [b"zadd", b"k", b"1", b"m", b"1", b"m"]
    assert tokens_of(Recorder().zadd_many("k", {"m": 1}, ch=True)) == [b"zadd", b"k", b"ch", b"1", b"m"]


TYPED = """
from typing import assert_type
import imds, imds.asyncio

def blocking(b: imds.Client[bytes], s: imds.Client[str]) -> None:
    assert_type(b.get("k"), bytes | None)
    assert_type(s.get("k"), str | None)
    assert_type(s.zrangebyscore("k"), list[tuple[str, float]])
    assert_type(b.incr("k"), int)
    assert_type(s.mset({"a": 1, "b": 2}), bool)
    assert_type(b.zadd_many("k", {"m": 1.5}), int)
    assert_type(imds.Client.from_url("imds://h", encoding="utf-8"), imds.Client[str])
    assert_type(imds.Client(), imds.Client[bytes])
    pipe = s.pipeline()
    assert_type(pipe.get("k").zcard("z"), imds.Pipeline[str])
    with s.transaction("k") as transaction:
        assert_type(transaction.now.get("k"), str | None)
        assert_type(transaction.set("k", 1), imds.Transaction[str])

async def awaited(c: imds.asyncio.Client[str]) -> None:
    assert_type(await c.get("k"), str | None)
    assert_type([key async for key in c.scan_iter()], list[str])
    assert_type(c.pipeline().get("k"), imds.asyncio.Pipeline[str])

def wrong(b: imds.Client[bytes]) -> None:
    b.get()  # type: ignore[call-arg]
    b.expire("k", "soon")  # type: ignore[arg-type]
"""


def test_type_checkers_know_what_comes_back(tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    config = str(Path(__file__).parent.parent / "pyproject.toml")
    out, err, code = mypy.api.run(["--config-file", config, "--strict", str(tmp_path / "typed.py")])
    assert code == 0, out + err
