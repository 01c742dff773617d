"""--hotkeys: shares of the looks, and what a server's order of use tells."""

import json
import random
import threading

import pytest
from fake_server import FakeServer

from imds.protocol import ERROR
from imds.shell.hot import Looks


def test_shares():
    looks = Looks()
    looks.add([b"a", b"x"], [b"a", b"b", b"x"])
    looks.add([b"b", None], [b"b", b"a", b"c"])
    looks.add([b"a"], [b"a", b"b", b"b"])
    assert looks.hottest(3) == [(b"a", 2 / 3, 1.0), (b"b", 1 / 3, 1.0), (b"x", 1 / 3, 1 / 3)]
    assert Looks().hottest(3) == []


def test_the_last_share_estimates_that_of_the_uses():
    """Keys are used by chance, each with its own share; looks at their order find the shares again."""
    dice, looks, order = random.Random(7), Looks(), list(range(20))
    weights = [8, 4, 2] + [1] * 17
    for _ in range(4000):
        for key in dice.choices(range(20), weights, k=5):
            order.remove(key)
            order.insert(0, key)
        names = [b"%d" % key for key in order]
        looks.add(names[:1], names[:5])
    found = {key: last for key, last, _ in looks.hottest(20)}
    for key, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(found[b"%d" % key] - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    assert [key for key, _, _ in looks.hottest(3)] == [b"0", b"1", b"2"]


def test_a_server_at_work(run, real, shared_server):
    with real.pipeline() as pipe:
        for number in range(300):
            pipe.set(f"cold:{number}", "x")
    stop = threading.Event()

    def use():
        with shared_server.client() as client:
            while not stop.is_set():
                client.get("hot")

    real.set("hot", "x")
    user = threading.Thread(target=use)
    user.start()
    try:
        code, out, err = run("--hotkeys", "--json", "--duration", "0.3", "--top", "1")
    finally:
        stop.set()
        user.join()
    found = json.loads(out)
    assert (code, err) == (0, b"")
    assert found["looks"] > 1
    assert found["keys"][0]["recent"] == 1.0
    assert [key["key"] for key in found["keys"]] == ["hot"] or found["keys"][0]["last"] == 1.0


def test_looking_is_no_use(run, real):
    real.set("{t}a", "1")
    real.set("{t}b", "2")
    run("--hotkeys", "--duration", "0.05")
    assert real.execute("recent", "2").items()[:2] == [b"{t}b", b"{t}a"]


def test_for_people_and_tables(run, real):
    real.set("\udcff".encode(errors="surrogateescape"), "1")
    code, out, err = run("--hotkeys", "--duration", "0.05")
    heading, columns, only = out.decode().splitlines()
    assert (code, err, only) == (0, b"", '   100.0%          100.0%  "\\xff"')
    assert columns.split() == ["the", "last", "of", "the", "last", "100"]
    assert heading.endswith("of these each key was in its shard")
    assert run("--hotkeys", "--duration", "0.05", "--csv")[1] == b'"1.000000","1.000000","\xff"\n'


@pytest.mark.parametrize("text", [b"ERR unknown command", b"SHARDDOWN shard 0 is down"])
def test_a_server_that_cannot_tell(run, text):
    def serve(peer):
        while peer.read():
            peer.reply(text, ERROR)

    with FakeServer(serve) as fake:
        found = run("--hotkeys", options=("-p", str(fake.port)))
    assert found == (2, b"", b"imds-cli: %s\n" % text)
