"""What the blocking and the asyncio client promise alike: pool, time, retries, TLS, transactions."""

import asyncio
import contextlib
import gc
import inspect
import os
import ssl
import threading
import time
import warnings

import pytest
import trustme
from fake_server import FakeServer, honest

import imds
import imds.asyncio
from imds.protocol import ERROR, LIST, MISSING, OK, U32, encode_list, encode_response
from imds.session import parse_url


class Kind:
    """One kind of client; ``ask`` returns what a call gives in the end, whichever kind it is of."""

    def __init__(self, client):
        self.client = client
        self.loop = asyncio.new_event_loop()

    def ask(self, call):
        if inspect.iscoroutine(call):
            return self.loop.run_until_complete(call)
        return call

    @contextlib.contextmanager
    def block(self, manager):
        names = ("__aenter__", "__aexit__") if hasattr(manager, "__aenter__") else ("__enter__", "__exit__")
        enter, leave = (getattr(manager, name) for name in names)
        value = self.ask(enter())
        try:
            yield value
        except BaseException as error:
            self.ask(leave(type(error), error, None))
            raise
        self.ask(leave(None, None, None))


@pytest.fixture(params=[imds.Client, imds.asyncio.Client], ids=["blocking", "asyncio"])
def kind(request):
    kind = Kind(request.param)
    yield kind
    kind.loop.run_until_complete(asyncio.sleep(0))
    kind.loop.close()


@contextlib.contextmanager
def against(kind, *scripts, tls=None, **options):
    serve = lambda peer: scripts[min(peer.number, len(scripts) - 1)](peer)  # noqa: E731
    with FakeServer(serve, tls=tls) as server:
        client = kind.client(port=server.port, **options)
        yield client
        kind.ask(client.close())


def answering(*replies):
    """Answer requests by these, one after the other, then wait for the end."""

    def serve(peer):
        for reply in replies:
            if peer.read() is None:
                return
            peer.send(encode_response(*reply))
        while peer.read() is not None:
            pass

    return serve


def ending(peer):
    peer.read()


class TestTime:
    def test_no_reply(self, kind):
        with against(kind, answering(), honest(), timeout=0.2) as client:
            with pytest.raises(imds.TimeoutError, match=r"no reply in 0\.2 s"):
                kind.ask(client.get("a"))
            client.timeout = 5
            assert kind.ask(client.get("a")) is None
            assert client.connects == 2

    def test_retries_end_with_the_deadline(self, kind):
        again = answering(*[(ERROR, b"RETRY x")] * 100)
        with against(kind, again, timeout=0.3, retries=100) as client:
            start = time.monotonic()
            with pytest.raises((imds.TryAgainError, imds.TimeoutError)):
                kind.ask(client.incr("a"))
            assert time.monotonic() - start < 2

    def test_a_blocking_command_has_its_wait_beside_the_timeout(self, kind):
        def slow(peer):
            assert peer.read() == [b"bzpopmin", b"q", b"0.3"]
            time.sleep(0.3)
            peer.reply(encode_list([b"q", b"m", b"1.5"]), LIST)
            peer.read()

        with against(kind, slow, timeout=0.2) as client:
            assert kind.ask(client.bzpopmin("q", wait=0.3)) == (b"q", b"m", 1.5)

    def test_there_is_one_unless_it_is_taken_away(self, kind):
        assert 0 < kind.client().timeout < 60
        assert kind.client(timeout=None).timeout is None

    def test_a_call_that_is_sent_again_has_only_the_time_that_is_left(self, kind):
        def late(peer):
            peer.read()
            time.sleep(0.6)  # then hang up

        with against(kind, late, timeout=1.0, retries=5) as client, pytest.raises(imds.TimeoutError):
            kind.ask(client.get("a"))


