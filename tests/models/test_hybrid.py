"""Models whose layers alternate between mixers: what is scanned, and that every form of it computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.layers.common import Context
from nested_jax.models.language_model import Block, LanguageModel, Rows
from tests.models.small_models import random_params, shapes, small

TOKENS = np.random.default_rng(1).integers(0, 32, (2, 14)).astype(np.int32)


def test_parameters_and_states_are_stacked_over_pairs_of_layers():
    model = LanguageModel(small('samba'))
    blocks = shapes(model)['blocks']
    assert set(blocks) == {'mamba', 'attention'} and model.config.num_layers == 4
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(blocks))
    state = model.init_state(3)['layers']
    assert state['mamba'].memory.shape == (3, 2, 16, 32) and state['attention'].key.shape == (3, 2, 6, 2, 8)


@pytest.mark.slow
def test_a_hybrid_is_its_layers_one_after_another(x64):
    model = LanguageModel(small('samba', dtype='float64'))
    params, context = random_params(model), Context(None, None, True)

    def by_hand(params):
        rows = Rows(params['embedding'][TOKENS], None)
        for pair in range(2):
            for mixer in ('mamba', 'attention'):
                layer = jax.tree.map(lambda leaf, pair=pair: leaf[pair], params['blocks'][mixer])
                rows, _ = Block(dataclasses.replace(model.config, mixer=mixer)).apply({'params': layer}, rows, None, context)
        return model.apply({'params': params}, rows.x, method=lambda model, x: model.norm(x)) @ params['head'][None]

    expected = jax.jit(by_hand)(params)
    np.testing.assert_allclose(jax.jit(lambda p: model.apply({'params': p}, TOKENS)[0])(params), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('form', [dict(remat='block'), dict(remat='dots', scan_layers=False)], ids=['block', 'dots unrolled'])
def test_unrolled_and_rematerialised_pairs_compute_the_same(x64, form):
    def graded(model):
        loss = lambda params: jnp.sin(model.apply({'params': params}, TOKENS)[0]).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    model = LanguageModel(small('samba', dtype='float64'))
    params = random_params(model)
    for a, b in zip(
        jax.tree.leaves(graded(LanguageModel(small('samba', dtype='float64', **form)))), jax.tree.leaves(graded(model)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
