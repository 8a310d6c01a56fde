"""A small model on every axis of a mesh: the losses of one device, the collectives each axis is there for, and the way of a checkpoint."""

import collections
import dataclasses
import functools
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.config import LevelConfig, MemoryConfig, ModelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.compiled import collectives
from nested_jax.training.config import TrainConfig
from nested_jax.training.mesh_sizes import choose_mesh, count_slices
from nested_jax.training.optimizer import level_periods, make_optimizer
from nested_jax.training.sharding import Placement, make_mesh
from nested_jax.training.state import init_state
from nested_jax.training.step import make_loss, make_train_step
from tests.models.small_models import small

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = TrainConfig(steps=3, batch_size=8, sequence_length=16, warmup_steps=1)
# The second level is updated every second step: the sums of its gradients are state too.
LEVELS = LevelConfig(16, TRAIN.tokens_per_step), LevelConfig(16, 2 * TRAIN.tokens_per_step)
MODEL = ModelConfig('attention', num_layers=1, width=16, num_heads=2, head_dim=8, levels=LEVELS, vocab_size=64)
MATRIX = dataclasses.replace(MODEL, mixer='delta-rule', memory=MemoryConfig(kind='matrix', chunk_size=8, projection_chunk_size=8))
OPTIMIZER = make_optimizer(TRAIN, level_periods(MODEL, TRAIN.sequence_length))


def placed(**sizes):
    """Where things lie on a mesh of these sizes, what makes the parameters, the state's shapes and their shardings."""
    placement = Placement.on(make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))
    init = lambda key: LanguageModel(MODEL).init(key, jnp.zeros((1, 16), jnp.int32))['params']
    shapes = jax.eval_shape(lambda: init_state(init, OPTIMIZER, 0))
    return placement, init, shapes, placement.state(OPTIMIZER, shapes.params)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `jax.experimental.mesh_utils` looks at of a TPU's device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = 'tpu'
    device_kind: str = 'TPU v5 lite'
    core_on_chip: int = 0
    process_index: int = 0


