"""The tools beside a server at work: a backup, what is restored from it, and digests that compare them."""

from imds.aof_tool import main as aof
from imds.backup import backup
from imds.restore import Until, restore


def test_backup_and_digest_of_a_server_at_work(server, tmp_path):
    one = server().start("--shards", "3")
    client = one.client()
    with client.pipeline() as pipe:
        for number in range(600):
            pipe.set(f"key{number}", "value")
            pipe.zadd("scores", number, f"member{number}")
        pipe.execute()
    backup(one.directory, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "again", Until())
    live = ["--port", str(one.port)]
    assert aof(["digest", str(tmp_path / "again"), *live]) == 0
    client.set("one", "more")
    assert aof(["digest", str(tmp_path / "again"), *live]) == 3
    one.stop()
    assert aof(["check", "--dir", str(one.directory)]) == 0
