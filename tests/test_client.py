"""The blocking client, against a server that misbehaves on demand."""

import builtins
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from fake_server import SHARD, FakeServer, Peer, announce, honest
from hypothesis import given
from hypothesis import strategies as st
from interrupts import heeded

import imds
from imds import Client
from imds.client import parse_pairs
from imds.pool import Connection
from imds.protocol import ERROR, LIST, MAX_REQUEST, MAX_TOKENS, MISSING, OK, encode_list, encode_response


@pytest.fixture
def server():
    with FakeServer(honest()) as server:
        yield server


@pytest.fixture
def client(server):
    with Client(port=server.port) as client:
        yield client


def serving(*scripts):
    """Return a server that runs one of ``scripts`` for each connection, the last one for all later."""
    return FakeServer(lambda peer: scripts[min(peer.number, len(scripts) - 1)](peer))


@contextmanager
def against(*scripts, **options):
    """Run ``scripts`` as :func:`serving` does, and a client with ``options``, which tries once, for them."""
    options.setdefault("retries", 0)
    with serving(*scripts) as server, Client(port=server.port, **options) as client:
        yield client


def wait_for_end(peer: Peer) -> None:
    """Keep the connection until the client closes it."""
    while peer.sock.recv(65536):
        pass


class TestCommands:
    def test_strings(self, client):
        assert client.get("a") is None
        assert client.set("a", "é\n") is True
        assert client.get(b"a") == "é\n".encode()
        assert client.delete("a") == 1
        assert client.delete("a") == 0

    def test_sorted_sets(self, client):
        assert client.zadd("z", 2, "two") is True
        assert client.zadd("z", 1.5, b"one,half")
        assert client.zadd("z", "inf", "cs:go")
        assert client.zrange("z", 0, 2) == [(b"one,half", 1.5), (b"two", 2.0)]
        assert client.zrange("z") == [(b"one,half", 1.5), (b"two", 2.0), (b"cs:go", float("inf"))]
        assert client.zrange("z", 7, 8) == []
        assert client.zrange_raw("z") == b"1.5:one,half,2.0:two,inf:cs:go"
        assert client.zrange_raw("z", 7, 8) == b""
        assert client.zrank("z", "two") == 1
        assert client.zrank("z", "three") is None
        assert client.zrem("z", "two") == 1
        assert client.zrem("z", "two") == 0

    def test_stats(self, client):
        assert client.stats() == [SHARD]

    def test_text(self, server):
        with Client(port=server.port, encoding="utf-8") as client:
            client.set("a", "é")
            client.zadd("z", 1, "é")
            assert client.get("a") == "é"
            assert client.zrange("z") == [("é", 1.0)]
            client.set("a", b"\xff")
            with pytest.raises(UnicodeDecodeError):
                client.get("a")
            assert client.pipeline().get("a").get("z").execute(raise_on_error=False)[1].code == "WRONGTYPE"

    @pytest.mark.parametrize(
        ("value", "sent"),
        [
            (7, b"7"),
            (1.0, b"1.0"),
            (bytearray(b"x"), b"x"),
            (memoryview(b"x"), b"x"),
            ("", b""),
            (b"\0", b"\0"),
        ],
    )
    def test_tokens(self, client, value, sent):
        client.set("k", value)
        assert client.get("k") == sent

    @pytest.mark.parametrize("value", [None, True, [1], object()])
    def test_what_is_no_token(self, client, value):
        with pytest.raises(TypeError, match="send str, bytes, int or float"):
            client.set("k", value)

    def test_execute_returns_what_came(self, client):
        assert client.execute("set", "k", 5) == (OK, b"OK")
        assert client.execute("get", "none") == (MISSING, b"")
        assert client.execute("nonsense") == (ERROR, b"ERR unknown command")
        reply = client.execute("stats")
        assert reply.status == LIST
        assert len(reply.items()) == 1
        with pytest.raises(imds.ImdsError, match="no list"):
            client.execute("get", "none").items()

    def test_requests_over_the_limits_are_not_sent(self, client):
        with pytest.raises(ValueError, match="0 tokens"):
            client.execute()
        with pytest.raises(ValueError, match=f"{MAX_TOKENS + 1} tokens"):
            client.execute(*[b""] * (MAX_TOKENS + 1))
        with pytest.raises(ValueError, match=f"limit is {MAX_REQUEST}"):
            client.set("k", bytes(MAX_REQUEST))
        assert client.connects == 0

    def test_large_value(self, client):
        value = os.urandom(1 << 20) * 8
        client.set("k", value)
        assert client.get("k") == value
        assert client.connects == 1

    def test_unix_socket(self, tmp_path):
        path = tmp_path / "s"
        with FakeServer(honest(), unix=str(path)), Client(unix=path) as client:
            client.set("a", 1)
            assert client.get("a") == b"1"
            assert str(path) in repr(client)


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("ERR score must be a number", imds.ServerError),
            ("WRONGTYPE x", imds.WrongTypeError),
            ("OOM x", imds.OutOfMemoryError),
            ("LOADING x", imds.TryAgainError),
            ("SHARDDOWN x", imds.TryAgainError),
            ("RETRY x", imds.TryAgainError),
            ("BUSY x", imds.TryAgainError),
            ("UNKNOWN x", imds.OutcomeUnknownError),
            ("TIMEOUT x", imds.OutcomeUnknownError),
            ("READONLY x", imds.ServerError),
            ("NOAUTH x", imds.ServerError),
            ("SOMETHING", imds.ServerError),
        ],
    )
    def test_codes(self, text, kind):
        def serve(peer):
            while peer.read():
                peer.reply(text.encode(), ERROR)

        with against(serve) as client:
            for call in (lambda: client.get("a"), lambda: client.set("a", 1), client.stats):
                with pytest.raises(imds.ServerError) as caught:
                    call()
                assert type(caught.value) is kind
                assert caught.value.code == text.split()[0]
                assert caught.value.message == str(caught.value) == text
            assert client.connects == 1

    def test_kinds(self):
        assert issubclass(imds.ConnectionError, builtins.ConnectionError)
        assert issubclass(imds.TimeoutError, builtins.TimeoutError)
        for name in imds.__all__:
            kind = getattr(imds, name)
            if isinstance(kind, type) and issubclass(kind, Exception):
                assert issubclass(kind, imds.ImdsError)
        error = pickle.loads(pickle.dumps(imds.WrongTypeError("WRONGTYPE x")))
        assert (type(error), error.code) == (imds.WrongTypeError, "WRONGTYPE")

    @pytest.mark.parametrize("status", [LIST, 4, 0xFFFFFFFF])
    def test_status_that_does_not_answer_the_command(self, status):
        def serve(peer):
            peer.read()
            peer.reply(b"", status)

        with against(serve) as client, pytest.raises(imds.ImdsError, match=f"status {status}"):
            client.get("a")

    @pytest.mark.parametrize(
        ("call", "payload", "status"),
        [
            (lambda client: client.zrank("a", "b"), b"first", OK),
            (lambda client: client.zrange("a"), b"first", OK),
            (lambda client: client.stats(), b"\0\0\0\1", LIST),
            (lambda client: client.stats(), encode_list([b"{"]), LIST),
        ],
    )
    def test_payload_that_does_not_answer_the_command(self, call, payload, status):
        def serve(peer):
            peer.read()
            peer.reply(payload, status)

        with against(serve) as client, pytest.raises(imds.ImdsError, match=r"^no |^the reply is no list"):
            call(client)

    def test_nobody_listens(self, free_port, tmp_path):
        client = Client(port=free_port, retries=0)
        with pytest.raises(imds.ConnectionError, match=f"cannot connect to 127.0.0.1:{free_port}: .*refused"):
            client.get("a")
        with pytest.raises(imds.ConnectionError, match="No such file"):
            Client(unix=tmp_path / "none").connect()
        with pytest.raises(imds.ConnectionError, match="too long"):
            Client(unix="/" + "x" * 200).connect()
        with pytest.raises(imds.ConnectionError, match="cannot connect"):
            Client("x" * 70).connect()

    def test_timeout_has_a_rule(self):
        for timeout in (0, -1):
            with pytest.raises(ValueError, match="over 0"):
                Client(timeout=timeout)


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def late(peer):
    """Answer the first request only when the client has given up on it."""
    peer.read()
    wait_for_end(peer)
    peer.reply(b"late")


