"""Training on the processor: each memory against its token-by-token form, our models against titans-pytorch and one another."""

import dataclasses
import importlib.util
import math
import statistics
import time

import jax
import jax.numpy as jnp

from nested_jax.config import AttentionConfig, InSequenceConfig, LevelConfig, ModelConfig
from nested_jax.models import LanguageModel, preset
from nested_jax.models.loss import model_loss
from nested_jax.models.streaming import in_sequence_loss
from scripts.benchmarks.memories import disagreement, memory_forms, memory_inputs
from scripts.benchmarks.timing import Settings, by_turns, compile_timed, measure, time_training

BATCH = 2  # rows of a training step, at every length: what a token costs as rows get longer
IN_SEQUENCE_LENGTH, IN_SEQUENCE_LEVELS = 2048, (LevelConfig(156, 512), LevelConfig(156, 2048))
MODELS = ('transformer-tiny', 'gated-deltanet-tiny', 'titans-tiny', 'hope-linear-tiny', 'hope-tiny')


def attention_forms(config: ModelConfig) -> dict[str, ModelConfig]:
    """The Transformer with blocks of queries and, up to 2,048 tokens, with all at once, which is slower there already."""
    blocks = dataclasses.replace(config, attention=AttentionConfig(query_block=256))
    whole = {'transformer-tiny': config} if config.max_length <= 2048 else {}
    return whole | {'transformer-tiny (blocks)': blocks}


def training_lengths(settings: Settings):
    """Every model from 1k to 8k tokens, with all cores as one device and with one device for each row: the faster of them counts."""
    for length in (1024, 2048, 4096, 8192):
        for name in MODELS:
            config = preset(name, max_length=length)
            for form, variant in (attention_forms(config) if name == 'transformer-tiny' else {name: config}).items():
                for devices in dict.fromkeys((1, math.gcd(BATCH, jax.device_count()))):
                    yield time_training(form, variant, BATCH, length, settings.repeats, devices)


def chunked_against_reference(settings: Settings):
    """Forward and backward of each memory in both forms, once they agree."""
    inputs = memory_inputs()
    for name, forms in memory_forms().items():
        error = disagreement(name, forms, inputs)
        gradients = [jax.jit(jax.grad(lambda i, form=form: jnp.sum(form(i) ** 2))) for form in forms]
        chunked, reference = (measure(lambda g=g: jax.block_until_ready(g(inputs)), settings.repeats) for g in gradients)
        tokens = inputs['rate'].shape[0] * inputs['rate'].shape[1]
        yield dict(
            what='chunked against reference', model=name, tokens=tokens, error=error, ratio=reference.median / chunked.median,
            tokens_per_second=tokens / chunked.median, reference_tokens_per_second=tokens / reference.median,
        )  # fmt: skip


def titans_peer(settings: Settings):
    """titans-pytorch's MemoryAsContextTransformer and our Titans and Hope at equal width, depth, length and batch."""
    if importlib.util.find_spec('titans_pytorch') is None:
        print('titans-pytorch cannot be imported here: that comparison is left out', flush=True)
        return
    import torch
    from titans_pytorch import MemoryAsContextTransformer

    batch, length, width, depth = 4, 1024, 256, 4
    for name in ('titans-tiny', 'hope-linear-tiny', 'hope-tiny'):
        config = preset(name, width=width, num_layers=depth, num_heads=4, head_dim=64, max_length=length)
        yield time_training(f'{name} (width {width})', config, batch, length, settings.repeats)
    torch.manual_seed(0)
    peer = MemoryAsContextTransformer(num_tokens=256, dim=width, depth=depth, segment_len=128, heads=4, dim_head=64)
    optimizer, tokens = torch.optim.AdamW(peer.parameters(), 1e-3), torch.randint(0, 256, (batch, length + 1))

    def run():
        optimizer.zero_grad()
        peer(tokens, return_loss=True).backward()
        optimizer.step()

    timing = measure(run, max(settings.repeats // 4, 2))
    yield dict(
        what='training', model='titans-pytorch MAC', batch=batch, length=length, tokens_per_step=batch * length,
        parameters=sum(p.numel() for p in peer.parameters()), tokens_per_second=batch * length / timing.median,
        slowest=batch * length / timing.slowest, fastest=batch * length / timing.fastest,
    )  # fmt: skip


def in_sequence(settings: Settings):
    """The gradient of a model whose levels learn within the sequence, against the same model's without: processor time, by turns.

    Checked first: with a learning rate of zero the loss is the plain one.
    """
    name = 'hope-attention-tiny'
    plain = LanguageModel(preset(name, max_length=IN_SEQUENCE_LENGTH, levels=IN_SEQUENCE_LEVELS))
    tokens = jax.random.randint(jax.random.key(1), (1, IN_SEQUENCE_LENGTH), 0, 256)
    params = jax.jit(plain.init)(jax.random.key(0), tokens[:, :16])['params']
    for bptt in (None, 1):
        learning = InSequenceConfig(tuple(range(plain.config.num_layers)), bptt=bptt)
        model = LanguageModel(dataclasses.replace(plain.config, in_sequence=learning))
        error = learns_nothing_at_rate_zero(model, plain, params, tokens)
        losses = (
            lambda p: model_loss(plain, p, tokens, tokens)[0],
            lambda p, model=model: in_sequence_loss(model, p, tokens, tokens)[0],
        )
        compiled = [compile_timed(jax.grad(loss), params)[0] for loss in losses]
        runs = {name: lambda c=c: jax.block_until_ready(c(params)) for name, c in zip(('plain', 'learning'), compiled, strict=True)}
        spent = by_turns(runs, settings.repeats, time.process_time)
        ratios = [learned / plainly for plainly, learned in zip(spent['plain'], spent['learning'], strict=True)]
        yield dict(
            what='in-sequence learning', model=name, length=IN_SEQUENCE_LENGTH, bptt=bptt, error=error, ratio=statistics.median(ratios),
            lowest_ratio=min(ratios), highest_ratio=max(ratios),
            temporary_ratio=compiled[1].memory_analysis().temp_size_in_bytes / compiled[0].memory_analysis().temp_size_in_bytes,
        )  # fmt: skip


def learns_nothing_at_rate_zero(model: LanguageModel, plain: LanguageModel, params, tokens: jax.Array) -> float:
    """Relative difference of the loss at a learning rate of zero from the plain model's; RuntimeError at 1e-4 or more."""
    still = jax.jit(lambda p: in_sequence_loss(model, p, tokens, tokens, learning_rates=0.0)[0])
    expected = float(jax.jit(lambda p: model_loss(plain, p, tokens, tokens)[0])(params))
    error = abs(float(still(params)) - expected) / expected
    if not error < 1e-4:
        raise RuntimeError(f'at a learning rate of zero the loss differs from the plain one by {error:.1e}')
    return error


PARTS = (chunked_against_reference, titans_peer, training_lengths, in_sequence)
