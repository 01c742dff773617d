"""What the router answers itself, over shards that are dicts: order, transactions, waiting, dead shards."""

from __future__ import annotations

import json

import pytest
from fleet import Fleet

from imds.commands import COMMANDS
from imds.protocol import encode_request

OK = b"OK"
ABORTED = "EXECABORT Transaction discarded because of previous errors."
CROSS_SLOT = "CROSSSLOT Keys in request don't hash to the same slot"
ARITY = "ERR wrong number of arguments"


def run_of(elements: list[bytes]) -> list[tuple[int, bytes]]:
    """Return what exec's elements say: status and payload of each."""
    return [(int.from_bytes(one[:4], "big"), one[4:]) for one in elements]


class TestConnection:
    def test_small_talk(self, fleet: Fleet) -> None:
        client = fleet.connect()
        assert client.ask("ping", "PING hello", [b"echo", b"\0 \xff"], "ping a b", "echo") == [
            *(b"PONG", b"hello", b"\0 \xff", ARITY, ARITY)
        ]
        assert client.ask("select 0", "select 1", "select x", "select -1") == [
            OK,
            "ERR DB index is out of range",
            "ERR value is not an integer or out of range",
            "ERR DB index is out of range",
        ]
        assert client.ask("auth default secret", "auth other secret") == [
            OK,
            "WRONGPASS invalid username-password pair or user is disabled.",
        ]
        assert client.ask("auth secret")[0].startswith("ERR AUTH <password> called without any password")
        assert client.ask("auth") == ["ERR wrong number of arguments"]

    def test_hello(self, fleet: Fleet) -> None:
        client = fleet.connect()
        for words in ("hello", "hello 1", "hello 1 auth default x setname me"):
            (found,) = client.ask(words)
            about = dict(zip(found[::2], found[1::2], strict=True))
            assert (about[b"server"], about[b"id"], about[b"shards"]) == (b"imds", b"1", b"3")
        assert client.ask("client getname") == [b"me"]
        assert client.ask(
            "hello 3", "hello x", "hello 1 auth nobody x", "hello 1 setname", "hello 1 what"
        ) == [
            *("NOPROTO unsupported protocol version",) * 2,
            "WRONGPASS invalid username-password pair or user is disabled.",
            *("ERR syntax error",) * 2,
        ]

    def test_quit_is_the_last_thing_answered(self, fleet: Fleet) -> None:
        client = fleet.connect()
        assert client.ask("ping", "quit", "ping") == [b"PONG", OK]
        assert client.client.closing

    def test_client(self, fleet: Fleet) -> None:
        one, two = fleet.connect(), fleet.connect()
        assert one.ask("client id", "client getname", "client setname me", "client getname") == [
            *(b"1", None, OK, b"me")
        ]
        assert (
            one.ask([b"client", b"setname", b"a b"], [b"client", b"setname", b"\n"])
            == ["ERR Client names cannot contain spaces, newlines or special characters."] * 2
        )
        assert one.ask([b"client", b"setname", b""], "client id x", "client list no", "client list id x") == [
            OK,
            ARITY,
            "ERR syntax error",
            "ERR Invalid client ID",
        ]
        two.ask("client setname other", "multi", "get k")
        (lines,) = one.ask("CLIENT LIST")
        found = [dict(word.split("=") for word in line.split()) for line in lines.decode().splitlines()]
        assert [(each["id"], each["name"], each["flags"], each["multi"]) for each in found] == [
            ("1", "", "N", "-1"),
            ("2", "other", "x", "1"),
        ]
        assert one.ask("client list id 2 7")[0].decode().split()[0] == "id=2"
        assert one.ask("client info")[0].decode().split()[0] == "id=1"
        assert one.ask("client nonsense")[0].startswith("ERR unknown subcommand 'nonsense'")

    def test_client_kill(self, fleet: Fleet) -> None:
        one, two = fleet.connect(), fleet.connect()
        assert one.ask("client kill 1.2.3.4:5", "client kill id 9", "client kill id x") == [
            *("ERR No such client", b"0", "ERR client-id should be greater than 0")
        ]
        assert one.ask("client kill id", "client kill what 1", "client kill id 1 skipme x") == [
            *("ERR No such client", "ERR syntax error", "ERR syntax error")
        ]
        assert one.ask("client kill id 2") == [b"1"]
        assert two.dropped
        assert one.ask("client kill id 1", "ping") == [b"0", b"PONG"]
        assert one.ask("client kill id 1 skipme no", "ping") == [b"1"], "it is told before it ends"
        assert one.client.closing