def test_slices_lie_along_replica():
    """Two slices of 4 x 4, which have no other network between them than a data centre's."""
    chips = [Chip(16 * piece + 4 * y + x, piece, (x, y, 0)) for piece in range(2) for y in range(4) for x in range(4)]
    assert count_slices(chips) == 2 and count_slices(chips[:16]) == 1 and count_slices(jax.devices()) == 1
    for sizes in ({'replica': 2, 'fsdp': 16}, {'replica': 4, 'fsdp': 2, 'tensor': 4}):
        mesh = make_mesh(sizes, chips)
        assert dict(mesh.shape) == sizes and len(set(mesh.devices.flat)) == 32
        rows = mesh.devices.reshape(sizes['replica'], -1)
        assert [{chip.slice_index for chip in row} for row in rows] == [{i * 2 // len(rows)} for i in range(len(rows))]
    assert choose_mesh(None, MODEL, 32, 2) == {'replica': 2, 'data': 16}
    assert choose_mesh('replica=4,fsdp=8', MODEL, 32, 2) == {'replica': 4, 'fsdp': 8}
    with pytest.raises(ValueError, match="mesh is 'fsdp=32', with replica=1, allowed is a multiple of the 2 slices"):
        choose_mesh('fsdp=32', MODEL, 32, 2)


def batch_on(placement, step=0):
    tokens = np.random.default_rng(step).integers(0, MODEL.vocab_size, (8, 17)).astype(np.int32)
    ids = np.ones((8, 16), np.int32)
    rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': ids, 'weights': ids.astype(np.float32)}
    return jax.device_put(rows, placement.rows)


def loss_of(model):
    fields = ('tokens', 'targets', 'segment_ids', 'weights')
    return lambda params, batch: model_loss(LanguageModel(model), params, *(batch[name] for name in fields))


def losses(**sizes):
    """Of three steps."""
    placement, init, _, shardings = placed(**sizes)
    state, found = init_state(init, OPTIMIZER, 0, shardings), []
    step = jax.jit(make_train_step(loss_of(MODEL), OPTIMIZER), out_shardings=(shardings, placement.replicated))
    with jax.set_mesh(placement.mesh):
        for number in range(TRAIN.steps):
            state, metrics = step(state, batch_on(placement, number))
            found.append(float(metrics['loss']))
    return found


@pytest.mark.slow
def test_copies_of_split_parameters_have_the_losses_of_one_device():
    found = losses(replica=2, data=2, fsdp=2)
    np.testing.assert_allclose(found, losses(data=1), rtol=1e-6)
    assert len(set(found)) == TRAIN.steps


@functools.cache
def losses_with_dropout(model, explicit=False, **sizes):
    """Of two steps of two microbatches each, of a quarter of the values dropped: another mask is another loss."""
    model = LanguageModel(dataclasses.replace(model, dropout=0.25))
    placement = Placement.on(make_mesh(sizes, jax.devices()[: math.prod(sizes.values())], explicit))
    init, optimizer = lambda key: model.init(key, jnp.zeros((1, 16), jnp.int32))['params'], optax.adam(1e-2)
    shardings, found = placement.state(optimizer, jax.eval_shape(init, jax.random.key(0))), []
    step = jax.jit(make_train_step(make_loss(model), optimizer, 2), out_shardings=(shardings, placement.replicated))
    with jax.set_mesh(placement.mesh):
        state = init_state(init, optimizer, 0, shardings)
        for _ in range(2):
            state, metrics = step(state, batch_on(placement))
            found.append(float(metrics['loss']))
    return found


MASKED = [
    (MODEL, dict(fsdp=2, tensor=2)), (MODEL, dict(sequence=4)),
    (MODEL, dict(data=4)), (MODEL, dict(data=2, sequence=2)), (MODEL, dict(fsdp=2, tensor=2, explicit=True)), (MATRIX, dict(sequence=2)),
]  # fmt: skip


@pytest.mark.parametrize(('model', 'mesh'), [*MASKED[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in MASKED[2:])])
def test_masks_of_dropout_are_those_of_one_device(model, mesh):
    np.testing.assert_allclose(losses_with_dropout(model, **mesh), losses_with_dropout(model, data=1), rtol=1e-6)


def shapes_of(model):
    return jax.eval_shape(LanguageModel(model).init, jax.random.key(0), jnp.zeros((1, 16), jnp.int32))['params']


def moved(model, **sizes):
    """Kind of collective -> bytes of floating numbers, where gradients are to lie where their parameters do."""
    placement = Placement.on(make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))
    shapes = shapes_of(model)
    where = placement.params(shapes)
    params = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, where)
    gradient = jax.jit(lambda params, batch: jax.grad(loss_of(model), has_aux=True)(params, batch)[0], out_shardings=where)
    with jax.set_mesh(placement.mesh):
        found = collectives(gradient.lower(params, batch_on(placement)).compile().as_text())
    sums = collections.Counter()
    for each in found:
        if any(dtype.startswith('f') for dtype, _ in each.shapes):
            sums[each.kind] += each.runs * each.num_bytes
    return sums


def kinds(model, **sizes):
    return set(moved(model, **sizes))


@pytest.mark.slow
def test_axes_have_the_collectives_they_are_there_for():
    assert kinds(MODEL, replica=2) == {'all-reduce'}  # sums of gradients
    assert kinds(MODEL, tensor=2) == {'all-reduce'}  # sums of the blocks' outputs; no parameter moves
    # Keys and values come together, their gradients go home; those of parameters are summed.
    assert kinds(MODEL, sequence=2) == {'all-gather', 'reduce-scatter', 'all-reduce'}
    # States are handed on, nothing is made whole.
    assert kinds(MATRIX, sequence=2) == {'collective-permute', 'all-reduce'}


# Logits of gates for each head: their projection is whole on every device, since its columns are not in the order of heads, so that
# in the backward pass the gradients of all heads' logits come together.
GATES = {'transformer': 0, 'hope': 3, 'hope-linear': 2}