class TestBrokenConnections:
    """After each of these the next call gets its own reply, on a new connection."""

    @pytest.mark.parametrize(
        ("script", "kind", "message"),
        [
            pytest.param(late, imds.TimeoutError, r"no reply in 0\.2 s", id="no reply"),
            pytest.param(
                lambda peer: (peer.read(), peer.send(encode_response(OK, b"half")[:-1]), wait_for_end(peer)),
                imds.TimeoutError,
                r"no reply in 0\.2 s",
                id="half a reply",
            ),
            pytest.param(lambda peer: peer.read(), imds.ConnectionError, "closed the connection", id="end"),
            pytest.param(
                lambda peer: (peer.read(), peer.send(encode_response(OK, b"half")[:-1])),
                imds.ConnectionError,
                "in the middle of a reply",
                id="half a reply, then the end",
            ),
            pytest.param(
                lambda peer: (
                    peer.read(),
                    peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
                    wait_for_end(peer),
                ),
                imds.ConnectionError,
                "does not speak this protocol",
                id="garbage",
            ),
            pytest.param(
                lambda peer: (peer.read(), peer.send(announce(3)), wait_for_end(peer)),
                imds.ConnectionError,
                "does not speak this protocol",
                id="length too small",
            ),
            pytest.param(
                lambda peer: (peer.read(), peer.send(announce(0xFFFFFFFF)), wait_for_end(peer)),
                imds.ConnectionError,
                "does not speak this protocol",
                id="length too large",
            ),
            pytest.param(
                lambda peer: (peer.read(), peer.send(encode_response(OK, b"x") * 2), wait_for_end(peer)),
                imds.ConnectionError,
                "more than the replies",
                id="a reply too many",
            ),
            pytest.param(
                lambda peer: (peer.read(), peer.send(encode_response(OK, b"x") + b"\0"), wait_for_end(peer)),
                imds.ConnectionError,
                "more than the replies",
                id="a byte too many",
            ),
        ],
    )
    def test_is_not_used_again(self, script, kind, message):
        with against(script, honest(), timeout=0.2) as client:
            with pytest.raises(kind, match=message):
                client.get("a")
            client.timeout = 5
            client.set("a", "right")
            assert client.get("a") == b"right"
            assert client.connects == 2

    def test_reset(self):
        def reset(peer):
            peer.read()
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        with against(reset, honest()) as client:
            with pytest.raises(imds.ConnectionError, match=r"lost the connection to .*reset"):
                client.get("a")
            assert client.get("a") is None

    def test_reply_that_nobody_asked_for(self):
        def eager(peer):
            peer.read()
            peer.reply(b"1")
            asked.wait(5)
            peer.reply(b"stray")
            sent.set()
            assert peer.read() is None, "a request went out on a connection with a stray reply"

        asked, sent = threading.Event(), threading.Event()
        with against(eager, honest()) as client:
            assert client.get("a") == b"1"
            asked.set()
            assert sent.wait(5)
            assert client.get("a") is None
            assert client.connects == 2

    def test_closed_while_idle(self):
        """A server that went away and came back costs no error."""
        ended = threading.Event()

        def one_reply(peer):
            peer.read()
            peer.reply(b"1")
            peer.sock.close()
            ended.set()

        with against(one_reply, honest()) as client:
            assert client.get("a") == b"1"
            assert ended.wait(5)
            assert client.get("a") is None
            assert client.connects == 2

    def test_error_that_comes_before_the_end(self):
        """A refusal is read although the request could not be sent whole, and the connection is left."""

        def refuse(peer):
            peer.sock.recv(100)
            time.sleep(0.1)  # until the buffers between are full
            peer.reply(b"ERR too large", ERROR)
            refused.wait(5)

        refused = threading.Event()
        with against(refuse, honest()) as client:
            with pytest.raises(imds.ServerError, match="ERR too large"):
                client.set("k", bytes(32 << 20))
            assert client.get("k") is None
            refused.set()
            assert client.connects == 2

    def test_error_before_the_end_of_a_connection_that_takes_no_more(self):
        """Sending fails, and the reason is there to be read."""
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.send(encode_response(ERROR, b"ERR too many clients"))
        ours.setblocking(False)
        with ours:
            replies = Connection(ours).exchange(b"request", 1, 5)
        assert replies == [(ERROR, b"ERR too many clients")]

    def test_pipeline_that_ends_after_an_error(self):
        def refuse(peer):
            peer.read()
            peer.reply(b"1")
            peer.reply(b"ERR protocol error: too large", ERROR)

        with against(refuse) as client:
            pipe = client.pipeline().get("a").get("b").get("c")
            with pytest.raises(imds.ConnectionError, match=r"after 2 replies, .* was: ERR protocol error"):
                pipe.execute()

    def test_interrupt(self):
        """A reply to an interrupted call must not become the next call's."""

        def interrupted(peer):
            peer.read()
            os.kill(os.getpid(), signal.SIGINT)
            wait_for_end(peer)

        with heeded(), against(interrupted, honest()) as client:
            with pytest.raises(KeyboardInterrupt):
                client.get("a")
            assert client.get("a") is None
            assert client.connects == 2

    def test_close_and_go_on(self, client):
        client.close()
        client.set("a", 1)
        client.close()
        client.close()
        assert client.get("a") == b"1"
        assert client.connects == 2

    def test_connect_is_lazy_and_once(self, server):
        with Client(port=server.port) as client:
            assert client.connects == 0
            client.connect()
            client.connect()
            client.get("a")
            assert client.connects == 1


