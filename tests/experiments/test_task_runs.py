"""Small models by name, and how a run's data, its choices and its predictions are made."""

import dataclasses

import numpy as np
import pytest

from experiments import task_runs
from experiments.grid import Cell
from experiments.task_runs import TaskArgs, choose, families, model_config, registered
from nested_jax.data.tasks import FormalLanguage, mad

SIZES = dict(width=64, heads=4, vocab_size=4, max_length=64)


def test_models_are_small_presets():
    config = model_config('hope-linear', **SIZES)
    assert (config.mixer, config.num_layers, config.width, config.head_dim, config.vocab_size) == ('self-modifying', 2, 64, 16, 4)
    assert config.memory.gradient == 'token' and config.levels[0].hidden_dim == 182 and len(config.levels) == 1
    assert all(model_config(family, **SIZES).width == 64 for family in families())


def test_variants_change_what_they_say():
    whole, plain, chunk = (model_config(f'hope-linear{variant}', **SIZES) for variant in ('', '-without-dgd', '-chunk-1'))
    assert plain == dataclasses.replace(whole, memory=dataclasses.replace(whole.memory, dgd='none'))
    assert chunk == dataclasses.replace(whole, memory=dataclasses.replace(whole.memory, chunk_size=1, projection_chunk_size=1))
    zero = model_config('hope-linear-zero', **SIZES)
    assert zero == dataclasses.replace(whole, memory=dataclasses.replace(whole.memory, decay_to='zero'))
    both = model_config('hope-linear-without-dgd-chunk-4', **SIZES)
    assert both.memory.dgd == 'none' and both.memory.chunk_size == 4


@pytest.mark.parametrize(
    'name',
    [
        'lstmm',
        'hope-linear-tiny',
        'transformer-without-dgd',
        'hope-linear-without-love',
        'hope-linear-chunk-16',
        'hope-chunk-0',
        'gated-deltanet-zero',
        'hope-window-8',
    ],
)
def test_a_model_that_is_none_is_named(name):
    with pytest.raises(ValueError, match=name.rsplit('-', 1)[-1]):
        model_config(name, **SIZES)


def test_registered_leaves_out_what_is_not_built():
    assert registered(('transformer', 'nothing', 'hope-linear-chunk-1', 'nothing-chunk-1')) == ('transformer', 'hope-linear-chunk-1')


@pytest.mark.parametrize(
    'changes',
    [
        dict(learning_rates=()),
        dict(learning_rates=(0.0,)),
        dict(steps=0),
        dict(warmup_steps=600),
        dict(batch_size=0),
        dict(test_examples=0),
    ],
)
def test_wrong_arguments_are_named(changes):
    with pytest.raises(ValueError, match=f'{next(iter(changes))} is '):
        TaskArgs(**changes)


def test_a_configuration_has_all_that_numbers_depend_on_and_nothing_else():
    args, cell, model, task = TaskArgs(), Cell('transformer', 'parity', 1), model_config('transformer', **SIZES), FormalLanguage()
    config = args.config(cell, model, task)
    assert config['seed'] == 1 and config['task'] == dict(name='parity', language='parity')
    for changes in (dict(steps=700), dict(learning_rates=(1e-3,)), dict(batch_size=8), dict(validation_examples=7), dict(weight_decay=0.0)):
        assert dataclasses.replace(args, **changes).config(cell, model, task) != config
    for changes in (dict(minutes=3.0), dict(seeds=(1, 2)), dict(together=True)):
        assert dataclasses.replace(args, **changes).config(cell, model, task) == config


def test_every_training_example_is_read_once_before_any_is_again():
    args = TaskArgs(steps=10, batch_size=4, warmup_steps=1, train_examples=8, validation_examples=3)
    data = task_runs._data(args, mad.Compression(), 'validation', 5)
    assert data['order'].shape == (10, 4) and data['train']['tokens'].shape == (8, 32)
    reads = data['order'].reshape(5, 8)
    assert all(sorted(round) == list(range(8)) for round in reads) and len({tuple(round) for round in reads}) == 5
    other = task_runs._data(args, mad.Compression(), 'validation', 6)
    assert not np.array_equal(other['order'], data['order'])
    assert not np.array_equal(other['train']['tokens'], data['train']['tokens'])
    assert data['validation']['tokens'].shape == (3, 32)
    short = task_runs._data(dataclasses.replace(args, train_examples=1000), mad.Compression(), 'validation', 5)
    assert len(short['train']['tokens']) == 40 and sorted(short['order'].ravel()) == list(range(40))


def test_choices():
    nan, inf = float('nan'), float('inf')
    assert choose([0.5, 0.7, 0.6], [3, 2, 1]) == 1
    assert choose([0.7, 0.7, 0.6], [3, 2, 1]) == 1
    assert choose([0.7, 0.7, 0.7], [nan, 2, inf]) == 1
    assert choose([0.0], [nan]) == 0


def test_predictions_come_in_calls_of_one_size():
    sizes = []

    def compiled(params, tokens):
        sizes.append(tokens.shape)
        return tokens + params

    tokens = np.arange(500).reshape(250, 2)
    np.testing.assert_array_equal(task_runs._predict(compiled, 7, tokens), tokens + 7)
    assert set(sizes) == {(100, 2)}
