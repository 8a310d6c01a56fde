"""The suite 'checkpoint' of scripts/bench.py: its share is that of what it timed."""

import pytest

from scripts.benchmarks.checkpoint import blocked_share
from scripts.benchmarks.timing import Settings


@pytest.mark.slow
def test_share_of_time_that_saving_blocks():
    (row,) = blocked_share(Settings(repeats=2, smoke=True))
    assert row['blocked_share'] == row['save_s'] / (row['every'] * row['step_s'] + row['save_s'])
    assert row['every'] == 500 and 0 < row['save_s'] and 0 < row['step_s']
    assert row['mib'] == pytest.approx(3 * row['parameters'] * 4 / 2**20, abs=1e-4)  # parameters and two moments, in float32
