"""A step of each optimizer on the same gradients, and one of training with each form of delta gradient descent."""

import functools
import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.race_tasks import DIGITS_MODEL, VisionTransformer
from nested_jax import optim
from nested_jax.layers.delta_descent import capture_inputs, delta_dense, inputs_for
from nested_jax.models import preset
from scripts.benchmarks.timing import Settings, by_turns, compile_timed


def layer_shapes(width: int, hidden: int, layers: int) -> list[dict[str, tuple[int, int]]]:
    """Matrices of a Transformer's layers, each a parameter of its own."""
    layer = dict(query=(width, width), key=(width, width), value=(width, width), output=(width, width))
    return [layer | dict(gate=(width, hidden), up=(width, hidden), down=(hidden, width)) for _ in range(layers)]


def trees_of(settings: Settings) -> tuple[dict[str, list], list]:
    """Trees to take steps on by name, and the one that is only compiled."""
    if settings.smoke:
        return {'1 layer of 32': layer_shapes(32, 64, 1)}, layer_shapes(32, 64, 2)
    large = preset('transformer-340m')
    layers = functools.partial(layer_shapes, large.width, large.levels[0].hidden_dim)
    return {'24 layers of 512': layer_shapes(512, 1408, 24), '2 layers of the 340m preset': layers(2)}, layers(large.num_layers)


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Of two programs timed by turns."""
    return statistics.median(each / other for each, other in zip(seconds, others, strict=True))


def memory_of(program: jax.stages.Compiled) -> dict[str, float]:
    """MiB of a program's temporaries, and of all it holds at a time: arguments, results and these."""
    sizes = program.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    return dict(temporary_mib=sizes.temp_size_in_bytes / 2**20, peak_mib=total / 2**20)


def compile_update(make: Callable, shapes: list) -> dict[str, float]:
    """Seconds to compile an update, which needs no parameters, and its memory."""
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, 'float32'), shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    optimizer = make()
    update, seconds = compile_timed(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)
    return dict(compile_s=seconds) | memory_of(update)


def optimizer_step(make: Callable, shapes: list, advance: int) -> tuple[Callable[[], object], dict[str, float]]:
    """A compiled update as a synchronised call, `advance` steps into training; compile seconds and memory."""
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))))
    gradients = jax.tree.map(lambda leaf, key: jax.random.normal(key, leaf.shape), params, keys)
    optimizer = make()
    state = optimizer.init(params)
    update, seconds = compile_timed(optimizer.update, gradients, state, params)
    for _ in range(advance):
        state = update(gradients, state, params)[1]
    return lambda: jax.block_until_ready(update(gradients, state, params)), dict(compile_s=seconds) | memory_of(update)


def optimizer_steps(settings: Settings):
    """Cost of a step of each optimizer on the same gradients; M3's is the mean over a period of its slow momentum."""
    period = 10
    makers = {
        'optax.adamw': lambda: optax.adamw(1e-3),
        'optax.contrib.muon': lambda: optax.contrib.muon(1e-3),
        'muon': lambda: optim.muon(1e-3),
        'm3': lambda: optim.m3(1e-3, periods=(period,)),
    }
    trees, whole = trees_of(settings)
    for tree, shapes in trees.items():
        made = {name: optimizer_step(make, shapes, advance=1) for name, make in makers.items()}
        renewing = optimizer_step(makers['m3'], shapes, advance=period)[0]
        spent = by_turns({name: run for name, (run, _) in made.items()} | dict(renewing=renewing), settings.repeats, time.perf_counter)
        spent['m3'] = [((period - 1) * each + new) / period for each, new in zip(spent['m3'], spent.pop('renewing'), strict=True)]
        for name, (_, compiled) in made.items():
            costs = dict(step_s=statistics.median(spent[name])) | compiled
            ratios = {f'to_{other}': median_ratio(spent[name], spent[other]) for other in ('optax.contrib.muon', 'muon')}
            yield dict(what='optimizer', model=name, tree=tree) | costs | ratios
    # All layers are only compiled: a step of theirs takes minutes, and optax.contrib.muon 7 GiB of temporaries beside 5 of arrays.
    for name, make in makers.items():
        yield dict(what='optimizer', model=name, tree='the 340m preset') | compile_update(make, whole)


def delta_forms(model: VisionTransformer, images: jax.Array) -> dict[str, Callable[[], object]]:
    """Training steps on images, compiled, as synchronised calls: with gradients as they are, and with both forms of the direction."""
    rate, labels = 0.1, jnp.arange(len(images)) % model.classes
    params = jax.jit(model.init)(jax.random.key(0), images)['params']
    loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def plain(params):
        return jax.grad(lambda params: loss(model.apply({'params': params}, images)))(params), {}

    def cheap(params):
        with nn.intercept_methods(delta_dense(rate)):
            return plain(params)

    def exact(params):
        def captured(params):
            logits, state = model.apply({'params': params}, images, mutable='delta_inputs')
            return loss(logits), inputs_for(params, state['delta_inputs'])

        with nn.intercept_methods(capture_inputs):
            gradients, inputs = jax.grad(captured, has_aux=True)(params)
        return gradients, dict(inputs=inputs)

    def compiled(gradient: Callable, optimizer: optax.GradientTransformationExtraArgs) -> Callable[[], object]:
        def step(params, state):
            gradients, extra = gradient(params)
            updates, state = optimizer.update(gradients, state, params, **extra)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        program = compile_timed(step, params, state)[0]
        return lambda: jax.block_until_ready(program(params, state))

    forms = dict(plain=plain, cheap=cheap, exact=exact)
    return {form: compiled(gradient, optim.delta_gradient_descent(rate, exact=form == 'exact')) for form, gradient in forms.items()}


def delta_steps(settings: Settings):
    """Cost of delta gradient descent for whole networks: processor seconds of a step, and their ratio to plain gradients' beside it."""
    wide = DIGITS_MODEL | dict(width=512, heads=8, mlp_width=1024)
    models = {'digits of the race': (DIGITS_MODEL, (64, 8, 8)), 'width 512, 2,048 tokens': (wide, (32, 16, 16))}
    if settings.smoke:
        models = {'digits of the race': (DIGITS_MODEL, (2, 8, 8))}
    for tree, (model, shape) in models.items():
        runs = delta_forms(VisionTransformer(**model), jax.random.uniform(jax.random.key(1), shape))
        spent = by_turns(runs, settings.repeats, time.process_time)
        for form, seconds in spent.items():
            costs = dict(cpu_seconds=statistics.median(seconds), ratio=median_ratio(seconds, spent['plain']))
            yield dict(what='delta gradient descent', model=form, tree=tree) | costs


PARTS = (optimizer_steps, delta_steps)
