"""The suite 'gpu' of scripts/bench.py: its supervisor with workers that hang, die and fail, its counts, and a small form of every cell."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import matrix
from nested_jax.models import preset
from scripts.benchmarks import gpu, gpu_cells
from scripts.benchmarks.timing import Settings

SETTINGS = Settings(repeats=1, smoke=True)
WORKER = """
import os, sys, time
for name in sys.argv[1:]:
    print('begin: ' + name, flush=True)
    if name == 'hangs':
        time.sleep(60)
    if name == 'dies':
        os._exit(3)
"""


def supervise(names, seconds: float = 60.0, budget: float = 5.0):
    started, given_up = [], []

    def start(left):
        started.append(list(left))
        return subprocess.Popen([sys.executable, '-c', WORKER, *left], stdout=subprocess.PIPE, text=True)

    budgets = {name: 0.5 if name == 'hangs' else budget for name in names}
    gpu.supervise(budgets, start, lambda *told: given_up.append(told), time.monotonic() + seconds)
    return started, given_up


@pytest.mark.slow
def test_cells_that_hang_or_die_cost_no_other():
    started, given_up = supervise(['a', 'hangs', 'b', 'dies', 'c'])
    assert started == [['a', 'hangs', 'b', 'dies', 'c'], ['b', 'dies', 'c'], ['c']]
    assert given_up == [('hangs', 'took longer than its budget'), ('dies', 'ended its process with code 3')]


@pytest.mark.slow
def test_no_cell_is_begun_that_could_not_end(capsys):
    assert supervise(['a'], seconds=1.0) == ([], []) and 'no time left for a' in capsys.readouterr().out


@pytest.mark.slow
def test_cells_are_compiled_side_by_side_until_time_is_up():
    started = []

    def start(name):
        started.append(subprocess.Popen([sys.executable, '-c', f'import time; time.sleep({30 if name == "hangs" else 0.1})']))
        return started[-1]

    gpu.side_by_side(['a', 'hangs', 'b', 'c'], start, time.monotonic() + 3)
    assert [process.poll() for process in started] == [0, -9, 0, 0]


def test_prepared_cells_have_no_rows(tmp_path):
    cell = next(cell for cell in gpu_cells.CELLS if cell.name == 'gated-deltanet-124m at 4096, layers one by one')
    cell = cell._replace(run=cell.run._replace(name='gated-deltanet-tiny'))
    gpu.work([cell.name], SETTINGS._replace(prepare=True), tmp_path / 'rows', (cell,))
    fails = cell._replace(run=lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.work([cell.name], SETTINGS._replace(prepare=True), tmp_path / 'rows', (fails,))
    assert not (tmp_path / 'rows').exists()


def test_rows_are_written_at_once_and_failures_told(tmp_path):
    def fails(settings):
        assert len(output.read_text().splitlines()) == 1  # the first cell's row
        raise ValueError('no such kernel')

    output = tmp_path / 'rows.jsonl'
    good = gpu_cells.Cell('good', 1, lambda settings: [dict(what='attention', model='m', batch=2)])
    gpu.work(['good', 'bad', 'good'], SETTINGS, output, (good, gpu_cells.Cell('bad', 1, fails)))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row['metrics']['what'] for row in rows] == ['attention', 'failed', 'attention']
    assert rows[1]['metrics']['reason'] == 'ValueError: no such kernel' and rows[0]['config']['batch'] == 2


def test_operations_of_a_token():
    config = preset('transformer-tiny', num_layers=2, width=16, num_heads=1, head_dim=16, scan_layers=True)
    length, hidden, norms = 64, config.levels[0].hidden_dim, 2 * 2 + 1
    found = gpu_cells.flops_of(config, length)
    products = 2 * (4 * 16 * 16 + 3 * 16 * hidden) + 16 * config.vocab_size
    assert found['model_flops_per_token'] == 6 * (products + 16 * norms) + 6 * 2 * 16 * length
    # Attention as a whole square, the head's logits a second time in the backward pass, and norms, which are products of two factors.
    again = 2 * 16 * config.vocab_size
    assert found['algorithmic_flops_per_token'] == 6 * products + 12 * 2 * 16 * length + again + 12 * 16 * norms


def test_outputs_that_differ_are_not_timed():
    assert gpu_cells.largest_error([jnp.ones(3)], [jnp.ones(3)]) == 0
    for wrong in (1.1, np.nan):
        with pytest.raises(RuntimeError, match='differs from the float32 reference'):
            gpu_cells.largest_error([jnp.full(3, wrong)], [jnp.ones(3)])


def test_precision_reaches_every_product_of_the_chunks():
    inputs = gpu_cells.delta_rule_inputs(gpu_cells.Shape(1, 64, 1, 16), jnp.float32)

    def highest(precision: str) -> int:
        rule = lambda *args: matrix.delta_rule(*args, chunk_size=16)[0]
        with gpu_cells.all_products(precision):
            return str(jax.make_jaxpr(lambda inputs: gpu_cells.gradients(rule, inputs))(inputs)).count('HIGHEST')

    before = highest('highest')
    assert before > 0 and highest('default') == 0 and highest('highest') == before


OFTEN = (
    'delta rule, chunk 32, bfloat16, highest',
    'delta rule, flash-linear-attention, heads of 64',
    'delta rule, kernel',
    'transformer-124m at 1024, layers one by one',
    'attention, cudnn',
)
CELLS = [
    pytest.param(cell, marks=pytest.mark.slow if cell.name in OFTEN else pytest.mark.exhaustive, id=cell.name) for cell in gpu_cells.CELLS
]


@pytest.mark.parametrize('cell', CELLS)
def test_small_form_of_every_cell(cell, monkeypatch):
    if 'm at ' in cell.name:
        tiny = cell.name.split('-124m')[0].split('-340m')[0] + '-tiny'
        cell = cell._replace(run=cell.run._replace(name=tiny))
    rows = cell.run(SETTINGS)
    assert bool(rows) == ('flash' not in cell.name and not cell.name.endswith(', kernel'))  # which need a GPU
    for row in rows:
        assert row['error'] < 5e-2
        assert row.get('tokens_per_second', 1) > 0 and row.get('forward_ms', 1) > 0


def test_cells():
    names = [cell.name for cell in gpu_cells.CELLS]
    assert len(set(names)) == len(names) and all(cell.budget_s <= 180 for cell in gpu_cells.CELLS)
    first = next(cell.run for cell in gpu_cells.CELLS if cell.name == 'transformer-124m at 1024, layers one by one')
    assert first.batch * first.length == 524_288