class TestServer:
    def test_command(self, fleet: Fleet) -> None:
        client = fleet.connect()
        (names,) = client.ask("command list")
        assert [name.decode() for name in names] == list(COMMANDS)
        assert client.ask("command count") == [b"%d" % len(COMMANDS)]
        for words in ("command", "command info"):
            (rows,) = client.ask(words)
            assert [json.loads(row)["name"] for row in rows] == list(COMMANDS)
        (rows,) = client.ask("command info GET nothing watch")
        assert rows[1] is None
        assert [json.loads(rows[at]) for at in (0, 2)] == [
            {
                "name": "get",
                "arity": 2,
                "flags": ["readonly"],
                "spread": "key",
                "first_key": 1,
                "last_key": 1,
                "step": 1,
            },
            {
                "name": "watch",
                "arity": -2,
                "flags": ["readonly"],
                "spread": "router",
                "first_key": 1,
                "last_key": -1,
                "step": 1,
            },
        ]
        (docs,) = client.ask("command docs get nothing")
        assert docs[0] == b"get"
        assert json.loads(docs[1])["usage"] == COMMANDS["get"].usage
        assert client.ask("command getkeys get a", "command getkeys watch a b", "command getkeys ping") == [
            *([b"a"], [b"a", b"b"], "ERR The command has no key arguments")
        ]
        assert client.ask(
            "command getkeys nothing", "command getkeys get", "command getkeys", "command x"
        ) == [
            "ERR Invalid command specified",
            "ERR Invalid number of arguments specified for command",
            ARITY,
            "ERR unknown subcommand 'x'. Try COMMAND HELP.",
        ]

    def test_where_and_slots(self, fleet: Fleet) -> None:
        client, key = fleet.connect(), fleet.key(1)
        slot = b"%d" % fleet.slots.slot_of(key)
        where = [b"where", key]
        assert client.ask(where) == [[b"slot", slot, b"shard", b"1", b"state", b"up"]]
        fleet.kill(1)
        assert client.ask(where) == [[b"slot", slot, b"shard", b"1", b"state", b"down: a test"]]
        (runs,) = client.ask("slots")
        found = [json.loads(run) for run in runs]
        assert [(run["first"], run["last"], run["shard"]) for run in found] == fleet.slots.ranges()
        assert [run["state"] for run in found] == ["up", "down: a test", "up"]

    def test_info_and_memory(self, fleet: Fleet) -> None:
        client = fleet.connect()
        client.ask([b"set", fleet.key(0), b"1"], [b"set", fleet.key(2), b"1"])
        (text,) = client.ask("info")
        lines = text.decode().split("\r\n")
        assert [line for line in lines if line.startswith("#")] == [
            *("# Server", "# Clients", "# Memory", "# Persistence", "# Stats", "# Shards", "# Keyspace")
        ]
        assert {"connected_clients:1", "shards:3", "db0:keys=2", "maxmemory:0"} <= set(lines)
        fleet.kill(2)
        (text,) = client.ask("info KEYSPACE shards nonsense")
        assert text.decode().split("\r\n") == [
            "# Shards",
            "shard0:state=up,restarts=0,keys=1",
            "shard1:state=up,restarts=0,keys=0",
            "shard2:state=down,restarts=0",
            "",
            "# Keyspace",
            "db0:keys=1",
            "",
        ]
        (found,) = client.ask("memory stats")
        assert found[:2] == [b"keys.count", b"1"]
        assert client.ask("memory what")[0].startswith("ERR unknown subcommand")

    def test_config(self, fleet: Fleet) -> None:
        client = fleet.connect()
        assert client.ask("config get max*y", "CONFIG GET SHARDS nothing", "config get") == [
            [b"maxmemory", b"0", b"maxmemory-policy", b"noeviction"],
            [b"shards", b"3"],
            ARITY,
        ]
        assert client.ask("config set maxmemory 1gb maxmemory-policy allkeys-lru") == [OK]
        changes = {"maxmemory": 1 << 30, "maxmemory_policy": "allkeys-lru"}
        assert fleet.told == [("configure", {"changes": changes}), *changes.items()]
        for shard in fleet.shards:
            assert [json.loads(one) for one in shard.configured] == [changes]
        failed = "ERR CONFIG SET failed (possibly related to argument '"
        for words, error in [
            ("config set port 1", failed + "port') - can't set immutable config"),
            ("config set maxmemory 1gb nothing 1", "ERR Unknown option or number of arguments"),
            ("config set capacity 2", failed + "capacity') - 2 is less than one for each of 3 shards"),
            ("config set capacity 9 maxmemory x", failed + "maxmemory') - maxmemory: 'x' is not a number"),
            ("config set capacity", ARITY),
            ("config what x", "ERR unknown subcommand 'what'. Try CONFIG HELP."),
        ]:
            (found,) = client.ask(words)
            assert found.startswith(error), found
        assert len(fleet.told) == 3, "all or nothing"
        fleet.kill(1)
        assert client.ask("config set capacity 9") == ["SHARDDOWN shard 1: a test"]


