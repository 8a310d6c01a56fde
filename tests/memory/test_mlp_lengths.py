"""Calls of the deep memory whose rows end early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.mlp import mlp_memory, mlp_memory_reference
from tests.memory.test_mlp import assert_trees_close, part, random_call, run


@pytest.mark.parametrize(
    ('function', 'cut', 'aligned'),
    [
        (mlp_memory, 3, False),
        pytest.param(mlp_memory, 8, True, marks=pytest.mark.slow),
        pytest.param(mlp_memory_reference, 3, False, marks=pytest.mark.slow),
    ],
)
def test_rows_may_end_early(x64, function, cut, aligned):
    """Padding takes no place: the state after is that of a call with fewer tokens, its open chunk included."""
    call, lengths, options = random_call(cut + 9, dgd='none'), (9, 4), dict(chunk_size=4, dgd='none')
    _, state = run(part(call, 0, cut), mlp_memory_reference, **options)
    rest = {**part(call, cut, cut + 9), 'state': state}
    y, after = run({**rest, 'lengths': jnp.array(lengths)}, function, aligned=aligned, **options)
    for row, length in enumerate(lengths):
        expected, state = run(part(rest, 0, length), mlp_memory_reference, **options)
        np.testing.assert_allclose(y[row, :length], expected[row], rtol=0, atol=1e-12)
        assert_trees_close(*(jax.tree.map(lambda leaf, row=row: leaf[row], tree) for tree in (after, state)), atol=1e-12)
