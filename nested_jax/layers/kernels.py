"""Which implementation the layers of a program compute with: plain JAX, or the kernels of a platform.

    with use_kernels('gpu'):
        compiled = jax.jit(step).lower(state, batch).compile()

It is chosen around what is traced and is no part of a model's configuration: results differ by rounding only. A layer takes a kernel for
the calls that it can do, and plain JAX for the others:

    'gpu'  softmax attention of one document from its start, in bfloat16 or float16: cuDNN's; and the (gated) delta rule, more than a
           token at a time in bfloat16, with heads of 64 or 128, on GPUs of the Hopper generation: `memory/kernels/delta_rule_gpu.py`,
           which has run on an H100, by itself and in a model; several GPUs have not
    'gpu_unverified'
           those, and Hope's memories in chunks of 64, with heads of 64: `memory/kernels/self_modifying_gpu.py`, which has not run on a
           GPU as a whole and does not split over devices; the program for MLPs is large
    'tpu'  the (gated) delta rule, more than a token at a time in chunks of a multiple of 16: `memory/kernels/delta_rule.py`; and Hope's
           memories, likewise, of 8: `memory/kernels/self_modifying.py`. They have never run on a TPU yet and do not split over
           devices.
"""

import contextlib
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp

from nested_jax.config import KernelSet, check
from nested_jax.memory.self_modifying import Memories, Rule

_GPU = ('gpu', 'gpu_unverified')
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
    return 'cudnn' if _chosen.value in _GPU and dtype in (jnp.bfloat16, jnp.float16) else 'xla'


def delta_rule_form(chunk_size: int, k: jax.Array, v: jax.Array) -> dict[str, str | int]:
    """What a call of `nested_jax.memory.matrix.delta_rule` with k and v (B, T, H, D) shall take as `implementation` and `chunk_size`.

    The size of chunks does not change the result, and the GPU's kernel has its own.
    """
    if k.shape[1] == 1:
        return dict(implementation='jax', chunk_size=chunk_size)
    if _chosen.value == 'tpu' and chunk_size % 16 == 0 and v.dtype in (jnp.float32, jnp.bfloat16):
        return dict(implementation='pallas_tpu', chunk_size=chunk_size)
    if _chosen.value in _GPU and v.dtype == jnp.bfloat16 and _on_hopper():
        from nested_jax.memory.kernels.chunk_scan import WRITES, fits  # most programs need no Pallas

        if fits(WRITES, k.shape[3], v.shape[3]):
            return dict(implementation='pallas_gpu', chunk_size=WRITES)
    return dict(implementation='jax', chunk_size=chunk_size)


def self_modifying_form(rule: Rule, length: int, initial: Memories) -> str:
    """The `implementation` that a call of `nested_jax.memory.self_modifying.self_modifying` with so many tokens shall take."""
    platform = {'tpu': 'tpu', 'gpu_unverified': 'gpu'}.get(_chosen.value)
    if platform is None or length == 1 or initial.first.dtype not in (jnp.float32, jnp.bfloat16) or platform == 'gpu' and not _on_hopper():
        return 'jax'
    from nested_jax.memory.kernels.self_modifying import fits

    return f'pallas_{platform}' if fits(platform, rule, initial) else 'jax'


def _on_hopper() -> bool:
    """Whether devices are H100s or H200s; elsewhere than on GPUs programs are only lowered for them."""
    return getattr(jax.devices()[0], 'compute_capability', '9.0').startswith('9.')