class TestTime:
    def test_reply_in_pieces(self):
        def dribble(peer):
            peer.read()
            for byte in encode_response(OK, b"value"):
                peer.send(bytes([byte]))
                time.sleep(0.002)

        with against(dribble) as client:
            assert client.get("a") == b"value"

    def test_pieces_do_not_put_off_the_timeout(self):
        def dribble(peer):
            peer.read()
            peer.send(announce(10_000) + bytes(4))
            while True:
                peer.send(b"x")
                time.sleep(0.02)

        with against(dribble, timeout=0.3) as client, pytest.raises(imds.TimeoutError):
            client.get("a")

    def test_each_reply_of_a_pipeline_has_its_time(self):
        def slow(peer):
            while peer.read():
                time.sleep(0.1)
                peer.reply(b"1")

        with against(slow, timeout=0.5) as client:
            assert client.pipeline().get(1).get(2).get(3).get(4).get(5).get(6).get(7).execute() == [b"1"] * 7

    def test_connect_has_a_timeout(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)  # Linux queues one more than told, and leaves the next without an answer
            with socket.create_connection(listener.getsockname()):
                client = Client(*listener.getsockname(), timeout=0.2)
                with pytest.raises(imds.TimeoutError, match=r"cannot connect .* timed out"):
                    client.connect()

    def test_for_ever(self, server):
        with Client(port=server.port, timeout=None) as client:
            assert client.get("a") is None


