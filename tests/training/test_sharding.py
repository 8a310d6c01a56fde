"""On eight devices: the losses of one, a share of the state on each, and no collective that moves an optimizer's moment."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.config import InSequenceConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss
from nested_jax.models.presets import preset, preset_names
from nested_jax.training.checkpoints import Checkpoints
from nested_jax.training.compiled import collectives, report
from nested_jax.training.config import TrainConfig, check_model
from nested_jax.training.mesh_sizes import choose_mesh, parse_mesh
from nested_jax.training.optimizer import make_optimizer
from nested_jax.training.sharding import Placement, ShardingRules, make_mesh, process_rows, recipe
from nested_jax.training.state import init_state
from nested_jax.training.step import make_eval_step, make_train_step
from tests.models.small_models import small

FSDP = {'fsdp': 8}
BOTH = {'fsdp': 4, 'tensor': 2}
MESHES = {
    'one': {'data': 1},
    'data': {'data': 8},
    'fsdp': FSDP,
    'fsdp-tensor': BOTH,
    'data-fsdp-tensor': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'sequence': {'sequence': 4},
    'data-sequence': {'data': 2, 'sequence': 4},
    'fsdp-sequence': {'fsdp': 4, 'sequence': 2},
}
STEPS = 20
# Twenty steps of float32 take RetNet's roundings to 2e-5 and Memora's to 8e-6; in float64 their losses are the same.
WIDE = ('retnet-tiny', 'memora-tiny')
TRAIN = TrainConfig(steps=STEPS, batch_size=8, sequence_length=64, learning_rate=1e-3, warmup_steps=2)


def batches(name, steps=STEPS):
    draw = np.random.default_rng(0)
    for _ in range(steps):
        tokens = draw.integers(0, preset(name).vocab_size, (8, 65)).astype(np.int32)
        ids = np.ones((8, 64), np.int32)
        yield {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': ids, 'weights': ids.astype(np.float32)}


@functools.cache
def program(name, mesh, steps=STEPS):
    """What makes the state where it belongs, the compiled step, the placement and the state's shardings."""
    dtype = 'float64' if name in WIDE else 'float32'
    model = LanguageModel(preset(name, scan_layers=True, remat='block', dtype=dtype))
    optimizer, sizes = make_optimizer(dataclasses.replace(TRAIN, steps=steps)), MESHES[mesh]
    placement = Placement.on(make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))
    init = lambda key: model.init(key, jnp.zeros((1, 64), jnp.int32))['params']
    shardings = placement.state(optimizer, jax.eval_shape(init, jax.random.key(0)))
    make = lambda: init_state(init, optimizer, 0, shardings)
    loss = lambda params, batch: model_loss(model, params, *(batch[key] for key in ('tokens', 'targets', 'segment_ids', 'weights')))
    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0, out_shardings=(shardings, placement.replicated))
    with jax.set_mesh(placement.mesh):
        compiled = step.lower(make(), jax.device_put(next(batches(name)), placement.rows)).compile()
    return make, compiled, placement, shardings


def losses(name, mesh, steps=STEPS):
    make, step, placement, _ = program(name, mesh, steps)
    state, found = make(), []
    for batch in batches(name, steps):
        state, metrics = step(state, jax.device_put(batch, placement.rows))
        found.append(float(metrics['loss']))
    return found


alone = functools.cache(functools.partial(losses, mesh='one'))
DEFAULT = [('transformer-tiny', 'fsdp'), ('transformer-tiny', 'fsdp-tensor')]
SLOW = [('hope-linear-tiny', 'fsdp-tensor')]
PRODUCT = [(f'{family}-tiny', mesh) for family in ('hope', 'hope-linear', 'transformer') for mesh in MESHES if mesh != 'one']
OTHERS = [(name, 'fsdp') for name in preset_names() if name.endswith('-tiny') and (name, 'fsdp') not in PRODUCT]
EXHAUSTIVE = [case for case in PRODUCT + OTHERS if case not in DEFAULT + SLOW]
marked = lambda cases, mark: [pytest.param(*case, marks=mark) for case in cases]


def of_families(cases, mark):
    """Families are tested side by side, on a worker each; the Transformer's programs serve other tests of this file too."""
    grouped = lambda name: [] if name == 'transformer-tiny' else [pytest.mark.xdist_group(f'sharding of {name}')]
    return [pytest.param(name, mesh, marks=[mark, *grouped(name)]) for name, mesh in cases]


@pytest.mark.parametrize(
    ('name', 'mesh'), [*DEFAULT, *of_families(SLOW, pytest.mark.slow), *of_families(EXHAUSTIVE, pytest.mark.exhaustive)]
)
def test_losses_are_those_of_one_device(name, mesh, request):
    if name in WIDE:
        request.getfixturevalue('x64')
    found = losses(name, mesh)
    np.testing.assert_allclose(found, alone(name), rtol=1e-6)
    assert len(set(found)) == STEPS


