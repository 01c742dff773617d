"""The recipes in examples/, against a real server."""

import contextlib
import random
import threading
import time

import leaderboard
import lock
import pytest
import rate_limiter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leaderboard import Entry, Leaderboard
from lock import Lock, LockLost, fenced_set
from rate_limiter import RateLimiter

import imds

# The server of the fixtures is emptied for each test; each example of one begins by forgetting.
on_one_server = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def at_once(*jobs):
    """Run the jobs in threads and return their results; the first that raised is raised."""
    results = [None] * len(jobs)

    def run(number, job):
        try:
            results[number] = job()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (lock, "a late write is taken: False\nlost: lock:{report}\nthe report is by Radia\n"),
        (rate_limiter, "refused, again in 0."),
        (leaderboard, "1. "),
    ],
    ids=["lock", "rate_limiter", "leaderboard"],
)
def test_as_a_script(imds_server, recipe, says, monkeypatch, capsys):
    monkeypatch.setattr(imds, "serve", lambda: contextlib.nullcontext(imds_server))
    recipe.main()
    assert says in capsys.readouterr().out


class TestLock:
    def expire(self, client):
        while client.exists("lock:{x}"):
            time.sleep(0.005)

    def test_one_holder_at_a_time_and_numbers_rise(self, imds_client):
        held = []

        def work():
            for _ in range(4):
                with Lock(imds_client, "x") as mine:
                    held.append(mine.number)
                    before = imds_client.get("count") or 0
                    time.sleep(0.005)
                    imds_client.set("count", int(before) + 1)
                    held.append(mine.number)

        at_once(work, work, work)
        assert imds_client.get("count") == b"12"
        assert held == [number for number in range(1, 13) for _ in range(2)]

    def test_taken_and_given_back(self, imds_client):
        one, two = Lock(imds_client, "x"), Lock(imds_client, "x")
        assert one.acquire()
        assert not two.acquire()
        assert not two.acquire(0.1)
        assert Lock(imds_client, "y").acquire()
        one.release()
        assert one.number == 0
        assert two.acquire()
        with pytest.raises(LockLost):
            one.release()
        assert not one.acquire()

    def test_who_is_late_has_lost_it_and_leaves_the_next_one_alone(self, imds_client):
        late, following = Lock(imds_client, "x", seconds=0.05), Lock(imds_client, "x")
        assert late.acquire()
        number = late.number
        assert following.acquire(10)
        assert following.number > number
        for call in (lambda: late.extend(10), late.release, late.release):
            with pytest.raises(LockLost):
                call()
        assert 1000 < imds_client.pttl("lock:{x}") <= 10_000
        following.release()

    def test_nobody_releases_what_became_anothers_in_between(self, imds_client, imds_server):
        mine = Lock(imds_client, "x")
        assert mine.acquire()
        with imds_server.client() as other, pytest.raises(LockLost):
            mine._if_ours(lambda trade: (other.set("lock:{x}", "another's"), trade.delete("lock:{x}")))
        assert imds_client.get("lock:{x}") == b"another's"

    def test_extended_it_lives_longer(self, imds_client):
        mine = Lock(imds_client, "x", seconds=5)
        assert mine.acquire()
        assert imds_client.pttl("lock:{x}") <= 5000
        mine.extend(60)
        assert imds_client.pttl("lock:{x}") > 50_000

    def test_a_block_that_took_too_long_says_so(self, imds_client):
        with pytest.raises(LockLost), Lock(imds_client, "x", seconds=0.02):
            self.expire(imds_client)
        with pytest.raises(ZeroDivisionError) as caught, Lock(imds_client, "x", seconds=0.02):  # noqa: PT012
            self.expire(imds_client)
            raise ZeroDivisionError
        assert "the lock was lost, too" in caught.value.__notes__[0]
        with pytest.raises(ZeroDivisionError), Lock(imds_client, "x"):
            raise ZeroDivisionError
        assert Lock(imds_client, "x").acquire()

    def test_a_fence_lets_only_later_holders_through(self, imds_client):
        assert fenced_set(imds_client, "{x}", "two", 2)
        assert not fenced_set(imds_client, "{x}", "one", 1)
        assert fenced_set(imds_client, "{x}", "two again", 2)
        assert imds_client.get("{x}") == b"two again"
        numbers = random.sample(range(3, 30), 8)
        at_once(*[lambda n=n: fenced_set(imds_client, "{x}", str(n), n) for n in numbers])
        assert imds_client.get("{x}") == b"%d" % max(numbers)


