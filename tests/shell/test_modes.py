"""Options of the modes: which go together."""

import re

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "a*"], b"--pattern is an option of --scan, --bigkeys"),
        (["--pipe", "--interval", "1"], b"--interval is an option of --hotkeys, --stat, --latency"),
        (["--scan", "--resume-from", "3"], b"--resume-from is an option of --pipe"),
        (["--on-error", "stop", "get", "a"], b"--on-error is an option of --pipe"),
        (["--scan", "get", "a"], b"--scan takes no command"),
        (["--scan", "--pipe"], b"not allowed with"),
        (["--json", "--csv", "get", "a"], b"not allowed with"),
        (["--scan", "--count", "0"], b"invalid number value"),
        (["--scan", "--type", "list"], b"invalid choice"),
        (["--pipe", "--window", "x"], b"invalid number value"),
    ],
)
def test_what_does_not_go_together(run, real, options, message):
    code, out, err = run(*options)
    assert (code, out) == (64, b"")
    assert re.search(re.escape(message), err), err