class TestRetries:
    @pytest.mark.parametrize("code", [b"RETRY", b"SHARDDOWN", b"LOADING", b"BUSY"])
    def test_what_was_surely_not_done_is_sent_again(self, kind, code):
        with against(kind, answering((ERROR, code + b" x"), (OK, b"7"))) as client:
            assert kind.ask(client.incr("a")) == 7

    def test_what_reads_is_sent_again_over_a_new_connection(self, kind):
        with against(kind, ending, answering((ERROR, b"UNKNOWN x"), (OK, b"v"))) as client:
            assert kind.ask(client.get("a")) == b"v"
            assert client.connects == 2

    def test_what_may_have_been_done_is_not(self, kind):
        with against(kind, ending, answering((ERROR, b"UNKNOWN x"), (OK, b"7"))) as client:
            with pytest.raises(imds.ConnectionError, match="closed the connection"):
                kind.ask(client.incr("a"))
            with pytest.raises(imds.OutcomeUnknownError):
                kind.ask(client.incr("a"))

    def test_no_more_often_than_asked(self, kind):
        with against(kind, answering(*[(ERROR, b"RETRY x")] * 2, (OK, b"v")), retries=1) as client:
            with pytest.raises(imds.TryAgainError):
                kind.ask(client.get("a"))
            assert kind.ask(client.get("a")) == b"v"

    def test_errors_of_the_request_are_not_repeated(self, kind):
        script = answering((ERROR, b"WRONGTYPE x"), (OK, b"v"))
        with against(kind, script) as client, pytest.raises(imds.WrongTypeError):
            kind.ask(client.get("a"))

    def test_raw_commands_and_pipelines_are_sent_once(self, kind):
        with against(kind, answering((ERROR, b"RETRY x"), (ERROR, b"RETRY x"))) as client:
            assert kind.ask(client.execute("get", "a")) == (ERROR, b"RETRY x")
            with pytest.raises(imds.TryAgainError):
                kind.ask(client.pipeline().get("a").execute())

    def test_waits_are_random_and_bounded(self):
        options = imds.session.Options(retries=50)
        error = imds.TryAgainError("RETRY x")
        waits = [options.pause(error, attempt, False) for attempt in range(50)]
        assert all(0 <= wait <= min(1, 0.05 * 2**n) for n, wait in enumerate(waits))
        assert len(set(waits)) == 50
        assert options.pause(error, 50, True) is None
        assert options.pause(imds.TimeoutError("x"), 0, True) is None


class TestGreeting:
    def test_password_and_name_come_first(self, kind):
        seen = []

        def serve(peer):
            while tokens := peer.read():
                seen.append(tokens)
                peer.reply(b"OK")

        with against(kind, serve, user="ada", password="secret", name="tests") as client:
            assert kind.ask(client.get("a")) == b"OK"
            assert kind.ask(client.get("a")) == b"OK"
        greeting = [[b"auth", b"ada", b"secret"], [b"client", b"setname", b"tests"]]
        assert seen == [*greeting, [b"get", b"a"], [b"get", b"a"]]

    def test_a_refusal_is_raised_and_nothing_else_sent(self, kind):
        with against(kind, answering((ERROR, b"NOAUTH wrong password")), password="x", retries=0) as client:
            with pytest.raises(imds.ServerError, match="NOAUTH"):
                kind.ask(client.get("a"))
            assert client.connects == 0


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def server_side(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


class TestTls:
    def test_commands_and_long_pipelines(self, kind, authority, server_side):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with against(kind, honest(), tls=server_side, ssl=context) as client:
            value = bytes(range(256)) * 8
            for _ in range(3):
                kind.ask(client.set("a", value))
                assert kind.ask(client.get("a")) == value
            pipe = client.pipeline()
            for _ in range(500):
                pipe.set("b", value).get("b")
            assert kind.ask(pipe.execute()) == [True, value] * 500
            assert client.connects == 1

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_a_forked_process_says_no_word_on_its_parents_connection(self, authority, server_side):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with (
            FakeServer(honest(), tls=server_side) as server,
            imds.Client(port=server.port, ssl=context) as client,
        ):
            client.set("a", 1)
            child = os.fork()
            if child == 0:
                os._exit(len(client._pool._all))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert client.get("a") == b"1"
            assert client.connects == 1

    def test_an_unknown_authority_is_refused(self, kind, server_side):
        context = ssl.create_default_context()
        with (
            against(kind, honest(), tls=server_side, ssl=context, retries=0) as client,
            pytest.raises(imds.ConnectionError, match=r"(?i)cannot connect.*certificate"),
        ):
            kind.ask(client.get("a"))


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "options"),
        [
            ("imds://", {"host": "127.0.0.1", "port": 6677}),
            (
                "imds://h:1?timeout=1.5&retries=0&name=n",
                {"host": "h", "port": 1, "timeout": 1.5, "retries": 0, "name": "n"},
            ),
            ("imds://:p%40w@[::1]/", {"host": "::1", "port": 6677, "password": "p@w"}),
            ("imds+unix://u:p@/run/a%20b", {"unix": "/run/a b", "user": "u", "password": "p"}),
        ],
    )
    def test_options(self, url, options):
        assert parse_url(url) == options

    def test_tls(self):
        options = parse_url("imdss://h")
        assert options["ssl"].verify_mode is ssl.CERT_REQUIRED
        assert options["ssl"].check_hostname

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "h:1",
            "redis://h",
            "imds://h/0",
            "imds://h?colour=red",
            "imds://h?retries=x",
            "imds+unix://h/p",
            "imds+unix://",
        ],
    )
    def test_what_is_wrong(self, url):
        with pytest.raises(ValueError):
            parse_url(url)

    def test_clients(self, kind, tmp_path):
        path = tmp_path / "s"
        with FakeServer(honest(), unix=str(path)):
            client = kind.client.from_url(f"imds+unix://{path}?timeout=2", encoding="utf-8")
            assert client.timeout == 2
            kind.ask(client.set("a", "é"))
            assert kind.ask(client.get("a")) == "é"
            kind.ask(client.close())

    @pytest.mark.parametrize(
        "options", [{"timeout": 0}, {"max_connections": 0}, {"retries": -1}, {"user": "u"}]
    )
    def test_options_have_rules(self, kind, options):
        with pytest.raises(ValueError):
            kind.client(**options)