class TestPipelines:
    def test_results_in_order(self, client):
        pipe = client.pipeline()
        pipe.set("a", 1).get("a").get("none").delete("a").delete("a")
        pipe.zadd("z", 2, "m").zrange("z").zrange_raw("z").zrank("z", "m").zrem("z", "m").command("get", "a")
        assert len(pipe) == 11
        assert pipe.execute() == [
            *(True, b"1", None, 1, 0),
            *(True, [(b"m", 2.0)], b"2.0:m", 0, 1, (MISSING, b"")),
        ]
        assert len(pipe) == 0
        assert pipe.execute() == []

    def test_first_error_is_raised_after_all_have_run(self, client):
        pipe = client.pipeline().set("a", 1).zadd("a", 1, "m").zadd("b", "x", "m").set("c", 3)
        with pytest.raises(imds.WrongTypeError) as caught:
            pipe.execute()
        assert "command 1" in caught.value.__notes__[0]
        assert client.get("c") == b"3"
        assert len(pipe) == 0

    def test_errors_as_results(self, client):
        results = client.pipeline().set("a", 1).zadd("a", 1, "m").get("a").execute(raise_on_error=False)
        assert results[0] is True
        assert isinstance(results[1], imds.WrongTypeError)
        assert results[2] == b"1"

    def test_block_executes_what_is_left(self, client):
        with client.pipeline() as pipe:
            pipe.set("a", 1)
            assert pipe.execute() == [True]
            pipe.set("b", 2)
        assert client.get("b") == b"2"
        with pytest.raises(imds.WrongTypeError), client.pipeline() as pipe:
            pipe.zrank("a", "m")

    def test_block_that_raises_sends_nothing(self, client):
        pipe = client.pipeline().set("a", 1)
        with pytest.raises(ZeroDivisionError), pipe:
            raise ZeroDivisionError
        assert client.get("a") is None
        assert len(pipe) == 0

    def test_bad_token_leaves_the_queue_right(self, client):
        pipe = client.pipeline().set("a", 1)
        with pytest.raises(TypeError):
            pipe.set("b", None)
        assert pipe.get("a").execute() == [True, b"1"]

    def test_server_that_stops_reading_until_its_replies_are_read(self, tmp_path):
        """More requests and more replies than all buffers hold: sending everything first would never end."""
        count, value = 3000, os.urandom(1000)

        def echo(peer):
            while tokens := peer.read():
                peer.reply(tokens[1] + value)

        with FakeServer(echo, unix=str(tmp_path / "s")), Client(unix=tmp_path / "s") as client:
            pipe = client.pipeline()
            for number in range(count):
                pipe.command("echo", b"%d" % number + value)
            replies = pipe.execute()
            assert [reply.payload for reply in replies] == [b"%d" % n + value * 2 for n in range(count)]
            assert client.connects == 1

    def test_broken_pipeline_is_forgotten(self):
        def three(peer):
            peer.send(encode_response(OK, b"1") * 3)
            peer.read()

        with against(three, honest(), timeout=5) as client:
            pipe = client.pipeline()
            for _ in range(5):
                pipe.set("a", 1)
            with pytest.raises(imds.ConnectionError):
                pipe.execute()
            assert len(pipe) == 0
            assert pipe.get("a").execute() == [None]


