"""Self-modifying memories against the paper's equations, written out in NumPy for one head, one token after another.

Equation numbers are those of arXiv:2512.24695v1. Vectors are columns and a memory is M (d_out, d_in), as in the paper; the project stores
the transpose, which `_stored` lays out. Nothing of the project computes anything here: its `Rule` only names the options.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.self_modifying import Inputs, Memories, Rule, self_modifying, self_modifying_reference

# Three complete chunks of four tokens and an incomplete one, or seven of two tokens and an incomplete one.
BATCH, LENGTH, HEADS, WIDTH, HIDDEN = 2, 15, 2, 4, 3
GATES = ('eta', 'alpha')

CASES = {
    # As the presets hope-linear and hope have them, but for the sizes of the chunks.
    'hope-linear': dict(kind='matrix', gradient='token', decay_to='init', chunk_size=4, projection_chunk_size=4),
    'hope': dict(kind='mlp', decay_to='init', chunk_size=4, projection_chunk_size=4),
    'matrix-token-slow-projections': dict(
        kind='matrix',
        gradient='token',
        chunk_size=2,
        projection_chunk_size=4,
        adaptive_query=True,
        self_modified=('key', 'target', 'alpha'),
    ),
    'matrix-chunk': dict(kind='matrix', chunk_size=4, projection_chunk_size=2, adaptive_query=True),
    'matrix-chunk-gd': dict(
        kind='matrix', dgd='none', chunk_size=2, projection_chunk_size=4, read='anchor', decay_to='init', self_modified=('value', 'eta')
    ),
    'mlp-slow-memory': dict(kind='mlp', chunk_size=4, projection_chunk_size=2, dgd='input_only', read='anchor', adaptive_query=True),
    'mlp-gd': dict(
        kind='mlp', chunk_size=2, projection_chunk_size=4, dgd='none', positive_eigenvalues=True, self_modified=('key', 'alpha')
    ),
    # Memories of both kinds.
    'projections-are-matrices': dict(
        kind='mlp', matrix_memories=('key', 'value', 'eta', 'alpha'), decay_to='init', chunk_size=4, projection_chunk_size=4
    ),
    'memory-is-a-matrix': dict(
        kind='mlp', matrix_memories=('memory', 'query', 'alpha'), chunk_size=4, projection_chunk_size=2, adaptive_query=True
    ),
    'gates-are-matrices': dict(
        kind='mlp', matrix_memories=('eta', 'alpha'), dgd='none', read='anchor', chunk_size=2, projection_chunk_size=4, decay_to='init'
    ),
    'gates-are-mlps': dict(
        kind='mlp', matrix_memories=('memory', 'key', 'value'), dgd='input_only', read='anchor', chunk_size=4, projection_chunk_size=2
    ),
    'mlp-static': dict(kind='mlp', chunk_size=2, projection_chunk_size=4, retention=False, positive_eigenvalues=True, self_modified=()),
}
WITHOUT_MOMENTUM = ('hope-linear', 'matrix-token-slow-projections', 'mlp-static')  # no momentum with token-wise gradients


# The equations


def _norm(x):
    """x / |x|. `memory/rows.py` adds 1e-6 under the root, so that zero stays zero."""
    return x / np.sqrt(x @ x + 1e-6)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(z):
    """sigma of Eq. 89: SiLU (section 4.6 of the specification)."""
    return z * _sigmoid(z)


def _silu_slope(z):
    return _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))


def _f(memory, x):
    """A memory without its identity: M x of a matrix, W_1 sigma(W_2 x) of Eq. 89 and 91 for [W_2, W_1]."""
    if len(memory) == 1:
        return memory[0] @ x
    into, out = memory
    return out @ _silu(into @ x)


def _generated(rule, scale, source, token):
    """k_t, v_t, q_t, eta_t, alpha_t (Eq. 86) and v_hat_t of every memory (Eq. 87), read from the projection chunk's first memories."""
    modified = lambda name, update: update if name in rule.self_modified else 0.0 * update
    x = token.key  # Eq. 86 reads all memories at x_t, which is the static key (docstring of `self_modifying.py`)
    # M(x) = x + f(x) (Eq. 89) has its identity in what it generates, of unit norm; the static value has norm one before the memory's part
    # is added (`_Tokens.value`).
    key = _norm(token.key + modified('key', _f(source['key'], x)))
    value = _norm(_norm(token.value) + modified('value', _f(source['value'], x)))
    query = _norm(token.query + _f(source['query'], x)) if rule.adaptive_query else token.query  # C5: q_t = M_q(x_t) of Eq. 79
    # C6: scalars are logits squashed: log alpha = -scale softplus(logit) (docstring of `self_modifying`, `retention_scale`), eta is a
    # sigmoid's share of the largest rate, below.
    alpha_logit = token.alpha + modified('alpha', _f(source['alpha'], x)[0])
    alpha = np.exp(-scale * np.log1p(np.exp(alpha_logit))) if rule.retention else 1.0
    eta = _sigmoid(token.eta + modified('eta', _f(source['eta'], x)[0])) * _largest_rate(rule, alpha)
    # v_hat = M(v) (Eq. 87), of unit norm; tanh of f(v) for the two scalar memories, which have no static target in its place.
    targets = {name: _norm(value + modified('target', _f(source[name], value))) for name in source if name not in GATES}
    targets |= {name: np.tanh(_f(source[name], value)) for name in GATES}
    return key, value, query, eta, alpha, targets


