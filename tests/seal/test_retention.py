"""Terms against forgetting, each against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.inner_loop import Learner, Read, logits_of
from nested_jax.seal.retention import diagonal_fisher, distillation, elastic_penalty, overlap, project, route
from tests.models.small_models import random_params, small

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)


def test_the_fisher_information_is_that_of_the_models_own_distribution():
    model = LanguageModel(small('transformer', num_layers=1, width=8, num_heads=1, head_dim=8, vocab_size=5))
    params = random_params(model, dtype=np.float32)
    tokens = np.array([[1, 3, 2], [4, 0, 2]])
    read = Read(tokens, tokens, np.array([[1, 1, 0], [0, 1, 0]], np.float32), np.ones_like(tokens))
    keys = jax.random.split(jax.random.key(0), 1000)
    drawn = jax.jit(lambda keys: jax.lax.map(lambda key: diagonal_fisher(model, params, read, key)['head'], keys, batch_size=250).mean(0))
    log = lambda head: jax.nn.log_softmax(logits_of(Learner(model, {'params': {**params, 'head': head}}), read))
    each = jax.jacobian(log)(params['head'])  # (N, T, V) + head
    exact = jnp.einsum('ntv,ntvij,nt->ij', jnp.exp(log(params['head'])), jnp.square(each), read.weights) / read.weights.sum()
    np.testing.assert_allclose(drawn(keys), exact, rtol=0, atol=0.12 * float(exact.max()))
    assert float(exact.max()) > 0.01


def test_the_elastic_penalty_pulls_back_by_importance():
    fisher, params, anchor = ({'w': abs(normal(3, 2)), 'b': abs(normal(2))} for _ in range(3))
    gradient = jax.grad(lambda params: elastic_penalty(fisher, params, anchor))(params)
    for name in params:
        np.testing.assert_allclose(gradient[name], fisher[name] * (params[name] - anchor[name]), rtol=1e-5, atol=1e-7)
    by_hand = sum(0.5 * (fisher[name] * (params[name] - anchor[name]) ** 2).sum() for name in params)
    np.testing.assert_allclose(elastic_penalty(fisher, params, anchor), by_hand, rtol=1e-5)


def test_distillation_moves_the_student_to_the_tempered_teacher():
    teacher, student, weights = normal(2, 3, 5), normal(2, 3, 5), np.array([[1, 0, 1], [1, 1, 0]], np.float32)
    loss = lambda teacher, student: distillation(teacher, student, weights, 2.0)
    gap = jax.nn.softmax(student / 2) - jax.nn.softmax(teacher / 2)
    np.testing.assert_allclose(jax.grad(loss, 1)(teacher, student), 2 * gap * weights[..., None], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(teacher, student), np.zeros_like(teacher))
    known, told = jax.nn.softmax(teacher / 2), jax.nn.log_softmax(teacher / 2) - jax.nn.log_softmax(student / 2)
    np.testing.assert_allclose(loss(teacher, student), 4 * ((known * told).sum(-1) * weights).sum(), rtol=1e-5)
    assert float(abs(loss(teacher, teacher))) < 1e-6


def test_overlap_is_zero_for_orthogonal_subspaces_alone():
    basis = np.linalg.qr(normal(6, 6))[0]
    adapters = lambda columns: {'layer': {'a': basis[None, :, columns], 'b': normal(1, 2, 4)}}
    earlier = jax.tree.map(lambda *leaves: np.stack(leaves), adapters(slice(0, 2)), adapters(slice(2, 4)))
    assert float(overlap(adapters(slice(4, 6)), earlier)) < 1e-10
    np.testing.assert_allclose(overlap(adapters(slice(3, 5)), earlier), 1.0, rtol=1e-5)
    a = normal(1, 6, 2)
    by_hand = sum(((old.T @ a[0]) ** 2).sum() for old in earlier['layer']['a'][:, 0])
    np.testing.assert_allclose(overlap({'layer': {'a': a, 'b': normal(1, 2, 4)}}, earlier), by_hand, rtol=1e-5)
    assert float(overlap(adapters(slice(0, 2)), jax.tree.map(np.zeros_like, earlier))) == 0.0


def test_projection_takes_away_what_points_against_the_reference():
    gradient, reference = ({'w': normal(3, 2), 'b': normal(4)} for _ in range(2))
    flat = lambda tree: np.concatenate([tree['w'].ravel(), tree['b'].ravel()])
    g, r = flat(gradient), flat(reference)
    if g @ r > 0:
        reference, r = jax.tree.map(np.negative, reference), -r
    found = flat(project(gradient, reference))
    np.testing.assert_allclose(found, g - (g @ r) / (r @ r) * r, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found @ r, 0, atol=1e-5)
    agreeing = jax.tree.map(np.negative, reference)
    np.testing.assert_array_equal(flat(project(gradient, agreeing)), g)
    np.testing.assert_array_equal(flat(project(gradient, jax.tree.map(np.zeros_like, reference))), g)


def test_a_question_goes_to_whom_it_is_likeliest():
    assert route(np.array([[2.0, 1.0, 3.0], [1.0, 1.0, 4.0]])).tolist() == [1, 0, 0]
