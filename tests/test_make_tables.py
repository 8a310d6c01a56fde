"""Tables from rows: which runs count, and that the README's are the rows' own."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def make_tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'scripts'))
        import make_tables

        yield make_tables


def row(model: str, seed: int, bits: float, *, rate: float = 1e-3, tokens: int = 1_000_000, heldout_bytes: int = 500) -> dict:
    metrics = dict(heldout_bits_per_byte=bits, tokens=tokens, parameters=1_000_000, heldout_bytes=heldout_bytes)
    return dict(model=model, seed=seed, metrics=metrics, config=dict(train=dict(learning_rate=rate)))


def test_a_line_is_the_best_learning_rate_over_seeds(make_tables):
    rows = [row('a', 0, 2.0), row('a', 1, 2.2), row('a', 0, 2.05, rate=2e-3), row('b', 0, 1.9), row('b', 1, 1.0, heldout_bytes=100)]
    lines = make_tables.pretraining_table(make_tables.best_runs(rows))[2:]
    assert lines == [
        '| b | 1.00M | 1.00M | 0.001 | 1.900 (one seed) |',
        '| a | 1.00M | 1.00M | 0.002 | 2.050 (one seed) |',
    ]
    lines = make_tables.pretraining_table(make_tables.best_runs(rows[:2] + [row('a', 1, 2.4)]))[2:]
    assert lines == ['| a | 1.00M | 1.00M | 0.001 | 2.200 ± 0.283 (2 seeds) |']  # the later run of a seed


def test_recall_is_of_the_rate_that_the_first_seed_is_best_at(make_tables):
    tests = ('64:4', '64:16', '128:32', '256:32', '256:64')
    run = lambda seed, rate, share: dict(
        model='a', seed=seed, config=dict(train=dict(learning_rate=rate)), metrics=dict(accuracy=dict.fromkeys(tests, share))
    )
    lines = make_tables.recall_table([run(1, 1e-3, 1.0), run(1, 1e-2, 0.123456), run(0, 1e-2, 0.5), run(0, 1e-3, 0.4)])
    assert lines[2:] == ['| a | 0.01 | 50.0, 12.3 | 50.0, 12.3 | 50.0, 12.3 | 50.0, 12.3 |']
    assert make_tables.recall_table([]) == [] and len(make_tables.recall_table([run(1, 1e-3, 1.0)])) == 2  # no first seed, no line


def test_race_has_a_line_for_each_optimizer_and_marks_against_both_baselines(make_tables):
    entry = lambda task, name, mean: dict(
        model=name,
        config=dict(task=task),
        metrics=dict(losses=[mean - 0.01, mean, mean + 0.01], **({'state_bytes': 8.0} if name == 'm3' else {})),
    )
    rows = [entry('a', 'adamw', 2.0), entry('a', 'muon', 1.0), entry('b', 'adamw', 1.0), entry('a', 'm3', 1.5), entry('a', 'm3', 1.6)]
    assert make_tables.race_table(rows) == [
        '| optimizer | a | b | state, bytes a parameter |',
        '| --- | --- | --- | --- |',
        '| adamw | 2 ± 0.025 · − | 1 ± 0.025 · · |  |',
        '| muon | 1 ± 0.025 + · |  |  |',
        '| m3 | 1.6 ± 0.025 + − |  | 8 |',
    ]


def test_race_costs_are_shares_of_adamws_whole_run(make_tables):
    entry = lambda name, curve, seconds: dict(
        model=name, config=dict(task='a'), metrics=dict(losses=[curve[-1]] * 2, curve=curve, step_seconds=seconds, flops=2.0)
    )
    rows = [entry('adamw', [4.0, 3.0], 1.0), entry('muon', [3.0, 1.0], 3.0), entry('sgd', [9.0, 8.0], 1.0)]
    lines = make_tables.race_costs_table(rows)
    assert lines[2:4] == ['| adamw | 1.00 · 1.00 · 1.00 |', '| muon | 0.50 · 1.50 · 0.50 |']
    assert '| sgd | not reached |' in lines and '| m3 |  |' in lines


def test_race_at_equal_costs_and_around_the_rate(make_tables):
    entry = lambda name, curve, seconds: dict(
        model=name, config=dict(task='a'), metrics=dict(curve=curve, step_seconds=seconds, flops=2.0, sensitivity=[3.0, curve[-1], 1234.5])
    )
    rows = [entry('adamw', [4.0, 3.0], 1.0), entry('muon', [3.0, 1.0], 4 / 3)]
    assert make_tables.race_equal_costs_table(rows)[2:4] == ['| adamw | 3 · 3 |', '| muon | 2 · 1 |']
    assert make_tables.race_rates_table(rows)[2:5] == ['| adamw | 3 · 3 · 1234 |', '| muon | 3 · 1 · 1234 |', '| m3 |  |']
    assert make_tables.race_rates_table([]) == []


def test_gpu_has_rules_and_models(make_tables):
    rule = dict(what='delta rule', model='kernel', batch=2, time=64, heads=3, dim=64, forward_ms=1.234, both_ms=2.0, temporary_mib=512)
    model = dict(what='training', model='hope', batch=4, length=32, chunk_size=64, tokens_per_second=1234.5, mfu=0.25, device_peak_gib=3.0)
    unrolled = model | dict(chunk_size=None, scan_layers=False)
    rows = [
        dict(config=dict(cell=cell), metrics=metrics, commit='0123456789') for cell, metrics in (('a', rule), ('b', model), ('c', unrolled))
    ]
    assert make_tables.gpu_table([rows[0], *rows])[2:] == [
        '| delta rule: kernel | 2 x 64, 3 heads of 64 | 1.23 | 2.00 |  |  | 0.5 | 0123456 |',
        '| hope, chunks of 64 | 4 x 32 |  |  | 1,234 | 25.0% | 3.0 | 0123456 |',
        '| hope, layers one by one | 4 x 32 |  |  | 1,234 | 25.0% | 3.0 | 0123456 |',
    ]
    assert make_tables.gpu_table([]) == []


def test_numbers_of_tokens_are_not_mixed(make_tables):
    groups = make_tables.best_runs([row('a', 0, 2.0), row('a', 1, 1.5, tokens=2_000_000)])
    assert [line.split(' | ')[1] for line in make_tables.pretraining_table(groups)[2:]] == ['2.00M', '1.00M']


def test_speeds_are_the_latest_of_each_length_on_the_better_number_of_devices(make_tables):
    def speed(model, length, value, what='training', **devices):
        return dict(metrics=dict(what=what, model=model, length=length, tokens_per_second=value, **devices))

    rows = [speed('a', 1024, 10.0), speed('a', 8192, 2000.4), speed('b', 1024, 5.0), speed('a', 1024, 30.0), speed('c', 64, 1.0, 'other')]
    assert make_tables.speed_table(rows)[0].endswith('| 1,024 | 8,192 |')
    assert make_tables.speed_table(rows)[2:] == ['| a | 30 | 2,000 |', '| b | 5 |  |']
    rows += [speed('a', 1024, 50.0, devices=2), speed('a', 1024, 40.0, devices=2), speed('a', 8192, 100.0, devices=2)]
    assert make_tables.speed_table(rows)[2] == '| a | 40 | 2,000 |'


def test_compiled_steps_are_the_latest_of_each_mesh(make_tables):
    def compiled(total: int, **mesh: int) -> dict:
        metrics = dict(memory=dict(total=total * 2**30), collectives={'all-gather': dict(count=3, bytes=2**29)}, full_rematerialisations=0)
        return dict(model='hope-1.3b', metrics=metrics, config=dict(topology='v5e:16x16', mesh=mesh))

    lines = make_tables.tpu_table([compiled(5, fsdp=16), compiled(4, fsdp=16), compiled(3, data=8, fsdp=2)])[2:]
    assert lines == [
        '| hope-1.3b | v5e:16x16 | fsdp=16 | 4.00 | 0.50 | 0.00 | 0.00 | 0 |',
        '| hope-1.3b | v5e:16x16 | data=8, fsdp=2 | 3.00 | 0.50 | 0.00 | 0.00 | 0 |',
    ]
    assert make_tables.tpu_table([]) == []


def test_decoding_has_a_column_for_each_context(make_tables):
    def decoded(model: str, context: int, ms: float, batch: int = 1, hardware: str = 'cpu') -> dict:
        metrics = dict(ms_per_token=ms, ratio_to_1k=ms / 2)
        return dict(model=model, hardware=hardware, config=dict(context=context, batch=batch), metrics=metrics)

    rows = [
        decoded('a', 1024, 0.1, hardware='gpu'),
        decoded('a', 1024, 9.0),
        decoded('a', 1024, 2.0),
        decoded('a', 65_536, 2.1),
        decoded('b', 1024, 3.0, batch=64),
    ]
    lines = make_tables.decode_table(rows)
    assert lines[0] == '| decoding, ms a token, after | hardware | side by side | 1,024 | 65,536 | ratio |'
    assert lines[2:] == [
        '| a | gpu | 1 | 0.10 | not run | 0.05 |', '| a | cpu | 1 | 2.00 | 2.10 | 1.05 |', '| b | cpu | 64 | 3.00 | not run | 1.50 |'
    ]  # fmt: skip
    assert make_tables.decode_table([]) == []


def test_slopes_are_the_latest_of_each_curve(make_tables):
    def of(what: str, **metrics) -> dict:
        return dict(hardware='cpu', metrics=dict(what=what, curve='length', model='a', **metrics))

    fit = lambda cost, slope, **rest: of('fit', cost=cost, slope=slope, low=slope - 0.1, high=slope + 0.1, **rest)
    points = [of('point', place=place, seconds=1.0) for place in (2048, 1024, 4096)]
    rows = [*points, fit('seconds', 3.0, recent=3.0), fit('seconds', 1.0, recent=1.5), fit('temporary_mib', 0.5)]
    assert make_tables.scaling_table(rows)[2:] == ['| length | cpu | a | 1,024 | 4,096 | 1.00 ± 0.10 | 1.50 | 0.50 |']
    assert make_tables.scaling_table([]) == [] == make_tables.scaling_table(points)


def test_candidates_are_the_latest_of_each_number(make_tables):
    def updated(count: int, **metrics) -> dict:
        return dict(model='a', hardware='x', commit='0123456789', config=dict(candidates=count), metrics=dict(ratio=2.0) | metrics)

    rows = [updated(4, candidates_per_second=1.0), updated(4, candidates_per_second=50.0)]
    rows.append(updated(16, seconds_per_candidate=0.2, evaluation_seconds_per_candidate=0.0231))
    lines = make_tables.candidates_table(rows)
    assert lines[2:] == ['| a | x | 4 | 0.0200 | 2.00 |  | 0123456 |', '| a | x | 16 | 0.2000 | 2.00 | 0.023 | 0123456 |']
    assert make_tables.candidates_table([]) == []


def test_a_table_stands_in_its_place(make_tables):
    text = 'Before.\n<!-- table: a -->\nold\n<!-- end -->\nBetween.\n<!-- table: b -->\n<!-- end -->\nAfter.\n'
    made = make_tables.insert(text, {'a': ['| x |', '| y |'], 'b': []})
    assert made == (
        'Before.\n<!-- table: a -->\n| x |\n| y |\n<!-- end -->\nBetween.\n<!-- table: b -->\nNot run yet.\n<!-- end -->\nAfter.\n'
    )
    assert make_tables.insert(made, {'a': ['| x |', '| y |'], 'b': []}) == made
    with pytest.raises(KeyError, match='a'):
        make_tables.insert(text, {})


def test_every_table_has_its_place(make_tables):
    places = {place[1] for page in make_tables.PAGES for place in make_tables.PLACE.finditer(page.read_text())}
    assert places == set(make_tables.tables())


def test_the_pages_are_up_to_date():
    assert subprocess.run([sys.executable, 'scripts/make_tables.py', '--check'], cwd=ROOT).returncode == 0
