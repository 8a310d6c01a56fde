"""Muon: M3 with one time scale and no second moment."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.optim.checks import check_decay
from nested_jax.optim.m3 import by_label, scale_by_m3
from nested_jax.optim.matrices import Mask
from nested_jax.optim.matrix_specs import Labels

PyTree = Any


def scale_by_muon(
    beta: ArrayLike = 0.95,
    mu_dtype: DTypeLike | None = None,
    *,
    labels: Labels = 'matrix',
    method: str = 'quintic',
    ns_steps: int | None = None,
    nesterov: bool = True,
    bias_correction: bool = True,
    scaling: str | None = 'jordan',
    shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates according to the Muon algorithm: orthogonalised momentum.

    .. math::
      M_t = \beta M_{t-1} + (1 - \beta) g_t, \qquad u_t = s(m, n)\, O(M_t)

    where O is `orthogonalize` and s the scaling by the matrix' shape. With `nesterov`, O sees :math:`\beta M_t + (1 - \beta) g_t`.
    This is Eq. (42), arXiv:2512.24695v1: O takes out the :math:`\eta` that stands inside the momentum there.

    Args:
        beta: decay of the momentum.
        mu_dtype: of the momentum; float32, or the parameters' if that is wider, when None.
        labels: of matrices, as for `muon`. Every leaf must be one: chain with `optax.masked` or `optax.partition`, or use `muon`.
        method: of `orthogonalize`.
        ns_steps: iterations of `orthogonalize`, by default 5.
        nesterov: look ahead by one step.
        bias_correction: matters with `nesterov` only, for the weight of the latest gradient in the first steps: as in optax when True, as
            in the reference implementation when False.
        scaling: 'jordan' by :math:`\sqrt{\max(1, n/m)}` for m inputs and n outputs, 'moonshot' by :math:`0.2 \sqrt{\max(m, n)}`, 'rms'
            to a root mean square of 0.2 exactly, None not at all.
        shardings: of the parameters, a NamedSharding for each, on Auto meshes; see `orthogonalize`.

    Returns:
        The transformation, with an `M3State` that has neither second moment nor slow scales.

    Raises:
        ValueError: if an argument is out of its range; at `init`, if a parameter is not real or its label does not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> optimizer, gradient = scale_by_muon(method='svd'), jnp.array([[0.0, 5.0], [0.1, 0.0]])
        >>> updates, _ = optimizer.update(gradient, optimizer.init(gradient))
        >>> print(jnp.abs(updates).round(3))
        [[0. 1.]
         [1. 0.]]

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024

        Liu et al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025, for 'moonshot'

    .. seealso:: :func:`muon`
    """
    check_decay('beta', beta)
    return scale_by_m3(
        beta, None, mu_dtype=mu_dtype,
        periods=(), labels=labels, method=method, ns_steps=ns_steps, nesterov=nesterov, bias_correction=bias_correction,
        scaling=scaling, shardings=shardings,
    )  # fmt: skip


def muon(
    learning_rate: optax.ScalarOrSchedule, beta: ArrayLike = 0.95,
    weight_decay: ArrayLike = 0.0, weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None, *,
    labels: Labels | None = None, method: str = 'quintic', ns_steps: int | None = None, nesterov: bool = True, bias_correction: bool = True,
    scaling: str | None = 'jordan',
    adam_learning_rate: optax.ScalarOrSchedule | None = None, adam_b1: ArrayLike = 0.9, adam_b2: ArrayLike = 0.999,
    adam_eps: ArrayLike = 1e-8, adam_weight_decay: ArrayLike = 0.0, shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Muon for matrices, AdamW for everything else.

    Differs from `optax.contrib.muon` in what it takes for a matrix (stacks of layers are, embeddings and heads are not), in fused axes
    (`BlockSpec`), in stacking matrices of equal shape, in sharded matrices, and in finite derivatives where gradients vanish. On 2-D
    matrices the updates are the same.

    Args:
        learning_rate: a number, or a schedule of the step.
        beta, mu_dtype, method, ns_steps, nesterov, bias_correction, scaling, shardings: see `scale_by_muon`.
        weight_decay: of matrices, decoupled and times the learning rate.
        weight_decay_mask: which parameters decay, matrices or not: a pytree that is a prefix of theirs, or a function of them.
        labels: which parameters are matrices: a pytree that is a prefix of theirs, or a function of a path such as 'blocks/up/kernel' and
            a leaf, of 'matrix' (the last two axes, the others batch), 'adam', a `MatrixSpec` or a `BlockSpec`. None for
            :func:`nested_jax.optim.matrix_specs.default_label`, which leaves embeddings, heads, norms, biases and gates to Adam.
        adam_learning_rate: of everything that is not a matrix; `learning_rate` when None.
        adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW, for everything that is not a matrix.

    Returns:
        The transformation. Its state is optax's for `partition`, under the keys 'matrix' and 'adam', with an `M3State` in each.
        `optax.inject_hyperparams` takes every number for one that may vary: name `ns_steps` in its `static_args` where it is given.

    Raises:
        ValueError: if an argument is out of its range; at `init`, if a parameter is not real or its label does not fit.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from nested_jax.optim.matrix_specs import BlockSpec, default_label
        >>> params = {'qkv': {'kernel': jnp.tile(jnp.eye(2), 3)}, 'norm': {'scale': jnp.ones(2)}}
        >>> fused = lambda path, leaf: BlockSpec(axis=-1, sizes=(2, 2, 2)) if path == 'qkv/kernel' else default_label(path, leaf)
        >>> optimizer = muon(0.1, labels=fused, method='svd')
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> print(np.round(np.asarray(updates['qkv']['kernel']), 2))
        [[-0.1 -0.  -0.1 -0.  -0.1 -0. ]
         [-0.  -0.1 -0.  -0.1 -0.  -0.1]]

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024
    """
    scale = scale_by_muon(
        beta, mu_dtype,
        labels=labels, method=method, ns_steps=ns_steps, nesterov=nesterov, bias_correction=bias_correction, scaling=scaling,
        shardings=shardings,
    )  # fmt: skip
    adam = scale_by_m3(adam_b1, adam_b2, eps=adam_eps, mu_dtype=mu_dtype, periods=(), ns_steps=0)
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return by_label(labels, weight_decay_mask, (scale, weight_decay, learning_rate), (adam, adam_weight_decay, adam_rate))
