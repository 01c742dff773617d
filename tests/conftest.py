"""The variants of the kernels: tests that take ``variant`` run on the Python twin and on the compiled one."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import settings

# A deadline is there to end a hang, which pytest-timeout does, and not to measure a busy machine.
settings.register_profile("imds", deadline=None)
settings.load_profile("imds")


@dataclass(frozen=True)
class Variant:
    """``python`` or ``compiled``."""

    name: str

    def pick(self, twin: Any, module: str, name: str | None = None) -> Any:
        """Return ``twin``, or what ``_kernel/module`` has under its name (or under ``name``)."""
        assert "_kernel" not in twin.__module__, f"{twin} is no twin"
        if self.name == "python":
            return twin
        kernel = import_module(f"imds._kernel.{module}")
        assert str(kernel.__file__).endswith(tuple(EXTENSION_SUFFIXES)), f"{kernel.__file__} is not compiled"
        return getattr(kernel, name or twin.__name__)


def _variants() -> list[str]:
    """The compiled one is there where it was built; IMDS_REQUIRE_KERNEL=1 makes its absence a failure."""
    required = os.environ.get("IMDS_REQUIRE_KERNEL", "") not in ("", "0")
    return ["python", "compiled"] if required or find_spec("imds._kernel.store") else ["python"]


BEFORE = pytest.StashKey[list[threading.Thread]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[BEFORE] = threading.enumerate()
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With IMDS_FORBID_SKIPS=1 a test that is skipped has failed: what it needs was to be installed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("IMDS_FORBID_SKIPS") == "1":
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """A thread that a test leaves behind has failed it: it would work on in the midst of later tests."""
    yield
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread not in item.stash.get(BEFORE, ()):
            thread.join(1)
            assert not thread.is_alive(), f"{thread} was left running"


@pytest.fixture(scope="session", params=_variants())
def variant(request: pytest.FixtureRequest) -> Variant:
    return Variant(request.param)