@pytest.mark.parametrize('sizes', [{'fsdp': 2, 'tensor': 2}, pytest.param({'data': 2, 'sequence': 2}, marks=pytest.mark.slow)])
def test_explicit_axes_change_roundings_at_most_and_are_in_the_types(sizes):
    """With two microbatches, where rows are not split by sequence as well. They are two programs: on some CPUs an ulp differs."""
    model, train = LanguageModel(small('transformer')), dataclasses.replace(TRAIN, accumulation=1 if 'sequence' in sizes else 2)
    init = lambda key: model.init(key, jnp.zeros((1, 32), jnp.int32))['params']
    loss = lambda params, batch: model_loss(model, params, batch['tokens'], batch['targets'])
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 32)).astype(np.int32)

    def two_steps(explicit):
        placement, optimizer = Placement.on(make_mesh(sizes, jax.devices()[:4], explicit)), make_optimizer(train)
        shardings = placement.state(optimizer, jax.eval_shape(init, jax.random.key(0)))
        outputs = (shardings, placement.replicated)
        step = jax.jit(make_train_step(loss, optimizer, train.accumulation), donate_argnums=0, out_shardings=outputs)
        batch, found = jax.device_put(dict(tokens=tokens, targets=tokens), placement.rows), []
        with jax.set_mesh(placement.mesh):
            state = init_state(init, optimizer, 0, shardings)
            for _ in range(2):
                state, metrics = step(state, batch)
                found.append(float(metrics['loss']))
            found.append(float(jax.jit(make_eval_step(loss))(state.params, batch)[0]))
        return found, {name for leaf in jax.tree.leaves(state) for name in jax.tree.leaves(tuple(jax.typeof(leaf).sharding.spec))}

    (auto, untyped), (explicit, typed) = two_steps(False), two_steps(True)
    np.testing.assert_allclose(explicit, auto, rtol=1e-6)
    assert not untyped and typed == set(sizes) & {'fsdp', 'tensor'}


@pytest.mark.parametrize(
    ('axes', 'shape', 'expected'),
    [
        (('embed', 'heads'), (16, 8), jax.P('fsdp', 'tensor')),
        (('layers', 'heads', 'embed'), (3, 8, 16), jax.P(None, 'tensor', 'fsdp')),
        (('layers', 'heads', None, None), (8, 8, 16, 16), jax.P(None, ('tensor', 'fsdp'), None, None)),  # memories by head
        (('layers', 'heads', None, None), (8, 2, 6, 16), jax.P(None, 'tensor', None, 'fsdp')),  # or what divides next
        (('heads', None, None), (2, 3, 3), jax.P('tensor', None, None)),
        (('embed', 'heads'), (16, 7), jax.P('fsdp', None)),  # 7 heads stay whole
        (('embed', 'heads'), (6, 16), jax.P(None, ('tensor', 'fsdp'))),
        (('layers', 'embed'), (8, 16), jax.P(None, None)),  # vectors are not spread
        (('heads',), (16,), jax.P('tensor')),
    ],
)
def test_axes_of_the_mesh_go_where_they_divide(axes, shape, expected):
    assert recipe(('fsdp', 'tensor')).spec(axes, shape, {'fsdp': 4, 'tensor': 2}) == expected


def test_rules_that_collide_are_refused():
    sizes = {'fsdp': 4, 'tensor': 2}
    with pytest.raises(ValueError, match="two of the axes .* would be split over 'fsdp'"):
        ShardingRules(embed=('fsdp',), heads=('fsdp',)).spec(('embed', 'heads'), (16, 16), sizes)
    with pytest.raises(ValueError, match=r"a mesh axis 'data', allowed are those of the mesh, \('fsdp', 'tensor'\)"):
        ShardingRules(embed=('data',)).spec(('embed', 'heads'), (16, 16), sizes)
    with pytest.raises(ValueError, match=r'rules.mlp is .*model.*, allowed are some of'):
        ShardingRules(mlp=('model',))
    with pytest.raises(ValueError, match='rules.batch is .*each once'):
        ShardingRules(batch=('data', 'data'))
    with pytest.raises(ValueError, match="the mesh has an axis 'model', allowed are replica, data, fsdp, sequence, tensor"):
        recipe(('data', 'model'))


@pytest.mark.parametrize('text', ['data', 'data=0', 'data=2,data=4', 'model=8', 'data=4', 'data=16', '', 'data=-8', 'fsdp=8,'])
def test_bad_meshes_are_named(text):
    with pytest.raises(ValueError, match=re.escape(f'mesh is {text!r}')):
        parse_mesh(text, 8)


