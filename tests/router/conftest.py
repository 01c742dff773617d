from __future__ import annotations

from typing import Any

import pytest

from imds.router import switch as twin


@pytest.fixture(scope="session")
def switch_class(variant: Any) -> type[twin.Switch]:
    """The switch of each variant."""
    return variant.pick(twin.Switch, "switch")  # type: ignore[no-any-return]
