"""Which implementation the layers of a program compute with: plain JAX, or the kernels of a platform.

    with use_kernels('gpu'):
        compiled = jax.jit(step).lower(state, batch).compile()

It is chosen around what is traced and is no part of a model's configuration: results differ by rounding only. A layer takes a kernel for
the calls that it can do, and plain JAX for the others:

    'gpu'  softmax attention of one document from its start, in bfloat16 or float16: cuDNN's
    'tpu'  the (gated) delta rule, more than a token at a time in chunks of a multiple of 16: `memory/kernels/delta_rule.py`,
           which has never run on a TPU yet. It does not split over devices.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from nested_jax.config import check

KernelSet = Literal['plain', 'gpu', 'tpu']
# Part of the key under which jax.jit keeps what it has traced.
_chosen = jax.make_user_context(default_value='plain')


@contextlib.contextmanager
def use_kernels(name: KernelSet) -> Iterator[None]:
    """Layers traced inside compute with these kernels.

    Raises:
        ValueError: if there are none of the name.
    """
    check(name in get_args(KernelSet), 'kernels', name, f'one of {", ".join(get_args(KernelSet))}')
    with _chosen(name):
        yield


def attention_implementation(dtype: jnp.dtype) -> str:
    """What `jax.nn.dot_product_attention` shall take for causal attention in `dtype`."""
    return 'cudnn' if _chosen.value == 'gpu' and dtype in (jnp.bfloat16, jnp.float16) else 'xla'


def delta_rule_implementation(length: int, chunk_size: int, dtype: jnp.dtype) -> str:
    """What `nested_jax.memory.matrix.delta_rule` shall take for a call of `length` tokens with values in `dtype`."""
    fits = length > 1 and chunk_size % 16 == 0 and dtype in (jnp.float32, jnp.bfloat16)
    return 'pallas_tpu' if _chosen.value == 'tpu' and fits else 'jax'