def transacting(result, *immediate):
    """Answer watch, then ``immediate``, then a transaction of one command by ``result``."""

    def serve(peer):
        peer.log = []
        replies = iter([(OK, b"OK"), *immediate, (OK, b"OK"), (OK, b"QUEUED"), result, (OK, b"OK")])
        while tokens := peer.read():
            seen.append(b" ".join(tokens))
            peer.send(encode_response(*next(replies)))

    seen = []
    return serve, seen


def carried_out(*replies):
    return LIST, encode_list(U32.pack(status) + payload for status, payload in replies)


class TestTransactions:
    def test_watched(self, kind):
        serve, seen = transacting(carried_out((OK, b"4")), (OK, b"5"))
        with against(kind, serve) as client:
            with kind.block(client.transaction("a")) as transaction:
                assert kind.ask(transaction.now.get("a")) == b"5"
                transaction.decr("a")
                assert kind.ask(transaction.execute()) == [4]
                with pytest.raises(RuntimeError):
                    _ = transaction.now
            assert seen == [b"watch a", b"get a", b"multi", b"decr a", b"exec"]
            assert client.connects == 1

    def test_somebody_was_faster(self, kind):
        serve, _ = transacting((MISSING, b""))
        with against(kind, serve) as client:
            transaction = client.transaction("a")
            with pytest.raises(imds.WatchError), kind.block(transaction):
                transaction.set("a", 1)

    def test_an_error_inside_leaves_the_others(self, kind):
        script = answering(
            (OK, b"OK"), (OK, b"QUEUED"), (OK, b"QUEUED"), carried_out((ERROR, b"ERR x"), (OK, b"2"))
        )
        with against(kind, script) as client:
            pipe = client.transaction().incr("a").incr("b")
            found = kind.ask(pipe.execute(raise_on_error=False))
            assert isinstance(found[0], imds.ServerError)
            assert found[1] == 2

    def test_what_was_not_queued_says_why(self, kind):
        script = answering((OK, b"OK"), (ERROR, b"ERR wrong number of arguments"), (ERROR, b"EXECABORT x"))
        with against(kind, script) as client, pytest.raises(imds.ServerError, match="wrong number"):
            kind.ask(client.transaction().incr("a").execute())

    def test_left_without_executing_nothing_is_watched(self, kind):
        seen = []

        def serve(peer):
            while tokens := peer.read():
                seen.append(tokens[0])
                peer.reply(b"OK")

        with against(kind, serve) as client:
            with kind.block(client.transaction("a")):
                pass
            assert seen == [b"watch", b"unwatch"]
            with pytest.raises(ZeroDivisionError), kind.block(client.transaction("a")) as transaction:  # noqa: PT012
                transaction.set("a", 1)
                raise ZeroDivisionError
            kind.ask(client.get("a"))
            assert seen == [b"watch", b"unwatch", b"watch", b"get"]
            assert client.connects == 2


