"""Scanned layers and chunks: of sixteen a model is as long a program as of four, so that it compiles as fast."""

import jax
import pytest

from nested_jax.config import LevelConfig
from nested_jax.models import LanguageModel, preset
from nested_jax.models.loss import model_loss


def program(name: str, layers: int, length: int = 48, **options) -> str:
    """The training gradient on sequences of so many tokens, as lowered for XLA."""
    sizes = dict(width=16, num_heads=1, head_dim=16, levels=(LevelConfig(16, 512), LevelConfig(16, 1024)), vocab_size=32)
    model = LanguageModel(preset(name, num_layers=layers, **(sizes | dict(scan_layers=True) | options)))
    tokens = jax.ShapeDtypeStruct((1, length), 'int32')
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    return jax.jit(jax.grad(lambda p, t: model_loss(model, p, t, t)[0])).lower(params, tokens).as_text()


@pytest.mark.parametrize(
    'name', ['transformer-tiny', *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ('hope-linear-tiny', 'hope-tiny'))]
)
def test_sixteen_layers_are_as_long_as_four(name):
    few, many = (program(name, layers).count('\n') for layers in (4, 16))
    assert few == many
    assert program(name, 4, scan_layers=False).count('\n') > few


@pytest.mark.parametrize('name', ['hope-linear-tiny', pytest.param('hope-tiny', marks=pytest.mark.slow)])
def test_sixteen_chunks_are_as_long_as_four(name):
    """F6. Sizes and offsets are other numbers, on as many lines."""
    grid = preset(name).grid
    few, many = (program(name, 1, chunks * grid) for chunks in (4, 16))
    assert few != many and few.count('\n') == many.count('\n')


def test_sixteen_layers_are_as_many_instructions_once_compiled():
    model = lambda layers: preset('transformer-tiny', num_layers=layers, width=16, num_heads=1, head_dim=16, scan_layers=True)

    def instructions(layers: int) -> int:
        tokens = jax.ShapeDtypeStruct((1, 16), 'int32')
        params = jax.eval_shape(LanguageModel(model(layers)).init, jax.random.key(0), tokens)['params']
        loss = lambda p, t: model_loss(LanguageModel(model(layers)), p, t, t)[0]
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text().count(' = ')

    assert instructions(4) == instructions(16)


def test_initial_values_come_from_a_loop_also_where_layers_do_not():
    def lines(layers: int) -> int:
        model = LanguageModel(preset('transformer-tiny', num_layers=layers, width=16, num_heads=1, head_dim=16, scan_layers=False))
        return jax.jit(model.init).lower(jax.random.key(0), jax.ShapeDtypeStruct((1, 16), 'int32')).as_text().count('\n')

    assert lines(4) == lines(16)
