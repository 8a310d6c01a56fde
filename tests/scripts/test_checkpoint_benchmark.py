"""The suite 'checkpoint' of scripts/bench.py: its shares are those of what it timed."""

import pytest

from scripts.benchmarks.checkpoint import blocked_share
from scripts.benchmarks.timing import Settings


@pytest.mark.slow
def test_share_of_time_that_saving_blocks():
    (row,) = blocked_share(Settings(repeats=2, smoke=True))
    for name in ('blocked', 'cost'):
        assert row[f'{name}_share'] == row[f'{name}_s'] / (row['every'] * row['step_s'] + row[f'{name}_s'])
    assert row['every'] == 500 and 0 < row['step_s'] and 0 <= row['cost_s'] <= row['written_s']
    assert 0 < row['fastest_blocked_s'] <= row['blocked_s'] <= row['slowest_blocked_s'] < row['written_s']
    assert row['mib'] == pytest.approx(3 * row['parameters'] * 4 / 2**20, abs=1e-4)  # parameters and two moments, in float32
