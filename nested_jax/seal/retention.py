"""Terms that keep a model from forgetting while it learns something new: penalties, a projection of gradients, a router.

All are pure functions of pytrees. Letters in shapes: N rows, T tokens, V vocabulary, E earlier edits, Q questions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.inner_loop import Learner, Read, kl_divergence, logits_of

PyTree = Any


def diagonal_fisher(model: LanguageModel, params: PyTree, read: Read, key: jax.Array) -> PyTree:
    """Diagonal of the Fisher information of the parameters, a token: F of Eq. (3), arXiv:1612.00796v2.

    Targets are drawn from the model's own distribution, of which the squared gradient of a row's log-likelihood is an unbiased
    estimate; those of the data would vanish where the model has learned them by heart.

    Args:
        model: whose parameters they are.
        params: where it is taken.
        read: rows; their targets are not used.
        key: of the draws.

    Returns:
        Like `params`, at least 0.
    """
    drawn = jax.random.categorical(key, logits_of(Learner(model, {'params': params}), read))

    def log_likelihood(params: PyTree, row: Read, targets: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[None], row)
        log = jax.nn.log_softmax(logits_of(Learner(model, {'params': params}), one))
        return (jnp.take_along_axis(log[0], targets[:, None], 1)[:, 0] * row.weights).sum()

    gradients = jax.vmap(jax.grad(log_likelihood), (None, 0, 0))(params, read, drawn)
    tokens = jnp.maximum(read.weights.sum(), 1.0)
    return jax.tree.map(lambda leaf: jnp.square(leaf).sum(0) / tokens, gradients)


def elastic_penalty(fisher: PyTree, params: PyTree, anchor: PyTree) -> jax.Array:
    """Half the squared distance from the anchor, each parameter weighed by its Fisher information: Eq. (3), arXiv:1612.00796v2."""
    terms = jax.tree.map(lambda weight, new, old: (weight * jnp.square(new - old)).sum(), fisher, params, anchor)
    return 0.5 * sum(jax.tree.leaves(terms))


def distillation(teacher: jax.Array, student: jax.Array, weights: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Sum over tokens of KL(teacher || student) at a temperature, times its square so that the gradient keeps its size.

    At temperature 2 with the model before the update as the teacher this is the loss of Learning without Forgetting (Eq. 2 and 3,
    arXiv:1606.09282v3) but for a constant; at 1 with the untouched base, the divergence of arXiv:2509.04259v1.

    Args:
        teacher: (N, T, V) logits, taken as constants.
        student: (N, T, V) logits.
        weights: (N, T) of the tokens.
        temperature: that both are divided by.
    """
    fixed = jax.lax.stop_gradient(teacher)
    return temperature**2 * (kl_divergence(fixed / temperature, student / temperature) * weights).sum()


def overlap(adapters: PyTree, earlier: PyTree) -> jax.Array:
    """Sum of the squared products of the adapters' inputs with those of earlier ones, zero for orthogonal subspaces: O-LoRA's penalty.

    Eq. (6) to (8), arXiv:2310.14152v1: sum over i of |A_i^T A_t|^2.

    Args:
        adapters: of `init_lora`.
        earlier: the same with an axis (E,) in front; zeros count nothing.
    """
    new, old = (traverse_util.flatten_dict(tree) for tree in (adapters, earlier))
    products = [jnp.einsum('e...ir,...is->e...rs', old[path], new[path]) for path in new if path[-1] == 'a']
    return sum(jnp.square(product).sum() for product in products)


def project(gradient: PyTree, reference: PyTree) -> PyTree:
    """The gradient without what points against the reference gradient: A-GEM (Eq. 11, arXiv:1812.00420v2).

    g - (g . r / r . r) r where g . r < 0, else g; g where r is zero.
    """
    dot = lambda one, other: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, one, other)))
    along, length = dot(gradient, reference), dot(reference, reference)
    share = jnp.where((along < 0) & (length > 0), along / jnp.where(length > 0, length, 1.0), 0.0)
    return jax.tree.map(lambda new, old: new - share * old, gradient, reference)


def route(losses: jax.Array) -> jax.Array:
    """(Q,) which of several models answers each question: the one to which the question itself is likeliest, the first of equals.

    Args:
        losses: (models, Q) of the questions' tokens, the answer not among them.
    """
    return jnp.argmin(losses, 0)
