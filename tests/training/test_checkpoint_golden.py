"""C10. A checkpoint of format 1 that lies in the repository: code that reads checkpoints otherwise than they were written is found out."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.state import TrainState

GOLDEN = pathlib.Path(__file__).parent / 'goldens' / 'checkpoint_format_1'
STEP = 12
CONFIG = {'model': {'width': 3, 'levels': [{'period': 64}]}, 'train': {'learning_rate': 0.1}}
DATA = {'identity': {'seed': 0}, 'window': {'nats': 1.5}}


def closed_form() -> TrainState:
    """A state whose values are known: leaf i of n counts up from 100 i; the bfloat16 leaf's values fit its eight bits."""
    params = {'half': jnp.zeros(5, jnp.bfloat16), 'kernel': jnp.zeros((4, 3)), 'scale': jnp.zeros(())}
    state = TrainState(jnp.int32(0), params, (optax.adamw(0.1).init(params), jnp.zeros(6, jnp.int32)), jax.random.key(5))
    leaves, structure = jax.tree.flatten(state)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    count = lambda index, leaf: (100 * index % 250 + jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
    return jax.tree.unflatten(structure, [leaf if is_key(leaf) else count(index, leaf) for index, leaf in enumerate(leaves)])


def write(folder: pathlib.Path) -> None:
    """How the golden checkpoint was made, once, in /tmp, whose path orbax notes: a new format gets another, and this one stays."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(STEP, closed_form(), config=CONFIG, data=DATA)
    checkpoints.wait()


@pytest.fixture
def golden(tmp_path) -> Checkpoints:
    shutil.copytree(GOLDEN, tmp_path / 'checkpoints')
    return Checkpoints(tmp_path / 'checkpoints')


def test_its_values_are_read(golden):
    assert golden.verify(STEP) is None
    restored = golden.restore(jax.tree.map(lambda leaf: leaf if leaf.dtype.name.startswith('key') else 0 * leaf, closed_form()), CONFIG)
    assert (restored.step, restored.data, restored.rejected) == (STEP, DATA, ())
    assert restored.versions['orbax-checkpoint'] == '0.12.8'
    expected = closed_form()
    assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
    for (path, found), wanted in zip(jax.tree.leaves_with_path(restored.state), jax.tree.leaves(expected), strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), path
        if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(found, wanted, err_msg=str(path))
    # Written out: were the closed form itself to change, it would change here too.
    assert int(restored.state.step) == 0 and restored.state.params['half'].tolist() == [100, 101, 102, 103, 104]
    assert restored.state.params['kernel'].tolist() == [[200, 201, 202], [203, 204, 205], [206, 207, 208], [209, 210, 211]]
    assert jax.random.key_data(restored.state.key).tolist() == [0, 5]


def test_what_is_refused_is_still_refused(golden):
    with pytest.raises(ValueError, match='train.learning_rate is 0.2, but .* = 0.1'):
        golden.restore(closed_form(), CONFIG | {'train': {'learning_rate': 0.2}})
    wider = closed_form()._replace(step=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r'step is \[\] int32 in the checkpoint and \[2\] int32'):
        golden.restore(wider, CONFIG)


def test_the_present_code_writes_the_same_layout(golden, tmp_path):
    """Names of files, of leaves and of what is known about them; orbax names its data files anew each time."""
    write(tmp_path / 'now')
    old, new = golden.path(STEP), Checkpoints(tmp_path / 'now').path(STEP)
    meta, meta_now = (json.loads((folder / 'meta.json').read_text()) for folder in (old, new))
    assert meta['format'] == meta_now['format'] and meta['leaves'] == meta_now['leaves']
    assert meta.keys() <= meta_now.keys()
    top = lambda folder: {path.relative_to(folder).as_posix() for path in (*folder.glob('*'), *folder.glob('state/*'))}
    assert top(old) == top(new)
    assert set(json.loads((old / 'manifest.json').read_text())) == {
        path.relative_to(old).as_posix() for path in old.rglob('*') if path.is_file() and path.name != 'manifest.json'
    }
