from __future__ import annotations

import os
from importlib.util import find_spec

# What is about the compiled store alone needs one.
_required = os.environ.get("IMDS_REQUIRE_KERNEL", "") not in ("", "0")
collect_ignore = (
    []
    if _required or find_spec("imds._kernel.store")
    else ["test_forms.py", "test_marks_compiled.py", "test_store_compiled.py"]
)
