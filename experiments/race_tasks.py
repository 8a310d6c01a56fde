"""What the optimizers race on: character-level language modelling, digits, associative recall and a stream of orthogonal tasks."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import recall
from experiments.racing import Task
from nested_jax.data.corpora import load_corpus
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import model_loss

HELD_OUT = 2**31  # a key's seed, or folded into a key: apart from every training step
LENGTH, BATCH = 64, 16  # of the language model, in bytes
RECALL = (32, 2, 4)  # length, fewest and most pairs
DIGITS_MODEL = dict(patch=2, width=48, heads=4, blocks=2, mlp_width=96, classes=10)
STREAM_RANK, STREAM_OUTPUTS, STREAM_TASKS = 16, 16, 3


class VisionTransformer(nn.Module):
    """Pre-norm encoder over the patches of an image, averaged for a class.

    Its layers see all patches along one axis: a step of the small one takes a quarter less on a CPU.
    """

    patch: int
    width: int
    heads: int
    blocks: int
    mlp_width: int
    classes: int
    dtype: Any = None  # of products and activations; parameters are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, S, S) or (B, S, S, channels) -> (B, classes) logits."""
        dense, norm = functools.partial(nn.Dense, dtype=self.dtype), functools.partial(nn.LayerNorm, dtype=self.dtype)
        batch, side = images.shape[0], images.shape[1] // self.patch
        patches = images.reshape(batch, side, self.patch, side, self.patch, -1).swapaxes(2, 3).reshape(batch * side**2, -1)
        positions = self.param('position_embedding', nn.initializers.normal(0.02), (side**2, self.width))
        x = dense(self.width, name='patch_embedding')(patches).reshape(batch, side**2, -1)
        x = (x + positions[None].astype(x.dtype)).reshape(batch * side**2, -1)
        for block in range(self.blocks):
            attention = _SelfAttention(self.width, self.heads, self.dtype, name=f'attention_{block}')
            x = x + attention(norm(name=f'attention_norm_{block}')(x), batch)
            hidden = dense(self.mlp_width, name=f'up_{block}')(norm(name=f'mlp_norm_{block}')(x))
            x = x + dense(self.width, name=f'down_{block}')(nn.gelu(hidden))
        return dense(self.classes, name='head')(norm(name='norm')(x).reshape(batch, side**2, -1).mean(1))


