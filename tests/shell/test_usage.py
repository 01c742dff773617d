"""The usage of each command as a grammar: what may come next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds.commands import COMMANDS
from imds.protocol import MAX_TOKENS
from imds.shell.line import begun
from imds.shell.usage import Word, advance, completions, expected, hint, parse

OPTIONS = "[NX|XX] [GET] [EX seconds|PX milliseconds|EXAT time|PXAT time|KEEPTTL]"


def words(line):
    return [word.encode() for word in line.split()]


@pytest.mark.parametrize("row", COMMANDS.values(), ids=str)
def test_each_usage_of_the_table(row):
    elements = parse(row.usage)
    assert " ".join([row.name, *map(str, elements)]) == row.usage
    required = [element for element in elements if isinstance(element, Word)]
    assert row.min_tokens == 1 + len(required)
    assert ("..." in row.usage) <= (row.max_tokens == MAX_TOKENS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("get", "key"),
        ("GET k", ""),
        ("get k k", ""),
        ("nonsense", ""),
        ("", ""),
        ("set k", f"value {OPTIONS}"),
        ("set k get", OPTIONS),
        ("set k v ex", "seconds [NX|XX] [GET]"),
        ("set k v Ex 10", "[NX|XX] [GET]"),
        ("set k v keepttl get nx", ""),
        ("set k v what", ""),
        ("zadd k", "[NX|XX|GT|LT] [CH] [INCR] score member [score member ...]"),
        ("zadd k ch", "[NX|XX|GT|LT] [INCR] score member [score member ...]"),
        ("zadd k ch 1", "member [score member ...]"),
        ("zadd k 1 m", "[score member ...]"),
        ("zadd k 1 m 2", "member [score member ...]"),
        ("zadd k 1 m 2 ch", "[score member ...]"),
        ("zrandmember k", "[count [WITHSCORES]]"),
        ("zrandmember k 1", "[WITHSCORES]"),
        ("zrange k 0 -1 limit 0", "count [BYSCORE|BYLEX] [REV] [WITHSCORES]"),
        ("zunion 2 a b weights", "number [number ...] [AGGREGATE SUM|MIN|MAX] [WITHSCORES]"),
        ("zunion 2 a b weights 1", "[number ...] [AGGREGATE SUM|MIN|MAX] [WITHSCORES]"),
        ("zunion 2 a b aggregate", "SUM|MIN|MAX [WEIGHTS number ...] [WITHSCORES]"),
        ("zunion 2 a b aggregate avg", ""),
        ("mset a 1 b", "value [key value ...]"),
        ("hello 1", "[AUTH user password] [SETNAME name]"),
        ("hello 1 setname a", "[AUTH user password]"),
        ("auth", "[user] password"),
        ("client", "ID|LIST|INFO|KILL|SETNAME|GETNAME [...]"),
        ("client id", "[...]"),
        ("client ix", ""),
        ("scan 0 type", "STRING|ZSET [MATCH pattern] [COUNT number]"),
    ],
)
def test_hint(line, expected):
    assert hint(words(line)) == expected


@pytest.mark.parametrize(
    ("line", "begun", "found"),
    [
        ("", "ge", ["get", "getset", "getdel", "getex", "getrange"]),
        ("", "GETR", ["GETRANGE"]),
        ("", "exi", ["exists", "exit"]),
        ("help", "zs", ["zscore", "zscan"]),
        ("get", "", []),
        ("set k", "", []),
        ("set k v", "", ["nx", "xx", "get", "ex", "px", "exat", "pxat", "keepttl"]),
        ("set k v", "E", ["EX", "EXAT"]),
        ("set k v ex", "", []),
        ("set k v xx", "x", []),
        ("object", "", ["encoding", "refcount", "idletime"]),
        ("scan 0 type", "z", ["zset"]),
        ("zadd k", "i", ["incr"]),
        ("zadd k 1", "", []),
        ("nonsense", "", []),
    ],
)
def test_completions(line, begun, found):
    result = completions(words(line), begun)
    assert [word for word in result if word in found] == found
    if line != "object":  # whose list may grow
        assert result == found


def test_repeated_arguments_never_end():
    elements = parse("bzpop key [key ...] seconds")
    for _ in range(5):
        elements = advance(elements, "k")
        assert " ".join(map(str, elements)) == "[key ...] seconds"


def test_a_bracket_that_is_not_closed():
    with pytest.raises(ValueError, match="not closed"):
        parse("get [key")


@given(st.sampled_from([*COMMANDS]), st.lists(st.binary(max_size=6) | st.sampled_from([b"nx", b"limit"])))
def test_any_tokens(name, arguments):
    """Whatever was typed, the hint is a rest of words that the usage has."""
    known = set(COMMANDS[name].usage.replace("[", " ").replace("]", " ").split())
    shown = hint([name.encode(), *arguments]).replace("[", " ").replace("]", " ").split()
    assert set(shown) <= known | {"..."}
    if expected([name.encode(), *arguments]) is None:
        assert completions([name.encode(), *arguments], "") == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"", ([], b"")),
        (b"ge", ([], b"ge")),
        (b"get ", ([b"get"], b"")),
        (b"set 'a b' c", ([b"set", b"a b"], b"c")),
        (b"set 'a ", None),
        (b'set "a\\', None),
        (b"set \xff x", ([b"set", b"\xff"], b"x")),
    ],
)
def test_a_line_that_is_still_typed(line, found):
    assert begun(line) == found
