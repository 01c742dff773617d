"""The examples run, on real data and real processes."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_words_are_all_found_again_after_a_shard_was_killed_and_after_a_restart(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "words.py"), "--words", "2000", "--kill"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed shard" in run.stdout
    assert run.stdout.count("2,000 gets checked") == 2
    assert run.stdout.count("2,000 ranks checked") == 2
    assert "every answer was right" in run.stdout
