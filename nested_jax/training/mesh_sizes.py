"""How many devices lie along each axis of a mesh. Imports no model before one has to be measured: wrong sizes are said at once.

What the axes are for is said in `nested_jax.training.sharding`.
"""

import math

import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.mesh import BATCH_AXES, SEQUENCE_AXIS

MESH_AXES = (*BATCH_AXES, SEQUENCE_AXIS, 'tensor')
# Bytes of float32 parameters, gradients and AdamW's two moments that every device may hold whole.
_REPLICATED_BYTES = 2**30


def parse_axes(text: str) -> dict[str, int]:
    """'data=2,fsdp=4' -> {'data': 2, 'fsdp': 4}.

    Raises:
        ValueError: for another form, or an axis that does not exist or comes twice.
    """
    sizes = {}
    for part in text.split(','):
        name, _, size = part.strip().partition('=')
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f'mesh is {text!r}, allowed is axis=size,..., each axis once, of {", ".join(MESH_AXES)}')
        sizes[name] = int(size)
    return sizes


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """The same for so many devices.

    Raises:
        ValueError: see `parse_axes`, and for sizes whose product is not `num_devices`.
    """
    sizes = parse_axes(text)
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(f'mesh is {text!r}, {math.prod(sizes.values())} devices, allowed are sizes whose product is {num_devices}')
    return sizes


def choose_mesh(text: str | None, config: ModelConfig, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """The sizes a command line asks for, or a default: the devices of each slice on one axis.

    That is `data` while parameters, gradients and AdamW's moments fit every device whole in 1 GiB, else `fsdp`: gathering parameters
    costs more than it saves while they are small.

    Args:
        text: as `parse_mesh` takes it, or None.
        config: of the model.
        num_devices: that share the work.
        num_slices: that these make up, see `count_slices`.

    Raises:
        ValueError: for a text that does not fit the devices, their slices or the model's heads.
    """
    if text is not None:
        sizes = parse_mesh(text, num_devices)
        check_mesh(config, sizes)
        if sizes.get('replica', 1) % num_slices:
            allowed = f'a multiple of the {num_slices} slices'
            raise ValueError(f'mesh is {text!r}, with replica={sizes.get("replica", 1)}, allowed is {allowed}')
        return sizes
    if num_slices > 1:
        return {'replica': num_slices} | choose_mesh(None, config, num_devices // num_slices)
    if num_devices == 1:
        return {'data': 1}
    from nested_jax.models.language_model import LanguageModel

    init = lambda: LanguageModel(config).init(jax.random.key(0), jnp.zeros((1, config.grid), jnp.int32))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init)))
    return {'data' if 16 * num_parameters <= _REPLICATED_BYTES else 'fsdp': num_devices}


def check_mesh(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Raises ValueError unless `tensor` divides the heads, since a head is never cut, and the model's sequences can be split.

    States that are handed on have all heads, which `tensor` would split.
    """
    tensor, stretches = sizes.get('tensor', 1), sizes.get(SEQUENCE_AXIS, 1)
    if stretches > 1 and config.in_sequence is not None:
        raise ValueError(f'mesh has sequence={stretches}, allowed is 1 where levels are updated within a sequence')
    if stretches > 1 and tensor > 1 and set(config.unit) != {'attention'}:
        raise ValueError(f'mesh has sequence={stretches} and tensor={tensor}, allowed is one of them, except for attention alone')
    heads = {'num_heads': config.num_heads, 'attention.num_kv_heads': config.num_kv_heads}
    if 'mamba2' in config.unit:
        heads['state_space heads'] = config.state_space_heads
    for name, count in heads.items():
        if count % tensor:
            raise ValueError(f'mesh has tensor={tensor}, allowed is a divisor of {name}={count}')


def count_slices(devices: list) -> int:
    """TPU slices that the devices make up: within one they have a network of their own, between two a data centre's. 1 for others."""
    return len({getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'}) or 1


def batch_shares(sizes: dict[str, int]) -> int:
    """Shares a batch is split into on a mesh of these sizes."""
    return math.prod(size for name, size in sizes.items() if name in BATCH_AXES)