class _SelfAttention(nn.Module):
    width: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, batch: int) -> jax.Array:
        dense = functools.partial(nn.Dense, self.width, dtype=self.dtype)
        project = lambda name: dense(name=name)(x).reshape(batch, -1, self.heads, self.width // self.heads)
        y = jax.nn.dot_product_attention(project('query'), project('key'), project('value'))
        return dense(name='out')(y.reshape(x.shape))


def char_lm(steps: int) -> Task:
    """Bytes of the running Python's standard library: a Transformer of two layers of width 64 on windows of 64."""
    corpus, model = load_corpus(), LanguageModel(recall.model_config('transformer'))
    texts = dict(train=corpus.train_bytes(), heldout=corpus.heldout_bytes())
    data = {name: jnp.asarray(np.frombuffer(text, np.uint8)) for name, text in texts.items()}

    def draw(data, key, step):
        return _windows(data['train'], jax.random.fold_in(key, step), BATCH)

    def heldout(data, key):
        rows = _windows(data['heldout'], jax.random.key(HELD_OUT), 256)
        return jax.tree.map(lambda leaf: leaf[:128], rows), jax.tree.map(lambda leaf: leaf[128:], rows)

    return Task(steps, data, _init_of(model), draw, heldout, _token_loss(model), math.log(256), 0.5, source=corpus.digest)


def associative_recall(steps: int) -> Task:
    """`experiments.recall` with the Transformer that has short convolutions, on 32 tokens with two to four pairs."""
    model = LanguageModel(recall.model_config('transformer-conv'))

    def draw(data, key, step):
        return recall.draw_sequences(jax.random.fold_in(key, step), 32, *RECALL)

    def heldout(data, key):
        draw = lambda index: recall.draw_sequences(jax.random.fold_in(jax.random.key(HELD_OUT), index), 512, *RECALL)
        return draw(0), draw(1)

    return Task(steps, {}, _init_of(model), draw, heldout, _token_loss(model), math.log(256), 0.5)


def digits(steps: int) -> Task:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth for the search and a fifth held out: a small vision transformer.

    Raises:
        ValueError: without scikit-learn.
    """
    check_digits()
    found = importlib.import_module('sklearn.datasets').load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = found.images[order].astype(np.float32) / 16, found.target[order].astype(np.int32)
    fifth, names = len(order) // 5, ('search', 'comparison', 'train')
    parts = dict(zip(names, (slice(fifth), slice(fifth, 2 * fifth), slice(2 * fifth, None)), strict=True))
    data = {name: dict(images=jnp.asarray(images[part]), labels=jnp.asarray(labels[part])) for name, part in parts.items()}
    model = VisionTransformer(**DIGITS_MODEL)

    def draw(data, key, step):
        chosen = jax.random.randint(jax.random.fold_in(key, step), (64,), 0, data['train']['labels'].size)
        return jax.tree.map(lambda leaf: leaf[chosen], data['train'])

    def loss(params, batch):
        scores = jax.nn.log_softmax(model.apply({'params': params}, batch['images']))
        return -jnp.take_along_axis(scores, batch['labels'][:, None], 1).mean()

    init = lambda key: model.init(key, jnp.zeros((1, 8, 8)))['params']
    return Task(steps, data, init, draw, lambda data, key: (data['search'], data['comparison']), loss, math.log(10), 0.5)


def has_digits() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec('sklearn') is not None


def check_digits() -> None:
    """Raises ValueError, naming the extra, where scikit-learn is missing."""
    if not has_digits():
        raise ValueError("tasks holds 'digits', allowed where scikit-learn is installed: pip install -e '.[race]'")


def stream(steps: int) -> Task:
    """Three regressions one after the other, on inputs from orthogonal subspaces (Eq. 45, arXiv:2512.24695v1); held out are all three.

    The gradients of one are orthogonal to the weights of the others: only what an optimizer remembers goes on with an earlier one, or
    spoils it. Each run draws its own subspaces and targets. Inputs have variances of a power law, so that no regression is done when
    its time is over, and the learning rate stays on its plateau, so that none is favoured.
    """
    size, model = STREAM_RANK * STREAM_TASKS, nn.Dense(STREAM_OUTPUTS, use_bias=False)
    variances = np.arange(1, STREAM_RANK + 1) ** -2.0
    scales = jnp.asarray(np.sqrt(variances / variances.sum()), jnp.float32)

    def problem(key):
        basis_key, target_key = jax.random.split(jax.random.fold_in(key, HELD_OUT))
        basis = jnp.linalg.qr(jax.random.normal(basis_key, (size, size)))[0].reshape(size, STREAM_TASKS, STREAM_RANK)
        return basis, jax.random.normal(target_key, (size, STREAM_OUTPUTS))

    def draw(data, key, step):
        basis, target = problem(key)
        current = jnp.minimum(step * STREAM_TASKS // steps, STREAM_TASKS - 1)
        noise = jax.random.normal(jax.random.fold_in(key, step), (32, STREAM_RANK))
        inputs = (noise * scales[None]) @ jnp.take(basis, current, 1).T
        return inputs, inputs @ target

    def heldout(data, key):
        basis, target = problem(key)  # the expectation over inputs, exactly: each direction once, as long as its standard deviation
        inputs = math.sqrt(STREAM_RANK) * (basis * scales[None, None]).reshape(size, size).T
        return (inputs, inputs @ target), (inputs, inputs @ target)

    def loss(params, batch):
        inputs, targets = batch
        return jnp.mean(jnp.square(model.apply({'params': params}, inputs) - targets))

    init = lambda key: model.init(key, jnp.zeros((1, size)))['params']
    return Task(steps, {}, init, draw, heldout, loss, ceiling=2.0, decay_share=0.0, budget=40)


TASKS: dict[str, Callable[[int], Task]] = {'char-lm': char_lm, 'digits': digits, 'recall': associative_recall, 'stream': stream}
STEPS = {'char-lm': 100, 'digits': 100, 'recall': 130, 'stream': 300}


def _windows(text: jax.Array, key: jax.Array, count: int) -> dict[str, jax.Array]:
    starts = jax.random.randint(key, (count, 1), 0, text.size - LENGTH)
    rows = text[starts + jnp.arange(LENGTH + 1)[None]].astype(jnp.int32)
    return dict(tokens=rows[:, :-1], targets=rows[:, 1:], weights=jnp.ones((count, LENGTH)))


def _init_of(model: LanguageModel) -> Callable:
    return lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))['params']


def _token_loss(model: LanguageModel) -> Callable:
    def loss(params, batch):
        total, count = model_loss(model, params, batch['tokens'], batch['targets'], weights=batch['weights'])
        return total / count

    return loss
