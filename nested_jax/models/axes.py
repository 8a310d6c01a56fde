"""Logical axis names of every parameter: what a sharding rule maps to mesh axes.

'layers' stacked blocks, 'embed' the model's width, 'heads' heads or heads times head width, 'mlp' hidden units, 'vocab';
None for axes that are never split.
"""

import re

import jax
from jax.sharding import AxisType

from nested_jax.layers.mesh import BATCH_AXES, batch_axes

Axes = tuple[str | None, ...]

# First match wins; the path is that of the parameter, without the leading 'blocks/'.
_RULES: tuple[tuple[str, Axes], ...] = (
    (r'embedding$', ('vocab', 'embed')),
    (r'head$', ('embed', 'vocab')),
    (r'initial_\w+$', ('heads', None, None)),
    (r'shared_\w+_convolution/kernel$', (None, None)),
    (r'shared_\w+_convolution/bias$', (None,)),
    (r'\w+_convolution/kernel$', (None, 'heads')),
    (r'\w+_convolution/bias$', ('heads',)),
    (r'(query|key|value|block/gate)/kernel$', ('embed', 'heads')),
    (r'(output|output_projection)/kernel$', ('heads', 'embed')),
    (r'(query|key|value)/bias$', ('heads',)),
    (r'mixer/(query|key)_norm/scale$', (None,)),
    (r'mixer/gate/kernel$', ('embed', 'heads')),
    (r'shared_(query|key)/kernel$', ('embed', None)),
    (r'selection/kernel$', ('heads', None)),
    (r'gate_step/kernel$', (None, 'heads')),
    (r'step_bias$', ('heads',)),
    (r'retention_log_rates$', (None, 'heads')),
    (r'(input/kernel|recurrent_kernel)$', ('embed', 'heads')),
    (r'gate_logits/kernel$', ('embed', None)),
    (r'gate_down/kernel$', ('embed', None)),
    (r'gate_up/kernel$', (None, 'heads')),
    (r'gate_bias$', (None, 'heads')),
    (r'mixer/norm/(scale|bias)$', ('heads',)),
    (r'inner_norm_(scale|shift)$', ('heads', None)),
    (r'token_offset$', (None,)),
    (r'retention_log_scale$', ('heads',)),
    (r'skip$', ('heads',)),
    (r'memory_scale$', ('heads', None)),
    (r'(feedback_logit|output_correction)$', ('heads',)),
    (r'shift_mix$', (None, 'embed')),
    (r'\w+_gate/down/kernel$', ('embed', None)),
    (r'\w+_gate/up/kernel$', (None, 'heads')),
    (r'(\w+_gate/bias|removal_scale|rate_mix|bonus|group_norm/(scale|bias))$', ('heads',)),
    (r'block/norm/scale$', (None,)),
    (r'persistent_tokens$', (None, 'embed')),
    (r'heads_norm_\w+/scale$', (None,)),
    (r'level_\d+/(gate|up)/kernel$', ('embed', 'mlp')),
    (r'level_\d+/down/kernel$', ('mlp', 'embed')),
    (r'aggregation$', (None,)),
    (r'scale$', ('embed',)),
)


def logical_axes(params):
    """Names of the axes of each parameter.

    Args:
        params: parameters of a `LanguageModel`, arrays or shapes.

    Returns:
        The same pytree with a tuple of names, one for each axis, in place of each array.

    Raises:
        ValueError: naming a parameter no rule knows, or whose rank the rule does not have.
    """
    return jax.tree_util.tree_map_with_path(_axes, params)


def split_rows(x: jax.Array) -> jax.Array:
    """`x` (B, ...) split by row over the mesh of `jax.set_mesh`, everything else whole; as it is without one, or where B does not divide.

    XLA would else be free to lay activations out as the parameters they meet, whole rows on every device.
    """
    names = batch_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, jax.P(names)) if names else x


def gather_width(table: jax.Array) -> jax.Array:
    """A table (V, width) whose rows are to be looked up, with whole rows on every device of the mesh of `jax.set_mesh`.

    Rows that are split by column over the axis that splits the tokens make XLA move the (B, T, width) result by way of whole copies.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if not any(kinds.get(name) == AxisType.Auto for name in BATCH_AXES):
        return table
    split = kinds.get('tensor') == AxisType.Auto and table.shape[0] % mesh.shape['tensor'] == 0
    return jax.lax.with_sharding_constraint(table, jax.P('tensor' if split else None))


def _axes(path, leaf) -> Axes:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    inner = name.removeprefix('blocks/')
    axes = next((axes for pattern, axes in _RULES if re.search(rf'(^|/){pattern}', inner)), None)
    if axes is None:
        raise ValueError(f'parameter {name} has no logical axes, allowed are the names of nested_jax.models.axes')
    axes = axes if inner == name else ('layers', *axes)
    if len(axes) != len(leaf.shape):
        raise ValueError(f'parameter {name} has shape {leaf.shape}, allowed is one axis for each of {axes}')
    return axes
