"""Sampling: nucleus, temperature, stop tokens, and equality with a loop over whole prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import LevelConfig, ModelConfig
from nested_jax.models import LanguageModel, generate
from nested_jax.models.sampling import decode, pad_prompts, prefill, sample
from tests.models.small_models import random_params, small

CONFIG = ModelConfig(
    mixer='attention', num_layers=1, width=8, num_heads=2, head_dim=4, levels=(LevelConfig(8, 16),), vocab_size=11, max_length=32
)


@pytest.fixture(scope='module')
def model_and_variables():
    model = LanguageModel(CONFIG)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_greedy_equals_a_loop_over_prefixes(model_and_variables):
    model, variables = model_and_variables
    prompt = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    tokens = generate(model, variables, prompt, key=jax.random.key(1), max_new_tokens=6, temperature=0.0)
    text = prompt
    for _ in range(6):
        logits, _ = model.apply(variables, text)
        text = jnp.concatenate([text, jnp.argmax(logits[:, -1], -1)[:, None]], 1)
    np.testing.assert_array_equal(tokens, text[:, 3:])


def test_rows_stop_on_their_own(model_and_variables):
    model, variables = model_and_variables
    prompt = jnp.asarray([[1], [2], [3], [4]])
    free = np.asarray(generate(model, variables, prompt, key=jax.random.key(2), max_new_tokens=12))
    stop = int(free[0, 3])
    held = np.asarray(generate(model, variables, prompt, key=jax.random.key(2), max_new_tokens=12, stop=stop))
    for row, other in zip(held, free, strict=True):
        ends = np.flatnonzero(other == stop)
        end = ends[0] if ends.size else len(other)
        np.testing.assert_array_equal(row[: end + 1], other[: end + 1])
        assert (row[end:] == stop).all()


@pytest.mark.parametrize('family', ['transformer', 'hope-linear'])
def test_decoding_goes_on_where_it_stood_in_the_same_memory(family):
    model = LanguageModel(small(family))
    variables, prompt = {'params': random_params(model, dtype=np.float32)}, jnp.asarray([[1, 2, 3], [4, 5, 6]])
    options = dict(key=jax.random.key(0), temperature=0.0)
    whole = generate(model, variables, prompt, max_new_tokens=7, **options)
    begun = prefill(model, variables, prompt[:, :2])
    begun = prefill(model, variables, prompt[:, 2:], begun.state)
    first, middle = decode(model, variables, begun, max_new_tokens=4, **options)
    second, _ = decode(model, variables, middle, max_new_tokens=3, **options)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), whole)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(middle)) and not prompt.is_deleted()


@pytest.mark.parametrize('family', ['transformer', 'gated-deltanet'])
def test_prompts_of_unequal_lengths_go_on_as_each_alone(family):
    model = LanguageModel(small(family))
    variables, options = {'params': random_params(model, dtype=np.float32)}, dict(key=jax.random.key(0), max_new_tokens=5, temperature=0.0)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    tokens, segment_ids = pad_prompts(prompts, 16)
    together = generate(model, variables, tokens, segment_ids=segment_ids, **options)
    for row, prompt in zip(np.asarray(together), prompts, strict=True):
        np.testing.assert_array_equal(row, generate(model, variables, jnp.asarray([prompt]), **options)[0])


@pytest.mark.parametrize('prompts', [[[1, 2, 3]], [[]]])
def test_prompts_that_do_not_fit_are_named(prompts):
    with pytest.raises(ValueError, match='prompts is .*allowed is prompts of 1 to 2 tokens'):
        pad_prompts(prompts, 2)


def test_nucleus_holds_the_fewest_tokens():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    drawn = lambda top_p: {int(sample(logits, key, temperature=1.0, top_p=top_p)[0]) for key in jax.random.split(jax.random.key(0), 200)}
    assert drawn(0.4) == {0}
    assert drawn(0.6) == {0, 1}
    assert drawn(0.9) == {0, 1, 2}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_temperature_sharpens():
    logits = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.4]])), (4000, 1))
    share = lambda temperature: float((sample(logits, jax.random.key(0), temperature=temperature, top_p=1.0) == 0).mean())
    assert abs(share(1.0) - 0.6) < 0.03
    assert abs(share(0.5) - 0.36 / 0.52) < 0.03


@pytest.mark.parametrize(
    'wrong, name',
    [
        (dict(max_new_tokens=0), 'max_new_tokens'),
        (dict(temperature=-1.0), 'temperature'),
        (dict(top_p=0.0), 'top_p'),
        (dict(top_p=1.5), 'top_p'),
    ],
)
def test_arguments_out_of_range_are_named(model_and_variables, wrong, name):
    model, variables = model_and_variables
    arguments = dict(key=jax.random.key(0), max_new_tokens=1) | wrong
    with pytest.raises(ValueError, match=name):
        generate(model, variables, jnp.asarray([[1]]), **arguments)
    with pytest.raises(ValueError, match='prompt'):
        generate(model, variables, jnp.zeros((1, 0), jnp.int32), key=jax.random.key(0), max_new_tokens=1)
