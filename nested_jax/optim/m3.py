r"""Multi-scale Momentum Muon (M3): orthogonalised momenta at several time scales over one second moment.

With :math:`g_t` the gradient of step t = 0, 1, ... and one slow scale of period f,

.. math::
  M^{(1)}_t &= \beta_1 M^{(1)}_{t-1} + (1 - \beta_1) g_t \\
  V_t &= \beta_2 V_{t-1} + (1 - \beta_2) g_t^2 \\
  M^{(2)}_k &= \beta_3 M^{(2)}_{k-1} + (1 - \beta_3) \sum_{t=(k-1)f}^{kf-1} g_t \\
  u_t &= \frac{O(M^{(1)}_t) + \alpha\, O(M^{(2)}_{\lfloor t/f \rfloor})}{\sqrt{V_t} + \epsilon}

where O is `orthogonalize`. The slow direction :math:`O(M^{(2)})` is computed once in f steps, under one `jax.lax.cond`, and is zero
in the first f steps. (`jax.vmap` over states turns the cond into a select, which computes it at every step.)

As printed, the paper's sums have no decay; that is `literal=True`: :math:`M \leftarrow M + \beta g` for all three. Its slow sum runs
over f + 1 gradients, one of them counted in two periods; here it takes each gradient once, `literal` or not.

Muon is the case of one scale and no second moment (`muon.py`), Adam that of no orthogonalisation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.optim.checks import as_integer, check_choice, check_decay, check_range, check_real
from nested_jax.optim.matrices import Mask, divide, root, widened, with_learning_rate, zeros_for
from nested_jax.optim.matrix_specs import Labels, label_tree, map_matrices
from nested_jax.optim.orthogonalize import METHODS, normalized, orthogonalize_all

PyTree = Any
NS_STEPS = 5
SCALINGS = ('jordan', 'moonshot', 'rms', None)


class SlowState(NamedTuple):
    """Momentum of one slow scale."""

    mu: optax.Updates  # M2 when a period ends, and within one M2 decayed plus what came so far; like the parameters, float32 at least
    direction: optax.Updates  # O2, constant within a period; like the parameters, mu_dtype, or float32 at least


class M3State(NamedTuple):
    """State of M3, Muon and the Adam beside them."""

    count: jax.Array  # shape=(), dtype=int32: steps done
    mu: optax.Updates  # M1, the fast momentum; like the parameters, mu_dtype, or float32 at least
    nu: optax.Updates | None  # V, the second moment; like the parameters, float32 at least; None without b2
    slow: tuple[SlowState, ...]  # one for each slow scale


def scale_by_m3(
    b1: ArrayLike = 0.95, b2: ArrayLike | None = 0.999, b3: ArrayLike | tuple[ArrayLike, ...] = 0.9,
    alpha: ArrayLike | tuple[ArrayLike, ...] = 0.1, eps: ArrayLike = 1e-8, mu_dtype: DTypeLike | None = None, *,
    periods: int | tuple[int, ...] = (100,), labels: Labels = 'matrix', method: str = 'quintic', ns_steps: int | None = None,
    nesterov: bool = False, bias_correction: bool = True, literal: bool = False, scaling: str | None = None,
    shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Rescale updates according to Algorithm 1 of Nested Learning, M3.

    The module's docstring has the equations.

    The numerator does not depend on the scale of the gradients and the denominator does: where gradients shrink, updates grow, in single
    entries too. A schedule, a larger `eps`, `scaling='rms'` or `b2=None` mend that. Entries that never had a gradient are left alone, where
    the printed algorithm (and `literal=True`) divides by :math:`\epsilon`.

    Args:
        b1: decay of the fast momentum.
        b2: decay of the second moment; None leaves the second moment out.
        b3: decay of the slow momentum, one for all slow scales or one for each.
        alpha: weight of the slow direction, any number of at least 0, one for all slow scales or one for each.
        eps: added to the root of the second moment.
        mu_dtype: of the fast momentum and the slow directions; float32, or the parameters' if that is wider, when None.
        periods: steps between two updates of a slow scale, one for each; () for none.
        labels: of matrices, as for `m3`. Every leaf must be one: chain with `optax.masked` or `optax.partition`, or use `m3`.
        method: of `orthogonalize`.
        ns_steps: iterations of `orthogonalize`, by default 5; 0 takes momenta as they are, for leaves of any shape.
        nesterov: orthogonalise :math:`\beta_1 M^{(1)} + (1 - \beta_1) g_t` in place of the fast momentum.
        bias_correction: divide the fast momentum and V by :math:`1 - \beta^{t+1}` (and by :math:`1 - \beta^{t+2}` the momentum inside of
            Nesterov's form, as optax does). Slow momenta are not corrected, which only matters with `ns_steps=0`.
        literal: sums without decay, Algorithm 1 as printed; no bias correction.
        scaling: of each matrix' update, from m inputs to n outputs: 'jordan' by :math:`\sqrt{\max(1, n/m)}`, 'moonshot' by
            :math:`0.2 \sqrt{\max(m, n)}`, 'rms' to a root mean square of 0.2 whatever it was, None not at all.
        shardings: of the parameters, a NamedSharding for each, on Auto meshes; see `orthogonalize`.

    Returns:
        The transformation, with an `M3State`.

    Raises:
        ValueError: if an argument is out of its range; at `init`, if a parameter is not real or its label does not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> first, second = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 3.0]])
        >>> optimizer = scale_by_m3(b1=0.0, b2=None, alpha=0.5, periods=(2,), method='svd')
        >>> state = optimizer.init(first)
        >>> for gradient in (first, first, second):
        ...     updates, state = optimizer.update(gradient, state)
        >>> print(jnp.abs(updates).round(3))  # the slow momentum keeps what the fast one has forgotten
        [[0.5 0. ]
         [0.  1. ]]

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 7.2, Algorithm 1
    """
    periods, b3, alpha = _scales(periods, b3, alpha)
    ns_steps = NS_STEPS if ns_steps is None else as_integer('ns_steps', ns_steps, 0)
    algorithm = _Algorithm(
        b1, b2, b3, alpha, eps, mu_dtype, periods, labels, method, ns_steps, nesterov, bias_correction, literal, scaling, shardings
    )
    return optax.GradientTransformationExtraArgs(algorithm.init, algorithm.update)


