"""RWKV-7's value residual: what blocks hand on to one another is the same however the layers are run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import InSequenceConfig, LevelConfig
from nested_jax.layers.common import Context
from nested_jax.models import streaming
from nested_jax.models.language_model import Block, LanguageModel, open_rows
from nested_jax.training.optimizer import decay_mask
from tests.models.small_models import random_params, shapes, small

TOKENS = np.random.default_rng(1).integers(0, 32, (2, 8)).astype(np.int32)
OPTIONS = dict(num_layers=3, dtype='float64', levels=(LevelConfig(24, 8),))


def model_of(**overrides) -> LanguageModel:
    return LanguageModel(small('rwkv7', **(OPTIONS | overrides)))


def logits_and_gradients(model, params):
    def loss(params):
        logits = model.apply({'params': params}, TOKENS)[0]
        return jnp.sin(logits).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradients


@pytest.mark.slow
def test_every_way_to_run_the_layers_gives_the_same(x64):
    """Scanned; one by one; unrolled and rematerialised, with gradients; and in runs, of blocks that may learn and of others."""
    model = model_of()
    params = random_params(model)
    expected, gradients = logits_and_gradients(model, params)

    def by_hand(params, change=0.0):
        rows = open_rows(model.config, params['embedding'], TOKENS)
        for layer in range(3):
            part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['blocks'])
            rows, _ = Block(model.config).apply({'params': part}, rows, None, Context(None, None, True))
            rows = rows._replace(first=rows.first._replace(value=rows.first.value + change))
        return model.apply({'params': params}, rows.x, method=lambda model, x: model.norm(x)) @ params['head'][None]

    np.testing.assert_allclose(jax.jit(by_hand)(params), expected, rtol=0, atol=1e-10)
    assert np.abs(jax.jit(lambda params: by_hand(params, change=0.1))(params) - expected).max() > 1e-3

    other, other_gradients = logits_and_gradients(model_of(remat='block', scan_layers=False), params)
    np.testing.assert_allclose(other, expected, rtol=0, atol=1e-10)
    for a, b in zip(jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())

    learning = model_of(in_sequence=InSequenceConfig(blocks=(1,)))
    first, stream = streaming.read(learning, params, streaming.init_stream(learning, params, 2), TOKENS[:, :3])
    rest, _ = streaming.read(learning, params, stream, TOKENS[:, 3:])  # up to the chunk's end: nothing is learned from it yet
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), expected, rtol=0, atol=1e-6)


def test_weight_decay_leaves_gates_mixes_and_norms_alone():
    mixer = decay_mask(shapes(LanguageModel(small('rwkv7'))))['blocks']['mixer']
    decayed = {jax.tree_util.keystr(path, simple=True, separator='/') for path, on in jax.tree_util.tree_leaves_with_path(mixer) if on}
    assert decayed == {f'{name}/kernel' for name in ('query', 'key', 'value', 'output_projection')}
