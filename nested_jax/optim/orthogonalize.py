"""The orthogonal polar factor of matrices and stacks of matrices, by Newton-Schulz iterations or exactly.

Shapes: (..., m, n). Einsum letters: m and k rows, n columns.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nested_jax.optim.checks import as_integer, check_choice
from nested_jax.optim.matrices import widened, working_dtype
from nested_jax.optim.sharding import Layout, in_layout, layouts_of, run_in_auto_mode

PyTree = Any

# Coefficients of X, (X X^T) X and (X X^T)^2 X for each step; the last ones serve all later steps.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_COEFFICIENTS = {
    'quintic': ((3.4445, -4.7750, 2.0315),),
    'cubic': ((1.5, -0.5),),
    # Rounding may leave a singular value above 1, where the first polynomials grow: they are made for an interval 1 % wider.
    'polar_express': (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
}
METHODS = (*_COEFFICIENTS, 'svd')

_GRAM_STEPS = 3  # between two products of a wide matrix with its transpose
_LARGE = 2**16  # entries of a matrix whose products take longer than what a step of a loop costs


def orthogonalize(x: jax.Array, *, method: str = 'quintic', steps: int = 5, sharding: NamedSharding | None = None) -> jax.Array:
    r"""The nearest matrix whose rows, or columns if it is tall, are orthonormal: :math:`U V^\top` of :math:`X = U S V^\top`.

    The iterations start from :math:`X_0 = X / \|X\|_F` and apply an odd polynomial to the singular values,

    .. math::
      X_{i+1} = a_i X_i + b_i (X_i X_i^\top) X_i + c_i (X_i X_i^\top)^2 X_i .

    'quintic' is Muon's: fast, and its singular values settle between about 0.7 and 1.2 instead of at 1. 'cubic' (a, b, c = 3/2, -1/2, 0)
    is one gradient step of Eq. (44), arXiv:2512.24695v1, with :math:`\zeta = 1/4`; it converges to 1, slowly. 'polar_express' takes the
    best polynomial for the interval each step leaves. 'svd' is exact, with singular values that vanish left at zero.

    The result does not depend on the scale of `x`, a matrix of zeros gives zeros, and derivatives are finite there. The steps are scanned;
    on a CPU those of wide matrices in float32 are taken on their Gram matrix, three at a time. Products of 16-bit matrices accumulate in
    float32.

    A matrix axis that is split over a mesh axis hands it to a batch axis where that divides: all-to-alls and no gather. Else the longer
    matrix axis takes it, with zeros behind it where it does not divide, and partial products are summed. 'svd' needs matrices whole: there
    zeros are put behind the batch, and a single matrix is on one device. A compiled program for an Auto mesh has to be told, by `sharding`:
    else it warns, and XLA gathers.

    Args:
        x: (..., m, n), real floating point; each matrix is orthogonalised alone.
        method: 'quintic', 'cubic', 'polar_express' or 'svd'.
        steps: iterations, at least 1; 'svd' takes none.
        sharding: of `x` on Auto meshes, whose compiled programs cannot ask for it, NamedSharding(mesh, P()) where its last two axes are not
            split; on Explicit meshes it is known from the type.

    Returns:
        (..., m, n) in the dtype of `x`.

    Raises:
        ValueError: if `x` is no stack of real matrices, `method` is unknown or `steps` is not an integer of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = orthogonalize(jnp.array([[3.0, 0.0], [4.0, 5.0]]), method='polar_express', steps=8)
        >>> print(jnp.round(jnp.abs(x.T @ x), 3))
        [[1. 0.]
         [0. 1.]]

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024

        Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025
    """
    return orthogonalize_tree(x, method=method, steps=steps, shardings=sharding)


def orthogonalize_tree(tree: PyTree, *, method: str = 'quintic', steps: int = 5, shardings: PyTree | None = None) -> PyTree:
    """`orthogonalize` for all leaves of a pytree, those of equal shape in one stack: less to compile and fewer, larger products.

    Args:
        tree: leaves (..., m, n). A leaf and another's transpose are of equal shape.
        method: as for `orthogonalize`.
        steps: as for `orthogonalize`.
        shardings: of the leaves on Auto meshes, a pytree of NamedSharding that is a prefix of `tree`; see `orthogonalize`.

    Returns:
        The same pytree, orthogonalised.

    Raises:
        ValueError: as `orthogonalize`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> tree = orthogonalize_tree({'up': jnp.ones((2, 3)), 'down': jnp.zeros((3, 2))}, method='svd')
        >>> print(np.round(np.asarray(tree['up']), 3), float(tree['down'].sum()))
        [[0.408 0.408 0.408]
         [0.408 0.408 0.408]] 0.0
    """
    check_choice('method', method, METHODS)
    steps = as_integer('steps', steps, 1)
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        _check_matrices(leaf)
    run = functools.partial(orthogonalize_all, layouts=layouts_of(tree, shardings), method=method, steps=steps)
    return structure.unflatten(run_in_auto_mode(run, (leaves,), like=leaves))


def orthogonalize_all(matrices: list[jax.Array], layouts: list[Layout | None], method: str, steps: int) -> list[jax.Array]:
    """The same for a list, inside of Auto mode and with arguments already checked."""
    groups = collections.defaultdict(list)
    for index, (x, layout) in enumerate(zip(matrices, layouts, strict=True)):
        tall = x.shape[-2] > x.shape[-1]
        if tall and layout is not None:
            layout = layout.transposed((*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))
        wide = x.mT if tall else x
        groups[wide.shape, wide.dtype, layout].append((index, tall, wide))
    results = {}
    for (_, _, layout), members in groups.items():
        indices, tall, wide = zip(*members, strict=True)
        for index, flip, x in zip(indices, tall, _orthogonalize_equal(wide, layout, method, steps), strict=True):
            results[index] = x.mT if flip else x
    return [results[index] for index in range(len(matrices))]


def _check_matrices(x: jax.Array) -> None:
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'x has shape {x.shape} and dtype {x.dtype}, allowed are real matrices, (..., m, n)')


def _orthogonalize_equal(matrices: tuple[jax.Array, ...], layout: Layout | None, method: str, steps: int) -> list[jax.Array]:
    """Matrices of one shape and layout, not tall, in one stack; on a CPU large ones that are not split two by two.

    There all steps of two find them in the cache, which a stack overflows, and XLA compiles equal programs once, but a slice of a stack
    for each leaf. Two square ones in one loop took less time than in two (on two cores 0.87 of it at 512, 0.96 at 1,024).
    """
    whole = method == 'svd'
    by_svd = functools.partial(jax.tree.map, _polar_factor)
    polar = by_svd if whole else functools.partial(_newton_schulz, coefficients=_coefficients(method, steps))
    single, along = lambda x: polar([x])[0], None if whole else -1
    alone = functools.partial(_matrix_by_matrix, single)
    if len(matrices) == 1:
        return [in_layout(alone, matrices, layout, along)]
    together = lambda *matrices: list(in_layout(single, (jnp.stack(matrices),), layout and layout.stacked(), along))
    if layout is not None or not _is_large(matrices[0]):
        return together(*matrices)
    few = jax.jit(lambda *few: polar(few) if few[0].ndim == 2 else list(map(alone, few)))
    two_by_two = lambda *matrices: [x for start in range(0, len(matrices), 2) for x in few(*matrices[start : start + 2])]
    return jax.lax.platform_dependent(*matrices, cpu=two_by_two, default=together)


def _matrix_by_matrix(function: Callable[[jax.Array], jax.Array], stack: jax.Array) -> jax.Array:
    """`function(stack)`, by a loop over large matrices on a CPU.

    Several devices take the stack at once: it may be split over them, and the loop would gather it.
    """
    if stack.ndim < 3 or not _is_large(stack) or jax.device_count() > 1:
        return function(stack)
    loop = lambda x: jax.lax.map(function, x.reshape(-1, *x.shape[-2:])).reshape(x.shape)
    return jax.lax.platform_dependent(stack, cpu=loop, default=function)


def _is_large(x: jax.Array) -> bool:
    return math.prod(x.shape[-2:]) >= _LARGE


def _coefficients(method: str, steps: int) -> tuple[tuple[float, ...], ...]:
    table = _COEFFICIENTS[method]
    return tuple(table[min(step, len(table) - 1)] for step in range(steps))


def _newton_schulz(matrices: Sequence[jax.Array], coefficients: tuple[tuple[float, ...], ...]) -> list[jax.Array]:
    """Iterations of equal (..., m, n), m <= n; of wide ones on the Gram matrix where products of float32 are exact, which is on a CPU."""
    matrices, rows = list(map(normalized, matrices)), jnp.asarray(coefficients, working_dtype(matrices[0]))
    (m, n), dtype = matrices[0].shape[-2:], matrices[0].dtype
    one_by_one = functools.partial(_scan_steps, _newton_schulz_step)
    if rows.shape[1] == 2 or n < 2 * m or dtype != rows.dtype:
        return one_by_one(matrices, rows)
    return jax.lax.platform_dependent(matrices, rows, cpu=_newton_schulz_few_by_few, default=one_by_one)


def _newton_schulz_few_by_few(matrices: list[jax.Array], rows: jax.Array) -> list[jax.Array]:
    whole = len(rows) - len(rows) % _GRAM_STEPS
    matrices = _scan_steps(_newton_schulz_on_gram, matrices, rows[:whole].reshape(-1, _GRAM_STEPS, 3))
    return matrices if whole == len(rows) else [_newton_schulz_on_gram(x, rows[whole:]) for x in matrices]


def _scan_steps(step: Callable[[jax.Array, jax.Array], jax.Array], matrices: list[jax.Array], rows: jax.Array) -> list[jax.Array]:
    return jax.lax.scan(lambda matrices, row: ([step(x, row) for x in matrices], None), matrices, rows)[0]


def _newton_schulz_step(x: jax.Array, row: jax.Array) -> jax.Array:
    product = lambda letters, a, b: jnp.einsum(letters, a.astype(x.dtype), b.astype(x.dtype), preferred_element_type=row.dtype)
    gram = product('...mn,...kn->...mk', x, x)
    polynomial = row[1] * gram
    if len(row) == 3:
        polynomial += row[2] * product('...mk,...kn->...mn', gram, gram)
    return (row[0] * x + product('...mk,...kn->...mn', polynomial, x)).astype(x.dtype)


def _newton_schulz_on_gram(x: jax.Array, rows: jax.Array) -> jax.Array:
    """The steps of some rows of coefficients, by products of short sides but for the first and the last.

    What the steps multiply `x` by are polynomials of its Gram matrix, which commute: the next Gram matrix is that of before between two of
    them. Rounding in a Gram matrix grows with each, hence few steps: the error stays that of single steps also for missing rank.
    """
    gram, total = jnp.einsum('...mn,...kn->...mk', x, x), None
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=x.dtype), gram.shape)
    for index, row in enumerate(rows):
        polynomial = row[0] * identity + row[1] * gram + row[2] * (gram @ gram)
        total = polynomial if index == 0 else polynomial @ total
        if index < len(rows) - 1:
            gram = polynomial @ gram @ polynomial
    return total @ x


def normalized(x: jax.Array) -> jax.Array:
    """Matrices of Frobenius norm 1, or zero.

    The division by the largest entry keeps squares in range. The result does not depend on it, so it takes no part in derivatives.
    """
    scaled = widened(x)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(scaled), axis=(-2, -1), keepdims=True, initial=0.0))
    scaled /= jnp.where(largest > 0, largest, 1.0)
    squares = jnp.sum(jnp.square(scaled), axis=(-2, -1), keepdims=True)
    return (scaled / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))).astype(x.dtype)


@jax.custom_jvp
def _polar_factor(x: jax.Array) -> jax.Array:
    u, s, vt = _svd(x)
    return ((u * _kept(s, x.shape)[..., None, :]) @ vt).astype(x.dtype)


@_polar_factor.defjvp
def _polar_factor_jvp(primals, tangents):
    """From X = P O with P symmetric and m <= n: dO = W O + P^-1 dX (I - O^T O) with W P + P W = dX O^T - O dX^T.

    The derivative of the SVD itself divides by differences of singular values; this one by their sums, however often it is taken.
    """
    (x,), (dx,) = primals, tangents
    polar = _polar_factor(x)
    o, wide, dx = widened(polar), widened(x), widened(dx)
    p = wide @ o.mT
    p, inside = (p + p.mT) / 2, o @ o.mT @ dx @ o.mT  # what is missing in rank does not turn
    turned = _divided_by_symmetric(True, x.shape, p, inside - inside.mT) @ o
    return polar, (turned + _divided_by_symmetric(False, x.shape, p, dx - dx @ o.mT @ o)).astype(x.dtype)


def _divided_by_symmetric(both: bool, shape: tuple[int, ...], p: jax.Array, b: jax.Array) -> jax.Array:
    """y of p y + y p = b, or without `both` of p y = b, in the range of p, the factor of a matrix of `shape`."""

    def solve(_, b):
        s, u = jnp.linalg.eigh(p)
        kept = _kept(s, shape)
        pairs = kept[..., :, None] * kept[..., None, :] if both else kept[..., :, None]
        sums = s[..., :, None] + s[..., None, :] if both else s[..., :, None]
        y = u @ (u.mT @ (b @ u if both else b) * pairs / jnp.where(pairs > 0, sums, 1.0))
        return y @ u.mT if both else y

    return jax.lax.custom_linear_solve(lambda y: p @ y + y @ p if both else p @ y, b, solve, symmetric=True)


def _svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.linalg.svd(widened(x), full_matrices=False)


def _kept(s: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """1 for singular values above rounding, else 0."""
    threshold = jnp.max(s, axis=-1, keepdims=True, initial=0.0) * max(shape[-2:]) * jnp.finfo(s.dtype).eps
    return (s > threshold).astype(s.dtype)
