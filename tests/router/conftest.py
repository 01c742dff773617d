from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from fleet import Fleet

from imds.router import switch as twin


@pytest.fixture(scope="session")
def switch_class(variant: Any) -> type[twin.Switch]:
    """The switch of each variant."""
    return variant.pick(twin.Switch, "switch")  # type: ignore[no-any-return]


@pytest.fixture
def fleet(switch_class: Any) -> Iterator[Fleet]:
    made = Fleet(switch_class)
    yield made
    made.check()


# What is about the compiled switch alone needs one.
_required = os.environ.get("IMDS_REQUIRE_KERNEL", "") not in ("", "0")
collect_ignore = [] if _required or find_spec("imds._kernel.switch") else ["test_switch_compiled.py"]