def _largest_rate(rule, alpha):
    """Docstring of `largest_rate`: no step grows the memory along a unit key, whose eigenvalue is alpha - 2 eta with DGD."""
    if rule.dgd == 'none':
        if rule.gradient == 'chunk':
            return 1 / max(rule.chunk_size, rule.projection_chunk_size)  # rates of a chunk sum to at most one
        return alpha if rule.positive_eigenvalues else 1 + alpha
    return alpha / 2 if rule.positive_eigenvalues else (1 + alpha) / 2


def _steps(rule, memory, key, target, eta):
    """Of each layer: its input, grad of 1/2 |f(k) - v_hat|^2 (C1; Eq. 93, Eq. 30-31) at `memory`, its rate, and its rate of erasure (DGD).

    C8: each layer is erased along its own input, with Eq. 57's rate for any norm, eta / (1 + eta |x|^2); the key has norm one and is erased
    with eta. The rates of gradients that do not come with an erasure are damped for a whole chunk's sum of them (docstring of `damping`).
    """
    if len(memory) == 1:
        gradient = np.outer(memory[0] @ key - target, key)
        return [(key, gradient, eta, 0.0 if rule.dgd == 'none' else eta)]
    into, out = memory
    z = into @ key
    hidden, slope = _silu(z), _silu_slope(z)
    error = out @ hidden - target
    together = max(rule.chunk_size, rule.projection_chunk_size)
    first_count, second_count = (1 if rule.dgd != 'none' else together), (1 if rule.dgd == 'per_layer' else together)
    first = eta / (1 + first_count * eta * np.sum((out * slope) ** 2))  # |d f / d z|^2, Frobenius
    second = eta / (1 + second_count * eta * hidden @ hidden)
    return [
        (key, np.outer(slope * (out.T @ error), key), first, 0.0 if rule.dgd == 'none' else eta),
        (hidden, np.outer(error, hidden), second, second if rule.dgd == 'per_layer' else 0.0),
    ]


def _run_head(rule, scale, initial, tokens):
    """Outputs (T, D) of one head, and at every t the memories, momenta and the projection's and the memory's chunk-start memories.

    Args:
        rule: the options.
        scale: of the head's retention.
        initial: name -> [M] or [W_2, W_1].
        tokens: `Inputs` of the head, with a leading axis of time.
    """
    memories = {name: list(layers) for name, layers in initial.items()}
    momenta = {name: [np.zeros_like(layer) for layer in layers] for name, layers in initial.items()}
    outputs, history = [], []
    for t in range(len(tokens.key)):
        # C3: xi(t), the state at the start of t's chunk, on two grids (section 8.2): one for M_memory and one for all others.
        if t % rule.projection_chunk_size == 0:
            source = {name: list(layers) for name, layers in memories.items()}
        if t % rule.chunk_size == 0:
            anchor = list(memories['memory'])
        history.append((memories, momenta, source, anchor))
        token = jax.tree.map(lambda x, t=t: x[t], tokens)
        key, _, query, eta, alpha, targets = _generated(rule, scale, source, token)
        beta = 0.0 if token.momentum is None else _sigmoid(token.momentum)
        new, new_momenta = {}, {}
        for name, layers in memories.items():
            # Eq. 88 takes the gradient at the running memory, Eq. 90 at its chunk's first.
            at = layers if rule.gradient == 'token' else anchor if name == 'memory' else source[name]
            new[name], new_momenta[name] = [], []
            parts = zip(layers, momenta[name], initial[name], _steps(rule, at, key, targets[name], eta), strict=True)
            for layer, momentum, start, (x, gradient, rate, erasure) in parts:
                # C11: S_t = beta S_{t-1} - (1 - beta) eta grad, by which a write adds up to eta (`_Generated.rate`).
                pushed = beta * momentum - (1 - beta) * rate * gradient
                # M_t = M_{t-1} (alpha I - eta x x^T) + S_t (Eq. 88), C10: what retention loses may go to the initial state.
                rest = start if rule.decay_to == 'init' else 0.0 * start
                identity = np.eye(len(x))
                new[name].append(layer @ (alpha * identity - erasure * np.outer(x, x)) + (1 - alpha) * rest + pushed)
                new_momenta[name].append(pushed)
        memories, momenta = new, new_momenta
        # C4: y_t from M_t (Eq. 82), its own token included, or from the chunk's first memory (Eq. 90).
        outputs.append(_f(anchor if rule.read == 'anchor' else memories['memory'], query))
    return np.stack(outputs), history


