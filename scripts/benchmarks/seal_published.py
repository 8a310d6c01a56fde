"""SEAL's inner update at the shapes of Qwen2.5 with random weights, beside the 30 to 45 s a candidate takes in the paper.

A candidate is what that figure is of (Appendix B, arXiv:2506.10943v2): a passage and the lines of a self-edit, 430 tokens in all, 85 steps
of one sequence each, adapters of rank 32 on queries and values. Weights and computation are bfloat16. What a step costs does not depend
on the weights' values, so random ones take as long as the published. Answers, greedy ones to five questions, are timed apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from nested_jax.config import AttentionConfig, LevelConfig, ModelConfig
from nested_jax.models import LanguageModel
from nested_jax.models.sampling import generate
from nested_jax.seal.buckets import Batch, Candidate, buckets, real_share
from nested_jax.seal.inner_loop import InnerConfig, make_inner_loop
from nested_jax.seal.lora import LoraConfig, attach
from scripts.benchmarks.timing import Settings, compile_timed, measure, num_parameters

PyTree = Any
INNER = InnerConfig(lora=LoraConfig(rank=32, alpha=64.0, targets=('query', 'value')))


class Sizes(NamedTuple):
    """Of a measurement."""

    candidates: int = 16
    lengths: tuple[int, ...] = (150, *[35] * 8)  # tokens of a candidate's sequences: the passage, and lines about it
    steps: int = 85
    questions: int = 5
    asked: int = 48  # tokens of a question
    answered: int = 64


SMOKE = Sizes(candidates=2, lengths=(12, 6, 6), steps=3, questions=2, asked=5, answered=3)


def qwen(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab_size: int, *, tied: bool) -> ModelConfig:
    """A model of the family in bfloat16, with room for a few hundred tokens."""
    attention = AttentionConfig(num_kv_heads=kv_heads, rope_theta=1e6, qkv_bias=True)
    return ModelConfig(
        mixer='attention', num_layers=layers, width=width, num_heads=heads, head_dim=width // heads, levels=(LevelConfig(hidden, 1),),
        vocab_size=vocab_size, max_length=512, attention=attention, tie_embeddings=tied, dtype='bfloat16', remat='block',
    )  # fmt: skip


MODELS = {
    'Qwen2.5-7B': qwen(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    'Qwen2.5-0.5B': qwen(24, 896, 14, 2, 4864, 151_936, tied=True),
}


def published_shapes(settings: Settings):
    """A row of each model; none without an accelerator, which a smoke run, of one layer, does without."""
    if settings.smoke:
        small = dict(num_layers=1, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(32, 1),), vocab_size=64)
        config = dataclasses.replace(MODELS['Qwen2.5-7B'], **small, attention=AttentionConfig(num_kv_heads=1, qkv_bias=True))
        yield time_published('one layer', config, SMOKE, settings.repeats)
    elif jax.default_backend() == 'cpu':
        print('no accelerator: inner updates at the shapes of Qwen2.5 are left out', flush=True)
    else:
        for name, config in MODELS.items():
            yield time_published(name, config, Sizes(), settings.repeats)


def time_published(name: str, config: ModelConfig, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Seconds of a candidate's update, of all candidates together and of one alone, and of its answers.

    Raises:
        RuntimeError: where a candidate's loss after a few steps in company differs from that alone by more than bfloat16 explains, and
            where one is not finite at the end.
    """
    model = LanguageModel(config)
    start = lambda: model.init(jax.random.key(0), _tokens(config, 1, 16))['params']
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf.astype(config.dtype), start()))()
    together, alone = (candidates_of(config, sizes, count) for count in (sizes.candidates, 1))
    inner = make_inner_loop(model, INNER)
    learn, compile_s = compile_timed(inner, params, together)
    learn_one = compile_timed(inner, params, alone)[0]
    first = [float(program(params, _shortened(batch)).loss[0]) for program, batch in ((learn, together), (learn_one, alone))]
    gap = abs(first[0] / first[1] - 1)
    if not gap < 5e-2:
        raise RuntimeError(f"a candidate's loss in company is {first[0]}, alone {first[1]}")
    learned = learn(params, together)
    if not np.isfinite(learned.loss).all():
        raise RuntimeError(f'losses are {learned.loss}')
    questions = _tokens(config, sizes.candidates * sizes.questions, sizes.asked).reshape(sizes.candidates, sizes.questions, -1)
    answer = compile_timed(answers_of(model, sizes.answered), params, learned.adapters, questions)[0]
    run = lambda program, *args: measure(lambda: jax.block_until_ready(program(params, *args)), repeats)
    update, single, answers = run(learn, together), run(learn_one, alone), run(answer, learned.adapters, questions)
    return dict(
        what='inner updates at published shapes', model=name, candidates=sizes.candidates, steps=sizes.steps, tokens=sum(sizes.lengths),
        real_share=real_share(together), parameters=num_parameters(params), loss_gap=gap, compile_s=compile_s,
        seconds_per_candidate=update.median / sizes.candidates, fastest=update.fastest / sizes.candidates,
        slowest=update.slowest / sizes.candidates, seconds_alone=single.median, ratio=single.median * sizes.candidates / update.median,
        questions=sizes.questions, answered=sizes.answered, evaluation_seconds_per_candidate=answers.median / sizes.candidates,
        temporary_gib=learn.memory_analysis().temp_size_in_bytes / 2**30,
    )  # fmt: skip


def candidates_of(config: ModelConfig, sizes: Sizes, count: int) -> Batch:
    """The first candidates, one sequence a step, in one batch."""
    rng = np.random.default_rng(0)
    rows = [tuple(tuple(rng.integers(config.vocab_size, size=length).tolist()) for length in sizes.lengths) for _ in range(count)]
    candidates = [Candidate(sequences, 1e-3, sizes.steps, seed) for seed, sequences in enumerate(rows)]
    ((_, batch),) = buckets(candidates, rows_per_step=1, at_most=count)
    return batch


def _shortened(batch: Batch) -> Batch:
    """The same candidates, of three steps at most."""
    return batch._replace(steps=np.minimum(batch.steps, 3))


def answers_of(model: LanguageModel, count: int) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """Of K adapters to questions (K, Q, T), so many tokens each."""
    options = dict(key=jax.random.key(0), max_new_tokens=count, temperature=0.0)
    return jax.vmap(lambda params, adapters, asked: generate(model, attach(params, adapters, INNER.lora), asked, **options), (None, 0, 0))


def _tokens(config: ModelConfig, rows: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (rows, length), 0, config.vocab_size)