class TestRateLimiter:
    @on_one_server
    @given(
        limit=st.integers(1, 4),
        gaps=st.lists(st.floats(0, 40, allow_subnormal=False), min_size=1, max_size=15),
    )
    def test_as_a_list_of_times_would_have_it(self, imds_client, limit, gaps):
        limiter = RateLimiter(imds_client, limit=limit, seconds=60)
        limiter.forget("x")
        now, let_through = 10**15, []
        limiter._now = lambda: now
        for gap in gaps:
            now += int(gap * 1e6)
            let_through = [when for when in let_through if when > now - 60_000_000]
            allowed = len(let_through) < limit
            if allowed:
                let_through.append(now)
            remaining = limit - len(let_through)
            free = 0 if remaining else (let_through[0] + 60_000_000 - now) / 1e6
            assert limiter.hit("x") == (allowed, remaining, pytest.approx(free))
        assert imds_client.zcard("limit:x") == len(let_through)

    def test_many_at_once_are_no_more_than_may_be(self, imds_client):
        limiter = RateLimiter(imds_client, limit=30, seconds=60)
        found = at_once(*[lambda: [limiter.hit("x").allowed for _ in range(12)] for _ in range(5)])
        assert sum(map(sum, found)) == 30
        assert limiter.hit("y").allowed

    def test_time_is_the_servers_and_passes(self, imds_client):
        limiter = RateLimiter(imds_client, limit=1, seconds=0.1)
        assert limiter.hit("x") == (True, 0, pytest.approx(0.1))
        refused = limiter.hit("x")
        assert not refused.allowed
        time.sleep(refused.retry_after)
        assert limiter.hit("x").allowed

    def test_what_nobody_hits_is_gone(self, imds_client):
        RateLimiter(imds_client, limit=5, seconds=30).hit("x")
        assert 29_000 < imds_client.pttl("limit:x") <= 30_001


class TestLeaderboard:
    @pytest.fixture
    def client(self, imds_server):
        with imds_server.client(encoding="utf-8") as client:
            yield client

    @on_one_server
    @given(
        results=st.lists(
            st.tuples(st.sampled_from("abcdefgé"), st.integers(-3, 3), st.booleans()), max_size=20
        ),
        neighbours=st.integers(0, 3),
    )
    def test_as_a_sorted_list_would_have_it(self, client, results, neighbours):
        client.flushall()
        board, scores = Leaderboard(client, "x"), {}
        for player, score, adding in results:
            if adding:
                scores[player] = scores.get(player, 0) + score
                assert board.add(player, score) == scores[player]
            else:
                better = player not in scores or score > scores[player]
                assert board.submit(player, score) == better
                scores[player] = score if better else scores[player]
        order = sorted(scores, key=lambda player: (scores[player], player), reverse=True)
        entries = [
            Entry(1 + sum(other > scores[player] for other in scores.values()), player, scores[player])
            for player in order
        ]
        assert len(board) == len(entries)
        assert [board.top(count) for count in range(4)] == [entries[:count] for count in range(4)]
        for rank, entry in enumerate(entries):
            assert board.place(entry.player) == entry.place
            assert (
                board.around(entry.player, neighbours)
                == (entries[max(0, rank - neighbours) : rank + neighbours + 1])
            )

    def test_who_is_not_on_it(self, client):
        board = Leaderboard(client, "x")
        board.submit("ada", 1)
        board.remove("ada")
        assert board.place("ada") is None
        assert board.around("ada", 3) == board.top(3) == []
