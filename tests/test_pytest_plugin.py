"""The pytest plugin, used by a pytest of its own."""

import subprocess
import sys

import psutil


def run(pytester, *arguments):
    """Run pytest in a process of its own, without the plugin that takes it the longest to load."""
    return pytester.runpytest_subprocess("-p", "no:hypothesispytest", *arguments)


# Each of the first tests leaves something behind, and the one after it looks.
LEFTOVERS = """
import os, signal
import psutil, pytest
import imds

pids = []

@pytest.fixture(autouse=True)
def seen(imds_server):
    pids.append(imds_server.pid)

def test_keys(imds_client):
    imds_client.set("a", 1)
    imds_client.zadd("z", 1, "m")

def test_no_keys_and_then_fail(imds_client):
    assert imds_client.dbsize() == 0
    imds_client.set("b", 1)
    raise ZeroDivisionError

def test_no_keys_after_a_failure(imds_client):
    assert imds_client.dbsize() == 0

def test_options(imds_client):
    assert imds_client.config_set("max-clients", "1")
    assert imds_client.config_set("maxmemory", "100")

def test_no_options(imds_client, imds_server):
    values = imds_client.config_get()
    assert (values["max-clients"], values["maxmemory"]) == (b"10000", b"0")

def test_connections(imds_server):
    global watching
    watching = imds_server.client(name="left-open").transaction("a").__enter__()
    assert watching.now.get("a") is None

def test_no_connections(imds_client):
    assert b"left-open" not in imds_client.client_list()
    with pytest.raises(imds.ConnectionError):
        watching.now.get("a")

def test_still_the_first_server():
    assert len(set(pids)) == 1

def test_stop(imds_server):
    imds_server.stop()

def test_another_server(imds_client):
    assert imds_client.ping() == b"PONG"
    assert len(set(pids)) == 2

def test_killed_shard(imds_server, imds_client):
    imds_client.set("a", 1)
    shard, = [row["pid"] for row in imds_client.stats()]
    os.kill(shard, signal.SIGKILL)

def test_no_killed_shard(imds_client):
    assert imds_client.dbsize() == 0
    assert imds_client.set("a", 1)

def test_text(imds_server):
    with imds_server.client(encoding="utf-8") as client:
        client.set("a", "é")
        assert client.get("a") == "é"

def test_write_down(imds_server):
    with open("pids", "w") as file:
        file.write(" ".join(map(str, pids)))
"""


def test_each_test_finds_a_new_server(pytester):
    pytester.makepyfile(LEFTOVERS)
    result = run(pytester)
    result.assert_outcomes(passed=13, failed=1)
    result.stdout.fnmatch_lines("*ZeroDivisionError*")
    for pid in (pytester.path / "pids").read_text().split():
        assert not psutil.pid_exists(int(pid))


PARALLEL = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(8))
def test(imds_client, imds_server, number):
    assert imds_client.dbsize() == 0
    for step in range(20):
        assert imds_client.incr("n") == step + 1
        time.sleep(0.005)
    with open(f"{os.environ['PYTEST_XDIST_WORKER']}-{number}", "w") as file:
        file.write(imds_server.url)
"""


def test_each_worker_of_xdist_has_its_own(pytester):
    pytester.makepyfile(PARALLEL)
    run(pytester, "-n", "2", "--dist", "each").assert_outcomes(passed=16)
    urls = {
        worker: {(pytester.path / f"{worker}-{number}").read_text() for number in range(8)}
        for worker in ("gw0", "gw1")
    }
    assert len(urls["gw0"]) == len(urls["gw1"]) == 1
    assert urls["gw0"] != urls["gw1"]


def test_options(pytester):
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def imds_options():
            return {"shards": 2, "unix": True}
        """
    )
    pytester.makepyfile(
        """
        def test(imds_client, imds_server):
            assert len(imds_client.stats()) == 2
            assert imds_server.url.startswith("imds+unix://")
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_unused_it_loads_nothing(pytester):
    pytester.makepyfile(
        """
        import sys

        def test():
            loaded = {name for name in sys.modules if name.partition(".")[0] == "imds"}
            assert loaded == {"imds", "imds.pytest_plugin"}
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_what_starts_a_server_loads_no_store():
    """The time of a start is that of its imports, of the supervisor first and of its children then."""
    heavy = {"imds.shard.store", "imds._kernel.store", "imds.reshard", "hashlib", "ctypes", "argparse"}
    for module, more in (("supervisor", {"imds._kernel.switch"}), ("router.router", set())):
        code = f"import imds.{module}, sys; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        assert not (heavy | more) & set(run.stdout.split())