class TestOrder:
    def test_requests_of_all_kinds_are_answered_in_order(self, fleet: Fleet) -> None:
        client, keys = fleet.connect(), [fleet.key(shard) for shard in range(3)]
        sent, expected = [], []
        for number in range(300):
            key = keys[number % 3]
            value = b"%d" % number
            sent += [[b"set", key, value], "ping", [b"get", key], "nonsense"]
            expected += [OK, b"PONG", value, "ERR unknown command"]
        assert client.ask(*sent) == expected

    def test_cut_at_every_byte(self, fleet: Fleet) -> None:
        key = fleet.key(1)
        words = [[b"set", key, b"1"], [b"multi"], [b"get", key], [b"exec"], [b"ping"], [b"get", key]]
        stream = b"".join(encode_request(tokens) for tokens in words)
        client = fleet.connect()
        for at in range(len(stream)):
            client.feed(stream[at : at + 1])
        fleet.serve()
        assert client.replies() == [OK, OK, b"QUEUED", [b"\0\0\0\0" + b"1"], b"PONG", b"1"]

    def test_a_thousand_requests_of_the_router_in_one_piece(self, fleet: Fleet) -> None:
        client = fleet.connect()
        assert client.ask(*["ping"] * 3000) == [b"PONG"] * 3000