# The comparison


def _make(rule, momentum: bool):
    """Random inputs, scales and, for every head, name -> layers; gates spread so that neither is near an end."""
    rng = np.random.default_rng(11)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    rows, gates = (BATCH, LENGTH, HEADS, WIDTH), (BATCH, LENGTH, HEADS)
    inputs = Inputs(
        unit(rng.normal(size=rows)), unit(rng.normal(size=rows)), 2 * rng.normal(size=rows),
        rng.normal(size=gates), rng.normal(size=gates) - 1, rng.normal(size=gates) if momentum else None,
    )  # fmt: skip
    names = ('memory', 'key', 'value', *(('query',) if rule.adaptive_query else ()), *GATES)
    heads = []
    for _ in range(HEADS):
        widths = {name: 1 if name in GATES else WIDTH for name in names}
        matrix = lambda width: [0.5 * rng.normal(size=(width, WIDTH))]
        mlp = lambda width: [rng.normal(size=(HIDDEN, WIDTH)), rng.normal(size=(width, HIDDEN))]
        is_matrix = lambda name: rule.kind == 'matrix' or name in rule.matrix_memories
        heads.append({name: (matrix if is_matrix(name) else mlp)(width) for name, width in widths.items()})
    return inputs, np.array([0.4, 1.5]), heads


def _stored(memories) -> Memories:
    """One head's memories as the project stores them: transposed, first layers side by side, those of MLPs before matrices."""
    in_order = sorted(memories.values(), key=len, reverse=True)
    first = np.concatenate([layers[0].T for layers in in_order], -1)
    second = {name: layers[1].T for name, layers in memories.items() if len(layers) == 2}
    if not second:
        return Memories(first, None, None)
    wide = [layer for name, layer in second.items() if name not in GATES]
    gate = [layer for name, layer in second.items() if name in GATES]
    return Memories(first, np.stack(wide) if wide else np.zeros((0, HIDDEN, WIDTH)), np.stack(gate) if gate else np.zeros((0, HIDDEN, 1)))


def _over_heads(states) -> Memories:
    """[batch][head] of memories -> `Memories` with leading axes (B, H)."""
    rows = [jax.tree.map(lambda *heads: np.stack(heads), *map(_stored, row)) for row in states]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


@functools.cache
def _case(name: str):
    """The rule, what the project is called with, and `_run_head` of each row and head."""
    rule, momentum = Rule(**CASES[name]), name not in WITHOUT_MOMENTUM
    inputs, scale, heads = _make(rule, momentum)
    runs = [
        [_run_head(rule, scale[h], heads[h], jax.tree.map(lambda x, b=b, h=h: x[b, :, h], inputs)) for h in range(HEADS)]
        for b in range(BATCH)
    ]
    return rule, (inputs, scale, jax.tree.map(lambda *x: np.stack(x), *map(_stored, heads))), runs


def _outputs(runs):
    return np.stack([np.stack([y for y, _ in row], 1) for row in runs])


@pytest.mark.parametrize('name', CASES)
def test_outputs_and_states_are_those_of_the_equations(x64, name):
    rule, arguments, runs = _case(name)
    y, state = jax.jit(functools.partial(self_modifying, rule=rule))(*jax.tree.map(jnp.asarray, arguments))
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, _outputs(runs), rtol=0, atol=1e-9)
    # The state is that of the open chunk's start, on the finer grid; the longer chunk's is held beside it.
    base = min(rule.chunk_size, rule.projection_chunk_size)
    at = LENGTH - LENGTH % base
    of = lambda part: _over_heads([[part(history) for _, history in row] for row in runs])
    expected = {'running': of(lambda history: history[at][0])}
    if arguments[0].momentum is not None:
        expected['momentum'] = of(lambda history: history[at][1])
    if rule.chunk_size != rule.projection_chunk_size:
        expected['held'] = of(lambda history: history[LENGTH - LENGTH % max(rule.chunk_size, rule.projection_chunk_size)][0])
    for field in ('running', 'momentum', 'held'):
        got, want = getattr(state, field), expected.get(field)
        assert (got is None) == (want is None)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9, err_msg=field)


@pytest.mark.parametrize('name', CASES)
def test_outputs_of_the_token_loop_are_those_of_the_equations(x64, name):
    rule, arguments, runs = _case(name)
    y = jax.jit(functools.partial(self_modifying_reference, rule=rule))(*jax.tree.map(jnp.asarray, arguments))
    np.testing.assert_allclose(y, _outputs(runs), rtol=0, atol=1e-9)