class TestPool:
    def test_threads_share_no_more_than_there_may_be(self):
        wrong = []

        def one(client, name):
            for number in range(20):
                client.set(name, number)
                if client.get(name) != b"%d" % number:
                    wrong.append(name)

        with FakeServer(honest()) as server, imds.Client(port=server.port, max_connections=3) as client:
            threads = [threading.Thread(target=one, args=(client, f"t{n}")) for n in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            assert 1 <= client.connects <= 3

    def test_waiting_for_a_connection_has_a_timeout(self):
        asked, go = threading.Event(), threading.Event()

        def hold(peer):
            peer.read()
            asked.set()
            go.wait(10)
            peer.reply(b"1")
            peer.read()

        with FakeServer(hold) as server, imds.Client(port=server.port, max_connections=1) as client:
            thread = threading.Thread(target=client.get, args=("a",))
            thread.start()
            assert asked.wait(10)
            client.timeout = 0.1
            with pytest.raises(imds.TimeoutError, match="no connection was free; all 1 are in use"):
                client.get("a")
            go.set()
            thread.join()
            assert client.connects == 1

    def test_tasks_share_no_more_than_there_may_be(self):
        async def work(server):
            async with imds.asyncio.Client(port=server.port, max_connections=3) as client:

                async def one(name):
                    for number in range(20):
                        await client.set(name, number)
                        assert await client.get(name) == b"%d" % number

                await asyncio.gather(*[one(f"t{n}") for n in range(10)])
                return client.connects

        with FakeServer(honest()) as server:
            assert asyncio.run(work(server)) == 3

    def test_a_task_that_waits_for_a_connection_has_a_timeout(self):
        async def work(server):
            async with imds.asyncio.Client(port=server.port, max_connections=1, timeout=5) as client:
                first = asyncio.create_task(client.get("a"))
                await asyncio.sleep(0)  # it has the connection
                client.timeout = 0.1
                with pytest.raises(imds.TimeoutError, match="no connection was free; all 1 are in use"):
                    await client.get("a")
                client.timeout = 5
                go.set()
                assert await first == b"1"
                assert await client.get("a") == b"1"
                assert client.connects == 1

        def hold(peer):
            while peer.read():
                go.wait(10)
                peer.reply(b"1")

        go = threading.Event()
        with FakeServer(hold) as server:
            asyncio.run(work(server))

    def test_a_cancelled_call_discards_its_connection(self):
        def late(peer):
            peer.read()
            peer.read()

        async def work(server):
            async with imds.asyncio.Client(port=server.port, max_connections=1) as client:
                task = asyncio.create_task(client.get("a"))
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await client.get("a") is None
                assert client.connects == 2

        with FakeServer(lambda peer: (late if peer.number == 0 else honest())(peer)) as server:
            asyncio.run(work(server))

    def test_one_client_in_two_loops(self):
        def twice(port):
            client = imds.asyncio.Client(port=port)

            async def work():
                await client.set("a", 1)

            asyncio.run(work())
            asyncio.run(work())
            return client.connects

        with FakeServer(honest()) as server, warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # nobody closes the first loop's connection
            assert twice(server.port) == 2
            gc.collect()

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_a_forked_process_makes_its_own_connection(self):
        with FakeServer(honest()) as server:
            client = imds.asyncio.Client(port=server.port)

            async def work():
                await client.set("a", 1)
                return client._pool.connects

            loop = asyncio.new_event_loop()
            assert loop.run_until_complete(work()) == 1
            child = os.fork()
            if child == 0:  # the loop goes on here; its connection is the parent's
                asyncio.events._set_running_loop(None)
                os._exit(loop.run_until_complete(work()))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
            assert loop.run_until_complete(work()) == 1
            loop.run_until_complete(client.close())
            loop.close()

    def test_a_server_that_came_back_costs_no_error(self, kind):
        def once(peer):
            peer.read()
            peer.reply(b"1")

        with against(kind, once, honest(), retries=0) as client:
            assert kind.ask(client.get("a")) == b"1"
            kind.loop.run_until_complete(asyncio.sleep(0.1))  # the end arrives
            assert kind.ask(client.get("a")) is None


class TestReplies:
    @pytest.mark.parametrize(
        ("call", "reply", "found"),
        [
            (lambda c: c.delete("a", "b"), (OK, b"2"), 2),
            (lambda c: c.mget("a", "b"), (LIST, encode_list([b"1", None])), [b"1", None]),
            (lambda c: c.zmscore("z", "a", "b"), (LIST, encode_list([b"1.5", None])), [1.5, None]),
            (lambda c: c.zrangebyscore("z"), (LIST, encode_list([b"a,1.0:b", b"2.0"])), [(b"a,1.0:b", 2.0)]),
            (lambda c: c.scan(), (LIST, encode_list([b"1:7", b"a"])), ("1:7", [b"a"])),
            (
                lambda c: c.zscan("z"),
                (LIST, encode_list([b"0", b"m", b"inf"])),
                ("0", [(b"m", float("inf"))]),
            ),
            (lambda c: c.config_get("*"), (LIST, encode_list([b"port", b"1"])), {"port": b"1"}),
            (lambda c: c.time(), (LIST, encode_list([b"5", b"6"])), (5, 6)),
            (lambda c: c.set("a", 1, nx=True), (MISSING, b""), False),
            (lambda c: c.zscore("z", "a"), (MISSING, b""), None),
            (lambda c: c.expire("a", 5), (OK, b"1"), True),
            (lambda c: c.bzpopmin("q", wait=1), (MISSING, b""), None),
        ],
    )
    def test_read(self, kind, call, reply, found):
        with against(kind, answering(reply)) as client:
            assert kind.ask(call(client)) == found

    @pytest.mark.parametrize(
        ("call", "reply"),
        [
            (lambda c: c.incr("a"), (OK, b"x")),
            (lambda c: c.incr("a"), (MISSING, b"")),
            (lambda c: c.zscore("z", "a"), (OK, b"x")),
            (lambda c: c.keys(), (LIST, encode_list([None]))),
            (lambda c: c.zrangebyscore("z"), (LIST, encode_list([b"a"]))),
            (lambda c: c.scan(), (LIST, encode_list([]))),
            (lambda c: c.time(), (LIST, encode_list([b"1"]))),
            (lambda c: c.bzpopmin("q", wait=1), (LIST, encode_list([b"q"]))),
            (lambda c: c.config_get("*"), (LIST, encode_list([b"port"]))),
        ],
    )
    def test_what_does_not_answer_the_command(self, kind, call, reply):
        with against(kind, answering(reply)) as client, pytest.raises(imds.ImdsError) as caught:
            kind.ask(call(client))
        assert type(caught.value) is imds.ImdsError


@pytest.mark.parametrize(
    ("iterate", "asked", "found"),
    [
        (
            lambda client: client.scan_iter(match="k*", count=7, type="string"),
            ["scan", "0", "match", "k*", "count", "7", "type", "string"],
            [b"a", b"1.0", b"b", b"2.5"],
        ),
        (
            lambda client: client.zscan_iter("z", match="k*", count=7),
            ["zscan", "z", "0", "match", "k*", "count", "7"],
            [(b"a", 1.0), (b"b", 2.5)],
        ),
    ],
    ids=["keys", "members"],
)
def test_scans_go_on_to_the_end(kind, iterate, asked, found):
    """Each page is asked for by the cursor of the page before; an empty one is not the end."""
    pages = {b"0": [b"1:0", b"a", b"1.0"], b"1:0": [b"1:9"], b"1:9": [b"0", b"b", b"2.5"]}
    expected = [word.encode() for word in asked]
    place = expected.index(b"0")

    def serve(peer):
        while tokens := peer.read():
            cursor, tokens[place] = tokens[place], b"0"
            assert tokens == expected
            peer.reply(encode_list(pages[cursor]), LIST)

    async def collect(iterator):
        return [each async for each in iterator]

    with against(kind, serve) as client:
        iterator = iterate(client)
        assert (kind.ask(collect(iterator)) if hasattr(iterator, "__aiter__") else list(iterator)) == found


def test_on_a_real_server(kind):
    with imds.serve(shards=2) as server:
        client = kind.client.from_url(server.url)
        pipe = client.pipeline()
        for number in range(2000):
            pipe.set(f"k{number}", number)
        assert kind.ask(pipe.execute()) == [True] * 2000
        assert kind.ask(client.get("k1999")) == b"1999"
        assert kind.ask(client.zadd("z", 1, "m"))
        assert kind.ask(client.zrange("z")) == [(b"m", 1.0)]
        assert sum(row["keys"] for row in kind.ask(client.stats())) == 2001
        kind.ask(client.close())
