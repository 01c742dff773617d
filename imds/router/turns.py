"""One turn of the router's loop around a switch: wait, receive from everyone, send to everyone.

::

    select -> every readable client: receive (split by shard)
           -> every readable shard:  receive (merge in order)
           -> one send for each shard -> one send for each client with output

A round that has received from several clients keeps what it has for the shards, if that is little, and the
next one does not wait: whoever has asked meanwhile is sent along. GATHER_ROUNDS in succession do so at most:
clients that send without end, and never a whole request, delay nobody.

What is policy, and what happens seldom, is left to the router, as :class:`News`. Where there is none, the
turn goes on with the next round, until rounds.TURN after its first one: what the router looks at once in a
turn is looked at often enough.

The compiled twin is ``turn`` in ``_kernel/switch.pyx``: one call for all of this, without a Python object for
an event, where the system has epoll(7). The tests in ``tests/router/test_turns.py`` hold both to the same
cases.
"""

from __future__ import annotations

import time
from selectors import EVENT_READ, BaseSelector
from typing import Any, NamedTuple

from imds.rounds import Rounds
from imds.router.switch import Asked, Client, LinkError, Switch

GATHER_ROUNDS = 8


class Policy(NamedTuple):
    """What a turn keeps back, and for how long: figures of the router's.

    ``window`` is that of ``receive_all``. Requests of several clients are gathered while they are under
    ``gather`` bytes. Replies that stop in the midst of a turn, and are under ``hold`` bytes, are held back
    for ``wait`` seconds.
    """

    window: int
    gather: int
    hold: int
    wait: float


class News:
    """What a turn leaves to the router.

    ``events``: (descriptor, the selector's mask) of what is neither a plain client nor a link. ``ended``:
    clients of which the stream is at its end, or broken: receiving once more tells. ``changed``: clients to
    think about, because they have output that their socket has not taken, are choked or closing, or have a
    full window. ``questions`` of clients, ``answers`` to the router's own, (shard, token, reply).
    ``broken``: (shard, LinkError or
    None) of each link that has to be dropped. ``unsent``: a link has, or had until now, bytes that its socket
    did not take.
    """

    __slots__ = ("answers", "broken", "changed", "ended", "events", "questions", "unsent")

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.ended: list[Client] = []
        self.changed: list[Client] = []
        self.questions: list[Asked] = []
        self.answers: list[tuple[int, Any, bytes]] = []
        self.broken: list[tuple[int, LinkError | None]] = []
        self.unsent = False

    def __bool__(self) -> bool:
        return self.unsent or any(
            (self.events, self.ended, self.changed, self.questions, self.answers, self.broken)
        )


def turn(
    switch: Switch,
    selector: BaseSelector,
    timeout: float | None,
    policy: Policy,
) -> News | None:
    """Wait for ``timeout`` seconds at most (None: for ever), act on what came, return what is left to do.

    The selector has every client and link by its descriptor.
    """
    news = News()
    rounds = Rounds(timeout)
    while _round(switch, selector, timeout, policy, news) and not news:
        timeout = rounds.left()
        if timeout <= 0:
            break
    return news or None


def _round(
    switch: Switch,
    selector: BaseSelector,
    timeout: float | None,
    policy: Policy,
    news: News,
) -> bool:
    """Wait, receive, send; return whether there was anything to do."""
    if switch.held:
        timeout = policy.wait if timeout is None else min(policy.wait, timeout)
    readable: list[Client] = []
    answered: list[Client] = []
    gathered = switch.gathers > 0
    events = selector.select(0 if gathered else timeout)
    for key, mask in events:
        known = switch.by_fd.get(key.fd)
        if isinstance(known, int):
            if mask & EVENT_READ:
                _receive_link(switch, known, key.fd, news, answered)
        elif known is not None and known.plain:
            readable.append(known)
        else:
            news.events.append((key.fd, mask))
    if readable:
        news.ended, news.changed, news.questions = switch.receive_all(readable, policy.window)
    if (
        len(readable) > 1
        and switch.gathers < GATHER_ROUNDS
        and sum(map(switch.backlog, range(switch.shards))) < policy.gather
        and not news
    ):
        switch.gathers += 1
    else:
        switch.gathers = 0
        _flush_links(switch, news)
    _flush(switch, answered, news, policy)
    return bool(events) or gathered


def _flush_links(switch: Switch, news: News) -> None:
    """Send each shard what waits for it."""
    news.unsent, switch.stuck = switch.stuck, False
    for shard, fd in switch.unsent():
        try:
            if switch.flush_link(shard, fd):
                news.unsent = switch.stuck = True
        except OSError:
            news.broken.append((shard, None))


def _receive_link(switch: Switch, shard: int, fd: int, news: News, answered: list[Client]) -> None:
    try:
        size, clients, answers = switch.receive_link(shard, fd)
    except BlockingIOError:
        return
    except LinkError as error:
        news.broken.append((shard, error))
        return
    except OSError:
        size, clients, answers = 0, [], []
    if not size:
        news.broken.append((shard, None))
    answered += clients
    news.answers += [(shard, token, reply) for token, reply in answers]


def _flush(switch: Switch, answered: list[Client], news: News, policy: Policy) -> None:
    changed, held = switch.flush_all(answered, policy.hold)
    news.changed += changed
    if held and not switch.held:
        switch.held_until = time.monotonic() + policy.wait
    switch.held += held
    if switch.held and time.monotonic() >= switch.held_until:
        held, switch.held = switch.held, []
        news.changed += switch.flush_all(held)[0]
