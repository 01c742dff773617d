"""The compiled kernels, and the one place that picks compiled or Python.

Every kernel exists twice behind one interface: the Python twin, which is the readable reference, beside
the code that uses it (``shard/store.py``, ``shard/sortedset.py``, ``shard/record.py``, ``shard/links.py``,
``router/switch.py`` with ``router/turns.py``), and a Cython module in this package; what several of these
share is in its ``.pxd`` files.
Where one of the compiled modules was not built, or ``IMDS_DISABLE_KERNEL=1`` is set, the twins run; with
``IMDS_REQUIRE_KERNEL=1`` a missing one is an error. One that is there and cannot be loaded always is.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")

# The compiled modules, by name. Touch this, then update setup.py's list (a test compares them).
KERNELS: tuple[str, ...] = ("executor", "links", "record", "sortedset", "store", "switch")


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _compiled() -> bool:
    required = _flag("IMDS_REQUIRE_KERNEL")
    if _flag("IMDS_DISABLE_KERNEL"):
        if required:
            raise ImportError("IMDS_REQUIRE_KERNEL and IMDS_DISABLE_KERNEL are both set")
        return False
    # Found, and not loaded: a process that needs one of them, or none, is not to wait for all.
    missing = [name for name in KERNELS if find_spec(f"{__name__}.{name}") is None]
    if required and missing:
        raise ImportError(f"IMDS_REQUIRE_KERNEL is set, but this build has no compiled {', '.join(missing)}")
    return not missing


COMPILED: bool = _compiled()
# Nobody asked for the twins: the compiled kernels were not, or could not be, built.
MISSING: bool = not COMPILED and not _flag("IMDS_DISABLE_KERNEL")
VARIANT: str = "compiled" if COMPILED else "python"


def pick(twin: T, module: str, name: str) -> T:
    """Return the compiled counterpart of ``twin`` where the compiled kernels run, otherwise ``twin``."""
    if not COMPILED:
        return twin
    found: T = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found
