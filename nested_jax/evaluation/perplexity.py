"""How well a model predicts held-out text: bits per byte, which compares across tokenizers, and perplexity per token."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Sums over the held-out targets."""

    nats: float
    tokens: int  # targets
    num_bytes: int  # that those targets stand for

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 x bytes)."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def nats_per_token(self) -> float:
        """The loss."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


def evaluate(
    eval_step: Callable[[Any, dict], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    count_bytes: Callable[[np.ndarray, np.ndarray], int],
    place: Callable[[dict], dict] = lambda batch: batch,
    total: Callable[[int], int] = lambda num_bytes: num_bytes,
) -> HeldOut:
    """Sums a model's loss over batches.

    Args:
        eval_step: (params, batch) -> (sum of nats, number of targets).
        params: of the model.
        batches: with `targets` and `weights` among their fields, all of one shape.
        count_bytes: (targets, weights) -> bytes that those of weight 1 stand for.
        place: puts a batch on the devices.
        total: sums the bytes of the rows that each process reads.

    Raises:
        ValueError: when the batches hold no target.
    """
    sums, num_bytes = [], 0
    for batch in batches:
        sums.append(eval_step(params, place(batch)))
        jax.block_until_ready(sums[-2:-1])  # the batch before: the device never waits, and holds no more than two
        num_bytes += int(count_bytes(batch['targets'], batch['weights']))
    num_bytes = total(num_bytes)
    # Added up in float64 on the host: float32 loses bytes beyond 2**24 of them.
    nats, tokens = (math.fsum(float(value) for value in values) for values in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    if not tokens or not num_bytes:
        raise ValueError(f'batches hold {int(tokens)} targets of {num_bytes} bytes, allowed is at least one of each')
    return HeldOut(nats, round(tokens), num_bytes)
