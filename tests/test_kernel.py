"""Which kernels there are, and which of the two variants runs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from imds import _kernel

ROOT = Path(__file__).parent.parent


def test_build_list_run_time_list_and_sources_agree():
    assigned = {
        target.id: node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    sources = sorted(path.stem for path in (ROOT / "imds/_kernel").glob("*.pyx"))
    assert list(ast.literal_eval(assigned["KERNELS"])) == list(_kernel.KERNELS) == sources


def run(code, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("IMDS_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


SHOW = """
from imds import _kernel
from imds.shard.kernel import UnifiedStore
print(_kernel.VARIANT, UnifiedStore.__module__)
"""
BUILT = all(find_spec(f"imds._kernel.{name}") for name in _kernel.KERNELS)


def test_disabled_kernels_are_not_used():
    assert run(SHOW, IMDS_DISABLE_KERNEL="1").stdout.split() == ["python", "imds.shard.store"]


def test_built_kernels_are_used():
    expected = ["compiled", "imds._kernel.store"] if BUILT else ["python", "imds.shard.store"]
    assert run(SHOW).stdout.split() == run(SHOW, IMDS_DISABLE_KERNEL="0").stdout.split() == expected


def test_kernels_are_missing_only_where_nobody_disabled_them():
    show = "from imds import _kernel; print(_kernel.MISSING)"
    assert run(show).stdout.split() == [str(not BUILT)]
    assert run(show, IMDS_DISABLE_KERNEL="1").stdout.split() == ["False"]


def test_required_kernels_are_used_or_missed():
    result = run(SHOW, IMDS_REQUIRE_KERNEL="1")
    if BUILT:
        assert result.stdout.split() == ["compiled", "imds._kernel.store"]
    else:
        assert "ModuleNotFoundError" in result.stderr
    both = run(SHOW, IMDS_REQUIRE_KERNEL="1", IMDS_DISABLE_KERNEL="1")
    assert "IMDS_REQUIRE_KERNEL and IMDS_DISABLE_KERNEL are both set" in both.stderr


@pytest.mark.parametrize("name", ["UnifiedStore", "SortedSet", "RecordEncoder", "verify_records"])
def test_the_shard_takes_the_variant_that_runs(name):
    from imds.shard import kernel

    module = getattr(kernel, name).__module__
    assert module.startswith("imds._kernel." if _kernel.COMPILED else "imds.shard.")
