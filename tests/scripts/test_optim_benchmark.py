"""The suite 'optim' of scripts/bench.py: every optimizer on every tree, and steps that stand where they are said to."""

import json

import jax
import numpy as np
import pytest

from nested_jax.optim import m3
from scripts import bench
from scripts.benchmarks.optim import layer_shapes, optimizer_step

OPTIMIZERS = {'optax.adamw', 'optax.contrib.muon', 'muon', 'm3'}


@pytest.mark.slow
def test_rows_of_the_suite_at_smoke_size(tmp_path):
    bench.main(['--suite', 'optim', '--smoke', '--repeats', '1', '--output', str(tmp_path / 'rows.jsonl')])
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    metrics = [row['metrics'] for row in rows if row['metrics']['what'] == 'optimizer']
    forms = {row['metrics']['model']: row['metrics'] for row in rows if row['metrics']['what'] == 'delta gradient descent'}
    assert (
        set(forms) == {'plain', 'cheap', 'exact'}
        and forms['plain']['ratio'] == 1
        and all(form['cpu_seconds'] > 0 for form in forms.values())
    )
    timed, compiled = [[row for row in metrics if ('step_s' in row) == steps] for steps in (True, False)]
    assert {row['model'] for row in timed} == {row['model'] for row in compiled} == OPTIMIZERS
    assert len(timed) == len(compiled) == len(OPTIMIZERS)
    assert all(row[f'to_{name}'] == 1 for row in timed for name in ('optax.contrib.muon', 'muon') if row['model'] == name)
    assert all(row['step_s'] > 0 and row['to_muon'] > 0 for row in timed) and all(row['compile_s'] > 0 for row in metrics)
    assert {row['experiment'] for row in rows} == {'bench_optim'}


@pytest.mark.parametrize('advance', [1, 3, 4])
def test_a_step_is_timed_as_far_into_training_as_told(advance):
    """M3's mean over a period needs a step that renews the slow direction and one that does not."""
    run, costs = optimizer_step(lambda: m3(1e-3, periods=(3,)), layer_shapes(4, 6, 1), advance)
    _, state = run()
    inner = state.inner_states['matrix'].inner_state[0]
    assert int(inner.count) == advance + 1 and costs['compile_s'] > 0 and costs['peak_mib'] > costs['temporary_mib']
    renewed = advance >= 3  # the step of count 3 is the first after a whole period
    assert {bool(np.any(leaf)) for leaf in jax.tree.leaves(inner.slow[0].direction)} == {renewed}
