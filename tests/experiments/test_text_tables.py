"""Tables of models trained on text: means over seeds, the order, the paper's numbers, and what is not run."""

import pytest

from experiments.ablations import ARMS
from experiments.language_modeling import TABLE
from experiments.tables import NOT_RUN
from experiments.text_tables import (
    PAPER_ABLATIONS,
    PAPER_PERPLEXITIES,
    ablation_table,
    context_table,
    language_modeling_table,
    levels_table,
    probe_table,
)


def row(model: str, task: str, seed: int, bits: float, *, rate: float = 1e-3, steps: int = 10, **metrics) -> dict:
    config = dict(model=dict(mixer=model, arm=task), data={}, train=dict(steps=steps, seed=seed, learning_rate=rate), task=dict(name=task))
    found = dict(heldout_bits_per_byte=bits, tokens=1_024_000, parameters=1_020_000, tokens_per_second=1234.5)
    return dict(model=model, seed=seed, config=config, metrics=found | metrics)


def cells(lines: list[str]) -> dict[str, list[str]]:
    return {line.split(' | ')[0].removeprefix('| '): line.removesuffix(' |').split(' | ')[1:] for line in lines}


def test_models_stand_in_order_with_a_rate_each_and_searches_are_left_out():
    rows = [row('titans', 'train', seed, bits, rate=2e-3) for seed, bits in enumerate((2.0, 2.1, 2.2))]
    rows += [row('hope', 'train', 0, 1.9, rate=3e-3), row('hope', 'rate 0.001', 0, 1.0, steps=2)]
    lines = language_modeling_table(rows)
    assert '1.02M tokens' in lines[0]
    assert lines[2] == '| hope | 1.02M | 1.900 (n = 1) | 1,234 | 18.68 / 14.39 |'
    assert lines[3] == '| titans | 1.02M | 2.100 ± 0.248 (n = 3) | 1,234 | 20.08 / 15.60 |'
    assert set(cells(lines[2:])) == set(TABLE) and cells(lines)['dla'][1] == NOT_RUN
    assert language_modeling_table([]) == [] == language_modeling_table(rows[-1:])


def test_runs_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match='steps is 10 and 20'):
        language_modeling_table([row('hope', 'train', 0, 1.9), row('titans', 'train', 0, 1.9, steps=20)])


def test_ablations_have_a_column_for_each_base():
    found = cells(ablation_table([row('hope-linear', 'whole', seed, 2.0) for seed in (0, 1)] + [row('hope', 'without dgd', 0, 2.5)]))
    assert found['whole'] == ['2.000 ± 0.000 (n = 2)', NOT_RUN, '12.19 / 57.4']
    assert found['without dgd'] == [NOT_RUN, '2.500 (n = 1)', '13.41 / 56.5'] and set(found) > set(ARMS)
    assert set(PAPER_ABLATIONS) < set(ARMS) and set(PAPER_PERPLEXITIES) == set(TABLE)


def test_probes_are_flattened_and_averaged():
    probe = lambda moved: dict(levels=dict(level_0=dict(moved=moved)), cosine={'0:1': 0.5})
    rows = [row('hope', 'whole', seed, 2.0, probe=probe(moved)) for seed, moved in ((0, 1.0), (1, 3.0))]
    found = cells(probe_table([*rows, row('hope', 'without dgd', 0, 2.0)]))
    assert found['levels level 0 moved'] == ['2.000 ± 12.706 (n = 2)'] and found['cosine 0:1'] == ['0.500 ± 0.000 (n = 2)']
    assert probe_table([]) == [] == probe_table([row('hope', 'without dgd', 0, 2.0)])


def test_levels_by_slowest_period():
    rows = [
        row('hope-linear', task, 0, bits)
        for task, bits in (('1 x 512', 2.0), ('2 x 2048 nested', 2.3), ('2 x 2048', 2.1), ('2 x 8192', 2.2))
    ]
    assert levels_table(rows) == [
        '| hope-linear, levels | slowest 512 tokens | slowest 2,048 tokens | slowest 8,192 tokens | slowest 2,048 tokens, nested |',
        '| --- | --- | --- | --- | --- |',
        f'| 1 | 2.000 (n = 1) | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} |',
        f'| 2 | {NOT_RUN} | 2.100 (n = 1) | 2.200 (n = 1) | 2.300 (n = 1) |',
    ]


def test_loss_by_position():
    found = cells(context_table([row('titans', 'text', 0, 2.0, by_position={'0-31': 3.0, '32-63': 2.0})]))
    assert found['titans'] == ['3.000 (n = 1)', '2.000 (n = 1)'] and found['transformer'] == [NOT_RUN] * 2