def test_meshes_are_chosen():
    hope = preset('hope-tiny')
    assert choose_mesh('data=2, fsdp=4', hope, 8) == {'data': 2, 'fsdp': 4}
    assert choose_mesh(None, hope, 8) == {'data': 8}
    assert choose_mesh(None, hope, 1) == {'data': 1}
    assert choose_mesh(None, preset('transformer-340m'), 8) == {'fsdp': 8}
    with pytest.raises(ValueError, match='mesh has tensor=8, allowed is a divisor of num_heads=4'):
        choose_mesh('tensor=8', hope, 8)
    assert choose_mesh('tensor=2,sequence=4', preset('transformer-tiny'), 8) == {'tensor': 2, 'sequence': 4}
    with pytest.raises(ValueError, match='mesh has sequence=4 and tensor=2, allowed is one of them, except for attention alone'):
        choose_mesh('sequence=4,tensor=2', hope, 8)
    in_sequence = preset('hope-tiny', in_sequence=InSequenceConfig((3,)))
    with pytest.raises(ValueError, match='mesh has sequence=8, allowed is 1 where levels are updated within a sequence'):
        choose_mesh('sequence=8', in_sequence, 8)
    check_model(TRAIN, hope, 256, 4)
    with pytest.raises(ValueError, match="sequence_length is 64, allowed is a multiple of the mesh's sequence x .* grid = 8 x 16"):
        check_model(TRAIN, hope, 256, 8)
    mesh = make_mesh({'tensor': 2, 'data': 4}, jax.devices())
    assert dict(mesh.shape) == {'data': 4, 'tensor': 2} and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def shapes_of(name):
    model = LanguageModel(preset(name))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, model.config.grid), jnp.int32)))['params']


def share(tree, shardings):
    """Bytes on one device, over bytes altogether."""
    size = lambda leaf, shape: np.prod(shape) * leaf.dtype.itemsize
    ours = jax.tree.map(lambda leaf, where: size(leaf, where.shard_shape(leaf.shape)), tree, shardings)
    return sum(jax.tree.leaves(ours)) / sum(jax.tree.leaves(jax.tree.map(lambda leaf: size(leaf, leaf.shape), tree)))


SHARED = ('hope-tiny', 'hope-linear-tiny', 'transformer-tiny', 'titans-tiny', 'mamba2-tiny', 'hope-1.3b')
SHARES = [(name, sizes) for name in SHARED for sizes in (FSDP, BOTH)]
SHARES_OF_OTHERS = [(name, FSDP) for name in preset_names() if name.endswith('-tiny') and name not in SHARED]


@pytest.mark.parametrize(('name', 'sizes'), [*SHARES, *marked(SHARES_OF_OTHERS, pytest.mark.exhaustive)], ids=str)
def test_every_device_holds_its_share(name, sizes):
    placement, params = Placement.on(make_mesh(sizes, jax.devices())), shapes_of(name)
    periods = {f'level_{index}': 512 * 2**index for index in range(4)}  # slow levels keep sums of gradients
    for kind in ('adamw', 'muon', 'm3'):
        optimizer = make_optimizer(dataclasses.replace(TRAIN, optimizer=kind), periods, placement.params(params))
        shardings = placement.state(optimizer, params)
        state = jax.eval_shape(optimizer.init, params)
        assert share(params, shardings.params) <= 1.1 / 8
        assert share(state, shardings.opt_state) <= 1.1 / 8, kind


def test_state_is_made_where_it_belongs_and_the_optimizer_gathers_nothing():
    make, step, placement, shardings = program('transformer-tiny', 'fsdp-tensor')
    state, optimizer = make(), make_optimizer(TRAIN)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    update = jax.jit(optimizer.update, out_shardings=(shardings.params, shardings.opt_state))
    of_update = collectives(update.lower(state.params, state.opt_state, state.params).compile().as_text())
    assert {each.kind for each in of_update} == {'all-reduce'}  # of the norm
    assert all(each.num_bytes < 1000 for each in of_update)


def test_a_step_gathers_parameters_and_sums_gradients():
    make, step, placement, _ = program('transformer-tiny', 'fsdp')
    found = report(step)
    assert 'all-gather' in found['collectives'] and {'all-reduce', 'reduce-scatter'} & set(found['collectives'])
    state = make()
    ours = jax.tree.leaves(
        jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.nbytes, state._replace(key=jax.random.key_data(state.key)))
    )
    batch = 4 * (8 * 64 * 4) // 8
    assert found['memory']['arguments'] == pytest.approx(sum(ours) + batch, abs=64)
    # Parameters in the forward and the backward pass, no moments: three times all of them would have those too.
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert found['collectives']['all-gather']['bytes'] < 2.5 * whole


