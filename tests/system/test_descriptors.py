"""Connections come and go; descriptors and memory of the processes do not pile up."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable

import psutil
from serving import Server, receive, receive_all, request, until

MISSING = b"\0\0\0\4\0\0\0\1"


def open_files(one: Server) -> list[int]:
    processes = [one.router(), one.shard(0), one.shard(1), psutil.Process(one.pid)]
    return [process.num_fds() for process in processes]


def settled_files(one: Server) -> list[int]:
    """Return them once they stay: a connection that has just been closed may not have been noticed yet."""
    found: list[int] = []
    while found != (found := open_files(one)):
        time.sleep(0.2)
    return found


def test_two_hundred_connections_leave_nothing_behind(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    one.stats()
    before = settled_files(one)
    reset = struct.pack("ii", 1, 0)
    for _ in range(4):
        socks = [one.connect() for _ in range(50)]
        for number, sock in enumerate(socks):
            if number % 5 == 0:  # asks and waits
                sock.sendall(request(b"get", b"x"))
                assert receive(sock, len(MISSING)) == MISSING
            elif number % 5 == 1:  # vanishes with requests in flight
                sock.sendall(request(b"get", b"x") * 100 + b"\0\0")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            elif number % 5 == 2:  # is thrown out
                sock.sendall(b"\xff\xff\xff\xff")
                receive_all(sock)
            elif number % 5 == 3:  # half-closes
                sock.sendall(request(b"get", b"x"))
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == MISSING
        for sock in socks:
            sock.close()
    until("all are closed", lambda: open_files(one) == before)
    one.stop()


def test_restarts_leave_no_descriptor_behind(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    one.expect("was killed by SIGKILL; restarting")
    one.stats()
    before = settled_files(one)
    for round_ in range(1, 4):
        one.shard(0).kill()
        until("it is back", lambda times=round_: len(one.logged("shard 0 is back")) == times)
        one.wait_up()
    one.router().kill()
    until("its end is noticed", lambda: one.logged("router 0 was killed"))
    one.wait_up()
    until("as many as before", lambda: open_files(one) == before)
    one.stop()
