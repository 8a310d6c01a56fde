"""Labels of parameters, dimension numbers and fused blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.optim.matrix_specs import BlockSpec, MatrixSpec, default_label, label_tree, map_matrices


def collect(x, spec):
    """The matrices `map_matrices` hands over, and the array it puts together of what comes back."""
    seen = []
    double = lambda matrices, _: seen.extend(matrices) or [2 * matrix for matrix in matrices]
    return seen, map_matrices(double, x, spec)


@pytest.mark.parametrize(
    'path',
    [
        'blocks/attention/query/kernel',
        'blocks/channel/level_0/gate/kernel',
        'mlp/gate_proj/kernel',
        'mlp/gate_up_proj/kernel',
        'multi_head_attention/out/kernel',
        'W',
        '',
    ],
)
def test_projections_are_matrices(path):
    assert default_label(path, np.zeros((8, 4))) == default_label(path, np.zeros((3, 8, 4))) == 'matrix'
    assert default_label(path, np.zeros(8)) == default_label(path, np.zeros(())) == 'adam'
    assert default_label(path, np.zeros((8, 1))) == default_label(path, np.zeros((3, 1, 8))) == 'adam'


@pytest.mark.parametrize(
    'path',
    [
        'embedding',
        'Embed_0/embedding',
        'wte',
        'transformer/wpe/kernel',
        'head',
        'lm_head/kernel',
        'classifier/kernel',
        'blocks/norm/scale',
        'LayerNorm_0/kernel',
        'dense/bias',
        'gate_bias',
        'gate_logits/kernel',
        'decoder/logits_dense/kernel',
        'output_gate/kernel',
        'moe/router/kernel',
        'query_convolution/kernel',
        'mixer/initial_memory_in',
    ],
)
def test_embeddings_heads_norms_biases_and_gates_are_not(path):
    assert default_label(path, np.zeros((8, 4))) == 'adam'


def test_labels_by_function_by_tree_and_by_prefix_agree():
    params = {'qkv': {'w': jnp.zeros((4, 6))}, 'out': {'w': jnp.zeros((4, 4)), 'v': jnp.zeros(4)}, 'none': None}
    blocks = BlockSpec(-1, (2, 2, 2))
    function = lambda path, leaf: blocks if path == 'qkv/w' else 'matrix' if leaf.ndim == 2 else 'adam'
    expected = {'qkv': {'w': MatrixSpec(blocks=(blocks,))}, 'out': {'w': MatrixSpec(), 'v': 'adam'}, 'none': None}
    assert label_tree(params, function) == expected
    assert label_tree(params, {'qkv': blocks, 'out': {'w': 'matrix', 'v': 'adam'}, 'none': None}) == expected
    assert label_tree(params, None)['out'] == {'w': MatrixSpec(), 'v': 'adam'}
    assert label_tree({}, 'adam') == {}


@pytest.mark.parametrize(
    ('spec', 'letters', 'shape'),
    [
        (MatrixSpec(), 'abc->abc', (2, 3, 4)),
        (MatrixSpec(inputs=-1, outputs=-2), 'abc->acb', (2, 4, 3)),
        (MatrixSpec(inputs=0, outputs=2), 'abc->bac', (3, 2, 4)),
        (MatrixSpec(inputs=0, outputs=(1, 2)), 'abc->abc', (2, 12)),
        (MatrixSpec(inputs=(2, 0), outputs=1), 'abc->cab', (8, 3)),
    ],
)
def test_dimension_numbers(spec, letters, shape):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    (matrix,), doubled = collect(x, spec)
    np.testing.assert_array_equal(matrix, jnp.einsum(letters, x).reshape(shape))
    np.testing.assert_array_equal(doubled, 2 * x)


@pytest.mark.parametrize(
    ('spec', 'letters', 'shape'),
    [
        (MatrixSpec(), 'abcd->abcd', (2, 3, 4, 5)),  # layers and experts, say, as batch
        (MatrixSpec(inputs=(0, 1, 2), outputs=3), 'abcd->abcd', (24, 5)),  # a convolution's height, width and channels
        (MatrixSpec(inputs=-2, outputs=-1), 'abcd->abcd', (2, 3, 4, 5)),
        (MatrixSpec(inputs=-3, outputs=(-2, -1)), 'abcd->abcd', (2, 3, 20)),  # scanned layers of (embed, heads, head_dim)
        (MatrixSpec(inputs=(-3, -2), outputs=-1), 'abcd->abcd', (2, 12, 5)),  # and of (heads, head_dim, embed)
        (MatrixSpec(inputs=1, outputs=3), 'abcd->acbd', (2, 4, 3, 5)),  # a matrix for each layer and head
        (MatrixSpec(inputs=(3, 1), outputs=(0,)), 'abcd->cdba', (4, 15, 2)),
    ],
)
def test_dimension_numbers_of_four_axes(spec, letters, shape):
    x = jnp.arange(120.0).reshape(2, 3, 4, 5)
    (matrix,), doubled = collect(x, spec)
    np.testing.assert_array_equal(matrix, jnp.einsum(letters, x).reshape(shape))
    np.testing.assert_array_equal(doubled, 2 * x)


def test_blocks_of_an_axis_among_four():
    """Grouped query, key and value heads of scanned layers: (layers, embed, heads, head_dim)."""
    x = jnp.arange(2 * 3 * 6 * 4.0).reshape(2, 3, 6, 4)
    parts, doubled = collect(x, MatrixSpec(inputs=-3, outputs=(-2, -1), blocks=(BlockSpec(-2, (4, 1, 1)),)))
    assert [part.shape for part in parts] == [(2, 3, 16), (2, 3, 4), (2, 3, 4)]
    np.testing.assert_array_equal(parts[1], x[:, :, 4])
    np.testing.assert_array_equal(doubled, 2 * x)


def test_blocks_of_unequal_size_on_a_fused_axis():
    x = jnp.arange(48.0).reshape(2, 3, 8)
    parts, doubled = collect(x, MatrixSpec(blocks=(BlockSpec(-1, (4, 2, 2)),)))
    assert [part.shape for part in parts] == [(2, 3, 4), (2, 3, 2), (2, 3, 2)]
    np.testing.assert_array_equal(jnp.concatenate(parts, -1), x)
    np.testing.assert_array_equal(doubled, 2 * x)


def test_blocks_on_two_axes_and_dimension_numbers():
    x = jnp.arange(64.0).reshape(4, 2, 8)
    spec = MatrixSpec(inputs=0, outputs=2, blocks=(BlockSpec(0, (3, 1)), BlockSpec(2, (2, 6))))
    parts, doubled = collect(x, spec)
    assert [part.shape for part in parts] == [(2, 3, 2), (2, 3, 6), (2, 1, 2), (2, 1, 6)]
    np.testing.assert_array_equal(parts[1], jnp.swapaxes(x[:3, :, 2:], 0, 1))
    np.testing.assert_array_equal(doubled, 2 * x)


@pytest.mark.parametrize(
    ('label', 'message'),
    [
        ('muon', "label of parameter a/w is 'muon', allowed are 'matrix', 'adam', a BlockSpec or a MatrixSpec"),
        (3, 'label of parameter a/w is 3, allowed'),
        (MatrixSpec(inputs=2), r'allowed are separate inputs and outputs among the axes of shape \(4, 6\)'),
        (MatrixSpec(inputs=1, outputs=-1), 'allowed are separate inputs and outputs'),
        (BlockSpec(2, (6,)), 'allowed are separate inputs and outputs'),
        (MatrixSpec(blocks=(BlockSpec(1, (6,)), BlockSpec(-1, (6,)))), 'allowed are separate inputs and outputs'),
        (BlockSpec(-1, (2, 2)), r'sizes of parameter a/w are \(2, 2\), allowed are block sizes that add up to 6'),
        (BlockSpec(-1, (6, 0)), 'allowed are block sizes that add up to 6'),
    ],
)
def test_labels_are_checked(label, message):
    with pytest.raises(ValueError, match=message):
        label_tree({'a': {'w': jax.ShapeDtypeStruct((4, 6), jnp.float32)}}, {'a': label})


def test_vectors_are_no_matrices():
    with pytest.raises(ValueError, match=r'parameter b is MatrixSpec.*shape \(3,\)'):
        label_tree({'b': jnp.zeros(3)}, 'matrix')


def test_fused_axes_that_are_sharded():
    """A sharded axis may be split into blocks and merged with another, on Explicit meshes too."""
    mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = jnp.arange(4.0 * 8 * 8).reshape(4, 8, 8)
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, 'data', 'model')))
    spec = MatrixSpec(inputs=0, outputs=(1, 2), blocks=(BlockSpec(1, (5, 3)),))
    _, doubled = collect(placed, spec)
    assert jax.typeof(doubled) == jax.typeof(placed)
    np.testing.assert_array_equal(doubled, 2 * x)