def carried(folder, name, parts):
    """Losses of a run that goes on, from its last checkpoint, on one mesh after the other: (mesh, steps on it)."""
    steps, found, checkpoints = sum(count for _, count in parts), [], Checkpoints(folder)
    stream = batches(name, steps)
    for mesh, count in parts:
        make, step, placement, shardings = program(name, mesh, steps)
        state = make()
        if found:
            like = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, shardings)
            state = checkpoints.restore(like).state
            same = jax.tree.map(lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim), state, shardings)
            assert all(jax.tree.leaves(same))
        for batch in itertools.islice(stream, count):
            state, metrics = step(state, jax.device_put(batch, placement.rows))
            found.append(float(metrics['loss']))
        checkpoints.save(len(found), state, config={}, data={})
    checkpoints.wait()
    return found


LONG = [('fsdp-tensor', 3), ('sequence', 20), ('one', 20)]  # 8, 4 and 1 devices


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        ('transformer-tiny', [('fsdp', 3), ('one', 3), ('fsdp', 14)]),
        *marked([(f'{family}-tiny', LONG) for family in ('hope', 'hope-linear', 'transformer')], pytest.mark.exhaustive),
    ],
)
def test_checkpoints_move_to_another_mesh(tmp_path, name, parts):
    """Against the run that stays on the first mesh; the long ones do twenty steps on each of two others."""
    found = carried(tmp_path, name, parts)
    np.testing.assert_allclose(found, losses(name, parts[0][0], len(found)), rtol=1e-6)


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


class Spread:
    """A sharding whose eight devices belong to processes, which those of a test do not."""

    def __init__(self, sharding, owners):
        self.sharding, self.owners = sharding, owners

    def devices_indices_map(self, shape):
        places = self.sharding.devices_indices_map(shape).items()
        return {Device(self.owners[device.id]): where for device, where in places}


@pytest.mark.parametrize('sizes', [{'data': 8}, {'replica': 2, 'data': 4}, {'fsdp': 4, 'tensor': 2}, {'tensor': 8}], ids=str)
@pytest.mark.parametrize('owners', [(0,) * 8, (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 0, 0, 1, 1), tuple(range(8))], ids=str)
def test_processes_share_the_rows_of_a_batch(sizes, owners):
    """Together they hold every row and count each once, also where devices of one row belong to several, or of one process lie apart."""
    rows = Placement.on(make_mesh(sizes, jax.devices())).rows
    counted = []
    for process in set(owners):
        held, own = process_rows(Spread(rows, owners), 16, process)
        local = [where for device, where in rows.devices_indices_map((16,)).items() if owners[device.id] == process]
        assert set(held) == {row for (where,) in local for row in range(16)[where]}
        counted += list(held[own])
    assert sorted(counted) == list(range(16))


def test_rows_of_a_process_become_a_global_array():
    placement = Placement.on(make_mesh(BOTH, jax.devices()))
    tokens = np.arange(24).reshape(8, 3)
    placed = placement.place(dict(tokens=tokens), 8)['tokens']
    assert placed.sharding == placement.rows
    np.testing.assert_array_equal(placed, tokens)


@pytest.mark.parametrize('name', ['muon', pytest.param('m3', marks=pytest.mark.slow)])
def test_split_matrices_are_orthogonalised_without_gathering_them(name, x64):
    """Two updates of 8 layers on 4 x 2 devices: those of one device, moved by all-to-alls, no matrix whole anywhere."""
    config = dataclasses.replace(TRAIN, optimizer=name, slow_period=2 if name == 'm3' else TRAIN.slow_period)
    model = LanguageModel(preset('transformer-tiny', num_layers=8, width=64, num_heads=4, head_dim=16))
    init = lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(key, jnp.zeros((1, 64), jnp.int32))['params'])
    placement, params = Placement.on(make_mesh(BOTH, jax.devices())), jax.jit(init)(jax.random.key(0))
    gradients = jax.jit(init)(jax.random.key(1))

    def two_updates(optimizer, state):
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    alone = make_optimizer(config)
    expected = two_updates(alone, alone.init(params))
    where = placement.params(params)
    optimizer, shardings = make_optimizer(config, shardings=where), placement.state(make_optimizer(config), params).opt_state
    params, gradients = jax.device_put((params, gradients), (where, where))
    update = jax.jit(optimizer.update, out_shardings=(where, shardings)).lower(gradients, optimizer.init(params), params).compile()
    state = jax.device_put(optimizer.init(params), shardings)
    for _ in range(2):
        updates, state = update(gradients, state, params)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12), updates, expected)
    found = collectives(update.as_text())
    assert 'all-to-all' in {each.kind for each in found}
    whole = 8 * min(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 3)
    assert all(each.num_bytes < whole for each in found if each.kind == 'all-gather'), found