@pytest.mark.parametrize(
    'family', [pytest.param(name, marks=pytest.mark.exhaustive if name == 'hope' else pytest.mark.slow) for name in GATES]
)
def test_each_gradient_is_summed_once_and_little_else_moves(family):
    model = small(family, vocab_size=MODEL.vocab_size)
    num_bytes = lambda leaves: sum(4 * leaf.size for leaf in leaves)
    leaves = jax.tree.leaves(shapes_of(model))
    whole, matrices = num_bytes(leaves), num_bytes(leaf for leaf in leaves if leaf.ndim > 1)
    assert moved(model, data=4) == {'all-reduce': whole}
    found = moved(model, fsdp=4)
    assert set(found) <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    assert found['all-reduce'] + 4 * found['reduce-scatter'] == whole
    assert matrices / 2 < found['all-gather'] <= 2 * matrices  # in the forward pass, and most of them in the backward pass again
    found, tokens = moved(model, tensor=2), TRAIN.batch_size * TRAIN.sequence_length
    gates = 4 * tokens * model.num_layers * model.num_heads * GATES[family]
    # Sums over heads or hidden units: what the mixer and each level put out, and the gradients of their input, of one array for each
    # projection unless XLA adds those up first; also embeddings, and the gradient from the head. Norms and the loss are small.
    levels, projections, width = len(model.levels), 4 if gates else 3, 4 * tokens * model.width
    fewest, most = (model.num_layers * (1 + levels + backward) + 2 for backward in (1 + levels, projections + 2 * levels))
    assert fewest * width <= found['all-reduce'] <= (most + 1 / 2) * width
    assert found == {'all-reduce': found['all-reduce']} | ({'all-gather': gates} if gates else {})
    # Both at once: half of the rows and half of the parameters, of each of which half moves.
    both = moved(model, fsdp=2, tensor=2)
    np.testing.assert_allclose(both.pop('all-reduce'), (found['all-reduce'] + whole) / 2, rtol=0.01)
    np.testing.assert_allclose(both.pop('all-gather'), (moved(model, fsdp=2)['all-gather'] + gates) / 2, rtol=0.03)
    assert set(both) <= {'collective-permute'} and both['collective-permute'] < matrices / 20


CHAIN = {'data': 1}, {'fsdp': 2}, {'data': 4}, {'fsdp': 8}, {'data': 1}


def test_a_checkpoint_goes_from_one_mesh_to_the_next(tmp_path):
    """R3: the arrays of the first on each, and the loss of the next step."""
    checkpoints, first, expected = Checkpoints(tmp_path), None, {}
    raw = lambda leaf: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
    for number, sizes in enumerate(CHAIN):
        placement, init, shapes, shardings = placed(**sizes)
        if first is None:
            state = init_state(init, OPTIMIZER, 0, shardings)
            count = lambda leaf: np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)  # moments start at zero
            state = state._replace(opt_state=jax.device_put(jax.tree.map(count, state.opt_state), shardings.opt_state))
            first = jax.tree.map(raw, state)
        else:
            like = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)
            state = checkpoints.restore(like).state
        for leaf, where, wanted in zip(*map(jax.tree.leaves, (state, shardings, first)), strict=True):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
            np.testing.assert_array_equal(raw(leaf), wanted, strict=True)
        for dtype, tolerance in (('float32', 1e-6), ('bfloat16', 2e-3))[: 2 if number in (0, 3) else 1]:
            with jax.set_mesh(placement.mesh):
                nats, count = jax.jit(loss_of(dataclasses.replace(MODEL, dtype=dtype)))(state.params, batch_on(placement))
            np.testing.assert_allclose(nats / count, expected.setdefault(dtype, nats / count), rtol=tolerance)
        checkpoints.save(number + 1, state, config={}, data={})
    checkpoints.wait()


def test_sizes_are_checked_without_a_model():
    """Wrong ones are said within two seconds, of which flax and the families would take a third."""
    program = 'import sys; import nested_jax.training.mesh_sizes; print(*sorted({"flax", "optax"} & sys.modules.keys()))'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True).stdout == '\n'
