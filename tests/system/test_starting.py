"""Options, ports, paths and directories: what cannot be is refused in one line, what can be is served."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import DEADLINE, READY, Server, environment, receive_replies, request, until

from imds import Client, __version__
from imds.protocol import OK


def run(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a server that is not going to start; return how it ended."""
    command = [sys.executable, "-m", "imds", *options]
    env = environment("", **variables)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE, check=False)


BAD = [
    ("shards", "0", "a whole number from 1 to 128"),
    ("port", "70000", "a whole number from 0 to 65535"),
    ("appendfsync", "sometimes", "one of always, everysec, no"),
    ("maxmemory", "12 parsecs", "a number of bytes such as 1048576, 512mb or 2gb"),
    ("maxmemory_policy", "random", "one of noeviction, allkeys-lru"),
    ("unix", "/" + "x" * 101, "a path of at most 100 bytes"),
    ("log_level", "loud", "one of debug, info, warning, error"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_a_bad_option_is_named_with_its_value_and_rule(
    tmp_path: Path, name: str, value: str, rule: str
) -> None:
    flag = "--" + name.replace("_", "-")
    file = tmp_path / "imds.toml"
    file.write_text(f'{name} = "{value}"\n')
    for done, source in (
        (run("--dir", str(tmp_path / "data"), flag, value), flag),
        (run("--dir", str(tmp_path / "data"), **{f"IMDS_{name.upper()}": value}), f"IMDS_{name.upper()}"),
        (run("--dir", str(tmp_path / "data"), "--config", str(file)), f"{file}: {name}"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"imds-router: {source}: {value!r} is not {rule}\n"
    assert not (tmp_path / "data").exists()


def test_other_mistakes_are_named_too(tmp_path: Path) -> None:
    broken, odd = tmp_path / "broken.toml", tmp_path / "odd.toml"
    broken.write_text("port = \n")
    odd.write_text("prot = 1\n")
    for options, expected in (
        (("--config", str(broken)), "is not TOML"),
        (("--config", str(odd)), "has an unknown option 'prot'"),
        (("--config", str(tmp_path / "none.toml")), "No such file"),
        (("--capacity", "3", "--shards", "4"), "--capacity: 3 is less than one for each of 4 shards"),
        (("--prot", "1"), "unrecognized arguments: --prot 1"),
    ):
        done = run("--dir", str(tmp_path / "data"), *options)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_version_and_help() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.fullmatch(rf"imds {re.escape(__version__)} \((compiled|python) kernels\)\n", done.stdout)
    done = run("--help")
    assert done.returncode == 0
    for option in ("--shards", "--port", "--maxmemory-policy", "--config"):
        assert option in done.stdout


def test_flag_environment_and_file_in_this_order(server: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "imds.toml"
    file.write_text('shards = 3\nappendfsync = "no"\nlog-level = "warning"\n')
    one = server().start("--config", str(file), env={"IMDS_SHARDS": "2"})
    assert [row["aof_policy"] for row in one.stats()] == ["no", "no"]
    assert not one.logged("INFO")
    one.stop()
    one.start("--config", str(file), "--shards", "1", env={"IMDS_SHARDS": "2"})
    assert len(one.stats()) == 1
    one.stop()


def test_the_ready_line_stands_alone_and_tells_all(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    match = READY.search(one.log())
    assert match is not None
    assert match[1] == f"127.0.0.1:{one.port}"
    assert (match[3], match[4], match[5]) == ("2", "0", str(one.pid))
    one.shard(0).kill()
    one.expect("shard 0 was killed by SIGKILL")
    until("it is back", lambda: one.logged("shard 0 is back"))
    one.wait_up()
    one.stop()  # demands that the line stands there once
    assert one.directory.stat().st_mode & 0o777 == 0o700


def refused(done: subprocess.CompletedProcess[str], text: str) -> None:
    """Demand an end with exit code 1 and one line that holds ``text``."""
    assert done.returncode == 1, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_port_in_use_is_one_clear_line(server: Callable[..., Server], tmp_path: Path) -> None:
    one = server().start("--shards", "1")
    refused(
        run("--dir", str(tmp_path / "other"), "--shards", "1", "--port", str(one.port)),
        f"imds-router: cannot listen on 127.0.0.1:{one.port}: Address already in use",
    )
    done = run("--dir", str(tmp_path / "other"), "--shards", "1", "--port", str(one.port), "--routers", "2")
    refused(done, "Address already in use")
    one.stop()
    one.start("--shards", "1", "--routers", "2")
    refused(
        run("--dir", str(tmp_path / "other"), "--port", str(one.port), "--routers", "2"),
        "Address already in use",
    )
    assert not (tmp_path / "other").exists()
    one.stop()


def test_a_port_belongs_to_a_server_before_it_is_ready(server: Callable[..., Server], tmp_path: Path) -> None:
    """Two servers that start together cannot both have a port, or a socket's path."""
    one, path = server(), tmp_path / "sock"
    one.start("--shards", "1", "--unix", str(path), ready=False)
    until("the socket is there", path.exists)
    done = run("--dir", str(tmp_path / "other"), "--port", "0", "--unix", str(path))
    refused(done, f"imds-router: cannot listen on unix:{path}: Address already in use")
    refused(run("--dir", str(tmp_path / "other"), "--port", str(one.port)), "Address already in use")
    one.wait_ready()
    one.stop()


def test_no_such_address_and_no_such_directory(tmp_path: Path) -> None:
    refused(
        run("--dir", str(tmp_path / "a"), "--host", "192.0.2.1", "--port", "0"),
        "cannot listen on 192.0.2.1:0",
    )
    refused(
        run("--dir", str(tmp_path / "a"), "--host", "no.such.host.invalid"), "cannot listen on no.such.host"
    )
    refused(run("--dir", str(tmp_path / "no" / "such"), "--port", "0"), "No such file or directory")
    (tmp_path / "file").write_text("")
    refused(run("--dir", str(tmp_path / "file"), "--port", "0"), "file")
    refused(run("--dir", str(tmp_path), "--port", "0"), "a data directory is made only in an empty directory")


def test_a_directory_in_use_names_its_server(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "1")
    refused(
        run("--dir", str(one.directory), "--port", "0"),
        f"imds-router: {one.directory} is in use by another imds server (pid {one.pid})",
    )
    assert one.client().set("still", "serving")
    one.stop()


def test_a_unix_socket_serves_and_is_removed(server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "imds.sock"
    one = server().start("--shards", "2", "--unix", str(path))
    assert f"ready on 127.0.0.1:{one.port} and unix:{path}, " in one.ready_line
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Client(unix=path) as client:
        client.set("by", "path")
        assert client.get("by") == b"path"
    assert one.client().get("by") == b"path"

    refused(
        run("--dir", str(tmp_path / "other"), "--port", "0", "--unix", str(path)),
        f"imds-router: cannot listen on unix:{path}: Address already in use",
    )
    with Client(unix=path) as client:
        assert client.get("by") == b"path", "the living server has kept its socket"
    one.kill()
    assert path.exists(), "nobody was left to remove it"
    one.start("--shards", "2", "--unix", str(path))
    with Client(unix=path) as client:
        assert client.get("by") == b"path"
    one.stop()
    assert not path.exists()

    path.write_text("somebody's notes")
    refused(
        run("--dir", str(tmp_path / "other"), "--port", "0", "--unix", str(path)), "Address already in use"
    )
    assert path.read_text() == "somebody's notes"


def test_ipv6(server: Callable[..., Server]) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    one = server().start("--shards", "1", "--host", "::1")
    assert f"ready on [::1]:{one.port}, " in one.ready_line
    with Client("::1", one.port) as client:
        assert client.set("six", "6")
    one.stop()


def test_a_package_in_the_working_directory_is_not_mistaken_for_ours(
    server: Callable[..., Server], tmp_path: Path
) -> None:
    """Children start from the very files that the supervisor runs."""
    one = server().start("--shards", "1")
    package = Path(sys.modules["imds"].__file__ or "").parent
    for process in (one.shard(0), one.router()):
        assert str(package / "child.py") in process.cmdline()
    one.stop()


def test_a_client_that_connects_early_waits_or_is_told_loading(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2", ready=False)
    sock = one.connect()  # the port is there long before the ready line
    os.set_blocking(sock.fileno(), True)
    sock.sendall(request(b"set", b"early", b"bird"))
    ((status, text),) = receive_replies(sock, 1)
    assert status == OK or text.startswith((b"LOADING ", b"SHARDDOWN "))
    one.wait_ready()
    one.stop()