class TestSharing:
    def test_threads_get_their_own_replies(self, client):
        wrong = []

        def work(name):
            for number in range(150):
                value = f"{name}-{number}".encode()
                client.set(name, value)
                with client.pipeline() as pipe:
                    results = pipe.get(name).set(name + "!", value).get(name + "!").execute()
                if results != [value, True, value] or client.get(name) != value:
                    wrong.append(results)

        threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert 1 <= client.connects <= 4

    def test_fork_makes_its_own_connection(self):
        """The child's calls go over its own connection, even while another thread is in the middle of one."""
        asked, forked = threading.Event(), threading.Event()

        def hold(peer):
            peer.read()
            asked.set()
            forked.wait(10)
            peer.reply(b"parent's")
            wait_for_end(peer)

        with serving(hold, honest()) as server:
            code = FORKING.format(port=server.port)
            with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
                assert run.stdout.readline() == "child None\n"
                assert asked.is_set()
                forked.set()
                assert run.stdout.read() == 'parent b"parent\'s" 1\n'
            assert run.returncode == 0


# Forks while a thread of the parent waits for a reply and holds the client.
FORKING = """
import os, signal, threading, time
import imds
signal.alarm(10)  # whatever goes wrong, no process is left
client = imds.Client(port={port}, timeout=10)
client.connect()
found = []
thread = threading.Thread(target=lambda: found.append(client.get("a")))
thread.start()
while client._pool._idle:
    time.sleep(0.01)
if os.fork() == 0:
    signal.alarm(10)
    print("child", client.get("a"), flush=True)
    os._exit(0)
os.wait()
thread.join()
print("parent", found[0], client.connects)
"""


class TestParsePairs:
    members = st.binary(max_size=12) | st.lists(
        st.sampled_from([b",", b":", b"1", b".", b"e", b"-", b"\n"])
    ).map(b"".join)

    @given(st.lists(st.tuples(members, st.floats(allow_nan=False)), min_size=1, max_size=6))
    def test_round_trip_or_ambiguous(self, pairs):
        """Wrong only where a member holds a comma, a float and a colon; never for lack of a pair."""
        payload = b",".join(repr(score).encode() + b":" + member for member, score in pairs)
        found = parse_pairs(payload)
        assert b",".join(repr(score).encode() + b":" + member for member, score in found) == payload
        assert len(found) >= len(pairs)
        if not any(b"," in member for member, _ in pairs):
            assert found == pairs

    @pytest.mark.parametrize(
        "score", [0.0, -0.0, 1.0, -2.5, 1e16, 1.5e300, -1e-7, 5e-324, float("inf"), float("-inf")]
    )
    def test_scores(self, score):
        payload = f"{score!r}:a,{score!r}:b".encode()
        assert list(map(repr, parse_pairs(payload))) == [repr((b"a", score)), repr((b"b", score))]

    def test_members_that_look_like_scores(self):
        assert parse_pairs(b"1.0:,2.0:,:,3:x,4.0") == [(b"", 1.0), (b",:,3:x,4.0", 2.0)]

    def test_known_ambiguity(self):
        """``a,9.0:b`` is one member to the server, and two to anyone who reads its reply."""
        assert parse_pairs(b"1.0:a,9.0:b") == [(b"a", 1.0), (b"b", 9.0)]

    @pytest.mark.parametrize("payload", [b"", b"OK", b"1:a", b",1.0:a", b"nan:a", b"\n1.0:a"])
    def test_no_pairs(self, payload):
        with pytest.raises(imds.ImdsError, match="no zrange reply"):
            parse_pairs(payload)


def test_package_does_not_load_the_client_until_asked():
    code = "import imds, sys; print('imds.client' in sys.modules, imds.Client, 'imds.client' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout == "False <class 'imds.client.Client'> True\n"
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        _ = imds.Clint