class TestTransactions:
    def test_what_is_queued_runs_at_once(self, fleet: Fleet) -> None:
        client, key = fleet.connect(), fleet.key(1)
        assert client.ask("multi", [b"SET", key, b"1"], [b"get", key], [b"zadd", key, b"1", b"m"]) == [
            *(OK, b"QUEUED", b"QUEUED", b"QUEUED")
        ]
        assert fleet.connect().ask([b"get", key]) == [None]
        (elements,) = client.ask("exec")
        assert run_of(elements)[:2] == [(0, OK), (0, b"1")]
        assert run_of(elements)[2][1].startswith(b"WRONGTYPE")
        assert client.ask("multi", "exec", "exec") == [OK, [], "ERR EXEC without MULTI"]

    def test_discard(self, fleet: Fleet) -> None:
        client, key = fleet.connect(), fleet.key(1)
        assert client.ask("discard", "multi", [b"set", key, b"1"], "discard", [b"get", key]) == [
            *("ERR DISCARD without MULTI", OK, b"QUEUED", OK, None)
        ]

    @pytest.mark.parametrize(
        ("words", "error"),
        [
            ("nonsense", "ERR unknown command"),
            ("get", ARITY),
            ("stats", "ERR Command not allowed inside a transaction"),
            ("ping", "ERR Command not allowed inside a transaction"),
            ("set other 1", CROSS_SLOT),
        ],
    )
    def test_what_cannot_be_queued_aborts(self, fleet: Fleet, words: str, error: str) -> None:
        client, key = fleet.connect(), fleet.key(1)
        assert client.ask("multi", [b"set", key, b"1"], words, [b"set", key, b"2"], "exec") == [
            *(OK, b"QUEUED", error, b"QUEUED", ABORTED)
        ]
        assert client.ask([b"get", key], "multi", "exec") == [None, OK, []]

    def test_what_is_refused_without_harm(self, fleet: Fleet) -> None:
        client, key = fleet.connect(), fleet.key(1)
        assert client.ask("multi", [b"set", key, b"1"], "multi", [b"watch", key], "unwatch", "exec") == [
            OK,
            b"QUEUED",
            "ERR MULTI calls can not be nested",
            "ERR WATCH inside MULTI is not allowed",
            OK,
            [b"\0\0\0\0OK"],
        ]
        assert client.ask("multi", "quit") == [OK, OK]

    def test_a_transaction_has_a_limit(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("imds.router.transactions.MAX_REQUEST", 1000)
        client, key = fleet.connect(), fleet.key(1)
        large = [b"set", key, b"v" * 600]
        found = client.ask("multi", large, large, "exec", large)
        assert (found[:2], found[3:]) == ([OK, b"QUEUED"], [ABORTED, OK])
        assert found[2].startswith("ERR the transaction is larger")

    def test_watch(self, fleet: Fleet) -> None:
        client, other, key = fleet.connect(), fleet.connect(), fleet.key(1)
        quiet = [[b"watch", key, key], "multi", [b"get", key], "exec"]
        assert client.ask(*quiet) == [OK, OK, b"QUEUED", [b"\0\0\0\1"]]
        for change in ([b"set", key, b"1"], [b"del", key]):
            assert client.ask([b"watch", key]) == [OK]
            other.ask(change)
            assert client.ask("multi", [b"get", key], "exec") == [OK, b"QUEUED", None]
            assert client.ask(*quiet[1:])[-1] is not None, "what was watched is forgotten"
        assert client.ask([b"watch", key], [b"set", key, b"own"], "multi", "exec") == [OK, OK, OK, None]
        assert client.ask("multi", "exec") == [OK, []]
        for end in ("unwatch", "multi discard"):
            assert client.ask([b"watch", key]) == [OK]
            other.ask([b"set", key, b"2"])
            client.ask(*end.split())
            assert client.ask("multi", [b"get", key], "exec")[-1] == [b"\0\0\0\0" + b"2"]

    def test_watched_keys_have_one_slot(self, fleet: Fleet) -> None:
        client = fleet.connect()
        assert client.ask("watch {a}1 {b}1", "watch {a}1", "watch {b}1", "watch {a}2") == [
            *(CROSS_SLOT, OK, CROSS_SLOT, OK)
        ]
        assert client.ask("multi", "get {b}1", "exec", "multi", "get {b}1", "exec") == [
            *(OK, CROSS_SLOT, ABORTED, OK, b"QUEUED", [b"\0\0\0\1"])
        ]

    def test_watch_and_exec_in_one_piece(self, fleet: Fleet) -> None:
        """The version is waited for: what another client did before it does not matter."""
        client, other, key = fleet.connect(), fleet.connect(), fleet.key(1)
        other.send([b"set", key, b"1"])
        client.send([b"watch", key], "multi", [b"get", key], "exec", "ping")
        fleet.serve()
        assert client.replies() == [OK, OK, b"QUEUED", [b"\0\0\0\0" + b"1"], b"PONG"]

    @pytest.mark.parametrize("sent", [False, True])
    def test_a_shard_that_dies(self, fleet: Fleet, sent: bool) -> None:
        client, key = fleet.connect(), fleet.key(1)
        assert client.ask([b"watch", key], "multi", [b"set", key, b"1"]) == [OK, OK, b"QUEUED"]
        fleet.kill(1)
        fleet.revive(1)
        assert client.ask("exec") == [None], "nobody knows what has happened to the key"
        client.send("multi", [b"set", key, b"1"], "exec", "multi", [b"get", key], "exec")
        fleet.kill(1, sent=sent)
        found = client.replies()
        assert found[2].split()[0] == ("UNKNOWN" if sent else "RETRY")
        assert found[5].split()[0] == "RETRY"
        assert client.ask("multi", [b"get", key], "exec")[-1] == "SHARDDOWN shard 1 cannot be reached: a test"
        assert client.ask([b"watch", key], "ping") == ["SHARDDOWN shard 1 cannot be reached: a test", b"PONG"]
        fleet.revive(1)

    def test_a_client_that_goes_leaves_no_trace(self, fleet: Fleet) -> None:
        key = fleet.key(1)
        for served in (True, False):
            client = fleet.connect()
            client.send([b"watch", key])
            if served:
                fleet.serve()
            client.leave()
            fleet.serve()
            assert not fleet.shards[1].watches

    def test_the_end_of_the_stream_takes_no_watch_away(self, fleet: Fleet) -> None:
        client, other, key = fleet.connect(), fleet.connect(), fleet.key(1)
        client.ask([b"watch", key])
        client.send("multi", [b"set", key, b"1"])
        client.end()
        other.ask([b"set", key, b"2"])
        assert client.ask("exec") == [OK, b"QUEUED", None]