def m3(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.95, b2: ArrayLike | None = 0.999,
    b3: ArrayLike | tuple[ArrayLike, ...] = 0.9, alpha: ArrayLike | tuple[ArrayLike, ...] = 0.1, eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0, weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None, *,
    periods: int | tuple[int, ...] = (100,), labels: Labels | None = None, method: str = 'quintic', ns_steps: int | None = None,
    bias_correction: bool = True, literal: bool = False, scaling: str | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None, adam_b1: ArrayLike = 0.9, adam_b2: ArrayLike = 0.999,
    adam_eps: ArrayLike = 1e-8, adam_weight_decay: ArrayLike = 0.0, shardings: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Multi-scale Momentum Muon: M3 for matrices, AdamW for everything else.

    Two momenta see the gradients at different frequencies. The fast one follows each gradient, the slow one the sum of every f of them,
    and keeps directions that the fast one has forgotten. Both are orthogonalised, weighted, and divided by the root of Adam's second
    moment: see the module's docstring. The paper gives no values of the hyper-parameters: these defaults are ours, and need tuning.

    State: 4 numbers an entry of a matrix, and 2 more for each slow scale beyond the first.

    Args:
        learning_rate: a number, or a schedule of the step.
        b1, b2, b3, alpha, eps, mu_dtype, periods, method, ns_steps, bias_correction, literal, scaling, shardings: see `scale_by_m3`.
        weight_decay: of matrices, decoupled; weight_decay_mask: which of all parameters decay, a pytree or a function of them.
        labels: which parameters are matrices: a pytree that is a prefix of theirs, or a function of a path such as 'blocks/up/kernel' and
            a leaf, of 'matrix' (the last two axes, the others batch), 'adam', a `MatrixSpec` or a `BlockSpec`. None for
            :func:`nested_jax.optim.matrix_specs.default_label`, which leaves embeddings, heads, norms, biases and gates to Adam.
        adam_learning_rate: of everything that is not a matrix; `learning_rate` when None.
        adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW, for everything that is not a matrix.

    Returns:
        The transformation. Its state is optax's for `partition`, under the keys 'matrix' and 'adam', with an `M3State` in each.
        `optax.inject_hyperparams` needs `ns_steps` named in its `static_args` where it is given, and `periods` where it is one number.

    Raises:
        ValueError: if an argument is out of its range; at `init`, if a parameter is not real or its label does not fit.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss = lambda params: jnp.sum((params['kernel'] - 1.0) ** 2) + jnp.sum(params['bias'] ** 2)
        >>> params = {'kernel': jnp.zeros((2, 3)), 'bias': jnp.ones(3)}
        >>> optimizer = m3(0.1, periods=(4,), scaling='rms')
        >>> state, update = optimizer.init(params), jax.jit(optimizer.update)
        >>> for _ in range(50):
        ...     updates, state = update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f'{loss(params):.1f}')
        0.0

    References:
        Behrouz et al., `Nested Learning <https://arxiv.org/abs/2512.24695>`_, 2025, section 7.2, Algorithm 1

        Si et al., `AdaMuon <https://arxiv.org/abs/2507.11005>`_, 2025, for `scaling='rms'`
    """
    scale = scale_by_m3(
        b1, b2, b3, alpha, eps, mu_dtype,
        periods=periods, labels=labels, method=method, ns_steps=ns_steps, bias_correction=bias_correction, literal=literal,
        scaling=scaling, shardings=shardings,
    )  # fmt: skip
    adam = scale_by_m3(adam_b1, adam_b2, eps=adam_eps, mu_dtype=mu_dtype, periods=(), ns_steps=0)
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return by_label(labels, weight_decay_mask, (scale, weight_decay, learning_rate), (adam, adam_weight_decay, adam_rate))


def by_label(labels: Labels | None, decay_mask: Mask, matrix_rule: tuple, adam_rule: tuple) -> optax.GradientTransformationExtraArgs:
    """One rule for matrices, another for the rest; a rule is a transformation, a weight decay and a learning rate."""
    rule = lambda scale, decay, rate: with_learning_rate(scale, rate, decay, decay_mask)
    kind = lambda label: label if label == 'adam' else 'matrix'
    kinds = lambda params: jax.tree.map(kind, label_tree(params, labels))
    return optax.partition({'matrix': rule(*matrix_rule), 'adam': rule(*adam_rule)}, kinds)


@dataclasses.dataclass(frozen=True)
class _Algorithm:
    """`scale_by_m3`, with its arguments."""

    b1: ArrayLike
    b2: ArrayLike | None
    b3: tuple[ArrayLike, ...]
    alpha: tuple[ArrayLike, ...]
    eps: ArrayLike
    mu_dtype: DTypeLike | None
    periods: tuple[int, ...]
    labels: Labels | None
    method: str
    ns_steps: int
    nesterov: bool
    bias_correction: bool
    literal: bool
    scaling: str | None
    shardings: PyTree | None

    def __post_init__(self):
        check_decay('b1', self.b1)
        if self.b2 is not None:
            check_decay('b2', self.b2)
        check_range('eps', self.eps, 0)
        for decay, weight in zip(self.b3, self.alpha, strict=True):
            check_decay('b3', decay)
            check_range('alpha', weight, 0)
        check_choice('scaling', self.scaling, SCALINGS)
        check_choice('method', self.method, METHODS)
        if self.literal and self.nesterov:
            raise ValueError('nesterov is True, allowed with literal is False: Algorithm 1 has no look-ahead')

    def init(self, params: optax.Params) -> M3State:
        check_real(params)
        if self.ns_steps or self.scaling:
            self._specs(params)
        zeros = functools.partial(zeros_for, params)
        slow = tuple(SlowState(zeros(), zeros(self.mu_dtype)) for _ in self.periods)
        return M3State(jnp.zeros((), jnp.int32), zeros(self.mu_dtype), None if self.b2 is None else zeros(), slow)

    def update(self, updates: optax.Updates, state: M3State, params: optax.Params | None = None, **extra_args) -> tuple:
        del extra_args
        gradients = jax.tree.map(widened, updates)
        count = optax.safe_increment(state.count)
        mu = self._accumulate(jax.tree.map(widened, state.mu), gradients, self.b1)
        slow = tuple(self._slow_step(*scale, gradients, state.count) for scale in zip(state.slow, self.periods, self.b3, strict=True))
        total = self._direction(self._fast_momentum(mu, gradients, count))
        for weight, scale in zip(self.alpha, slow, strict=True):
            total = jax.tree.map(lambda t, o, weight=weight: t + weight * o.astype(t.dtype), total, scale.direction)
        nu = None
        if self.b2 is not None:
            nu = self._accumulate(state.nu, jax.tree.map(jnp.square, gradients), self.b2)
            total = jax.tree.map(self._divided, total, self._corrected(nu, self.b2, count))
        if self.scaling:
            total = self._map(lambda matrices, _: [_rescaled(x, self.scaling) for x in matrices], total)
        total = optax.tree.cast_like(total, updates if params is None else params)
        return total, M3State(count, optax.tree.cast_like(mu, state.mu), nu, slow)

    def _fast_momentum(self, mu, gradients, count):
        if not self.nesterov:
            return self._corrected(mu, self.b1, count)
        ahead, now = self._corrected(mu, self.b1, optax.safe_increment(count)), self._corrected(gradients, self.b1, count)
        return self._accumulate(ahead, now, self.b1)

    def _slow_step(self, state: SlowState, period: int, decay: ArrayLike, gradients: PyTree, count: jax.Array) -> SlowState:
        """The direction is that of the periods that are over: it is taken before this step's gradient comes in."""
        first = count % period == 0
        renewed = lambda: optax.tree.cast_like(self._direction(state.mu), state.direction)
        direction = jax.lax.cond(first, renewed, lambda: state.direction)
        retained = jax.tree.map(lambda m: m if self.literal else jnp.where(first, (decay * m).astype(m.dtype), m), state.mu)
        weight = decay if self.literal else 1 - decay
        return SlowState(jax.tree.map(lambda m, g: (m + weight * g).astype(m.dtype), retained, gradients), direction)

    def _accumulate(self, old: PyTree, new: PyTree, decay: ArrayLike) -> PyTree:
        retain, weight = (1, decay) if self.literal else (decay, 1 - decay)
        return jax.tree.map(lambda o, n: (retain * o + weight * n).astype(o.dtype), old, new)

    def _divided(self, total: jax.Array, nu: jax.Array) -> jax.Array:
        """Orthogonalised momenta are not zero where all gradients were; divided by eps alone they would be huge."""
        quotient = divide(total, root(nu) + self.eps)
        return quotient if self.literal else jnp.where(nu > 0, quotient, 0.0)

    def _corrected(self, moment: PyTree, decay: ArrayLike, count: jax.Array) -> PyTree:
        return optax.tree.bias_correction(moment, decay, count) if self.bias_correction and not self.literal else moment

    def _direction(self, momentum: PyTree) -> PyTree:
        if not self.ns_steps:
            return momentum
        return self._map(functools.partial(orthogonalize_all, method=self.method, steps=self.ns_steps), momentum)

    def _map(self, function: Callable, tree: PyTree) -> PyTree:
        return map_matrices(function, tree, self._specs(tree), self.shardings)

    def _specs(self, tree: PyTree) -> PyTree:
        specs = label_tree(tree, self.labels)
        if 'adam' in jax.tree.leaves(specs):
            raise ValueError("labels hold 'adam', allowed here are those of matrices: mask other parameters, or use m3 or muon")
        return specs


def _scales(periods, b3, alpha) -> tuple[tuple, tuple, tuple]:
    """One period, decay and weight for each slow scale."""
    periods = tuple(as_integer('periods', period, 1) for period in (periods if isinstance(periods, tuple | list) else (periods,)))
    columns = [tuple(value) if isinstance(value, tuple | list) else (value,) * len(periods) for value in (b3, alpha)]
    for name, values in zip(('b3', 'alpha'), columns, strict=True):
        if len(values) != len(periods):
            raise ValueError(f'{name} is {values}, allowed is one number, or one for each of the {len(periods)} periods')
    return periods, *columns


def _rescaled(x: jax.Array, scaling: str) -> jax.Array:
    inputs, outputs = x.shape[-2:]
    if scaling == 'jordan':
        return x * math.sqrt(max(1.0, outputs / max(1, inputs)))
    if scaling == 'moonshot':
        return x * (0.2 * math.sqrt(max(inputs, outputs)))
    return normalized(x) * (0.2 * math.sqrt(inputs * outputs))
