"""Tables of the grids: means, what is not run, the paper's numbers, and what is refused."""

import pytest

from experiments import formal_languages, haystack_runs, mad
from experiments.tables import (
    NOT_RUN,
    PAPER_LANGUAGES,
    PAPER_MAD,
    PAPER_NEEDLES,
    babilong_table,
    entry,
    group,
    language_table,
    mad_table,
    needle_table,
)
from nested_jax.data.tasks.formal_languages import LANGUAGES


def row(model: str, task: str, seed: int, share: float = 1.0, *, width: int = 64, steps: int = 600) -> dict:
    bins = {f'bin{index}': dict(every=share / (index + 1), majority=0.25) for index in range(3)}
    averages = dict(micro=share, macro=share / 2)
    config = dict(model=dict(width=width, name=model), task=dict(name=task), train=dict(steps=steps), seed=seed)
    return dict(model=model, seed=seed, config=config, metrics=dict(bins=bins, test=averages, majority=averages))


def test_entry_has_mean_interval_and_number():
    assert entry([]) == NOT_RUN
    assert entry([[50.0, 0.0]]) == '50.0 / 0.0 (n = 1)'
    assert entry([[100.0, 0.0], [100.0, 3.0], [100.0, 6.0]]) == '100.0 ± 0.0 / 3.0 ± 7.5 (n = 3)'  # 4.303 * 3 / sqrt(3)


def test_language_table_has_every_model_and_the_paper_s_numbers():
    assert language_table([]) == []
    lines = language_table([row('deltanet', 'parity', seed, 0.6) for seed in range(3)] + [row('other', 'aa-star', 0)])
    cells = {line.split(' | ')[0].removeprefix('| '): line.removesuffix(' |').split(' | ')[1:] for line in lines}
    assert {*formal_languages.MODELS, 'other', 'most frequent answer'} <= set(cells)
    assert cells['deltanet'] == ['60.0 ± 0.0 / 30.0 ± 0.0 / 20.0 ± 0.0 (n = 3)', *[NOT_RUN] * 5]
    assert cells['deltanet, the paper'] == ['98.2 / 10.1', '0 / 0', '0 / 0', *['100 / 100'] * 3]
    assert cells['other'][1] == '100.0 / 50.0 / 33.3 (n = 1)' and 'other, the paper' not in cells
    assert cells['most frequent answer'][:3] == ['25.0 / 25.0 / 25.0', '25.0 / 25.0 / 25.0', '']
    assert len({len(line) for line in cells.values()}) == 1


def test_mad_table_has_every_model_and_the_paper_s_numbers():
    lines = mad_table([row('hope', 'selective-copying', 0, 0.5)])
    assert [line for line in lines if line.startswith('| hope |')] == [
        f'| hope | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} | 50.0 / 25.0 (n = 1) | {NOT_RUN} |'
    ]
    assert '| hope, the paper | 51.2 | 85.2 | 100 | 52.1 | 99.7 |  |' in lines
    assert all(len([line for line in lines if line.startswith(f'| {model} |')]) == 1 for model in mad.MODELS)


def haystack_row(model: str, task: str, seed: int, share: float, *, lengths: tuple[int, ...] = (512, 4096), steps: int = 600) -> dict:
    config = row(model, task, seed, steps=steps)['config']
    found = {str(length): dict(whole=share / (index + 1), positions=1.0) for index, length in enumerate(lengths)}
    metrics = dict(lengths=found, trivial={'most frequent answer': 0.125, 'last mention': 0.5})
    return dict(model=model, seed=seed, config=config, metrics=metrics)


def test_haystack_tables_have_a_column_for_each_length_and_the_paper_s_numbers():
    assert needle_table([]) == babilong_table([]) == []
    lines = needle_table(
        [haystack_row('titans', 'single_2', seed, 0.8) for seed in (0, 1)] + [haystack_row('hope', 'multikey_1', 0, 1, lengths=(512,))]
    )
    first, second = lines[: lines.index('')], lines[lines.index('') + 1 :]
    assert first[0] == '| needles found, %, single_2, at bytes | 512 | 4096 |'
    assert '| titans | 80.0 ± 0.0 (n = 2) | 40.0 ± 0.0 (n = 2) |' in first and '| titans, the paper |  | 99.6 |' in first
    assert (
        f'| transformer | {NOT_RUN} | {NOT_RUN} |' in first
        and first[-1] == '| most frequent answer / last mention | 12.5 / 50.0 | 12.5 / 50.0 |'
    )
    assert '| hope | 100.0 (n = 1) |' in second and not any('the paper' in line for line in second)
    stories = babilong_table([haystack_row('titans', 'qa1', 0, 0.6)])
    assert '| titans | 60.0 (n = 1) | 30.0 (n = 1) |' in stories and not any('the paper' in line for line in stories)
    assert all(sum(line.startswith(f'| {model} |') for line in stories) == 1 for model in haystack_runs.MODELS)


def test_haystack_tables_mix_no_configurations():
    with pytest.raises(ValueError, match='the models on single_1: steps is 600 and 9'):
        needle_table([haystack_row('titans', 'single_1', 0, 1), haystack_row('hope', 'single_1', 0, 1, steps=9)])


def test_the_paper_s_models_are_the_default_ones():
    assert set(PAPER_LANGUAGES) <= set(formal_languages.MODELS) and set(PAPER_MAD) <= set(mad.MODELS)
    assert all(len(shares) == len(LANGUAGES) for shares in PAPER_LANGUAGES.values())
    assert all(set(shares) <= set(mad.TASKS) for shares in PAPER_MAD.values())
    assert all(shares['single_1'].keys() == {'4096', '8192', '16384'} for shares in PAPER_NEEDLES.values())


def test_the_latest_run_of_a_seed_counts():
    (runs,) = group([row('a', 'parity', 0, 0.1), row('a', 'parity', 1), row('a', 'parity', 0, 0.2)]).values()
    assert [(run['seed'], run['metrics']['test']['micro']) for run in runs] == [(0, 0.2), (1, 1.0)]


@pytest.mark.parametrize(
    ('other', 'said'),
    [
        (row('a', 'parity', 1, width=32), 'a on parity: width is 64 and 32'),
        (row('a', 'parity', 1, steps=9), 'a on parity: steps is 600 and 9'),
        (row('b', 'parity', 1, steps=9), 'the models on parity: steps is 600 and 9'),
    ],
)
def test_configurations_are_not_mixed(other, said):
    with pytest.raises(ValueError, match=said):
        group([row('a', 'parity', 0), other])


def test_tasks_and_models_may_differ():
    group([row('a', 'parity', 0), row('b', 'parity', 0, width=32), row('a', 'aa-star', 0, steps=9)])
    extra = row('a', 'parity', 1)
    extra['config']['model']['bias'] = True
    with pytest.raises(ValueError, match='bias is null and true'):
        group([row('a', 'parity', 0), extra])
