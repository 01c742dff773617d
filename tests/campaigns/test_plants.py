"""No planted bug gets away: each is caught by the trial that is known to catch it."""

import pytest

from campaigns.plants import PLANTED, tries


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_caught(planted):
    assert tries(planted, range(planted.seed, planted.seed + 50)), planted.name
