"""Hyper-parameters of the language models, as plain frozen dataclasses. Imports no JAX, so that bad input is met early."""

import dataclasses
import math
import re
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

SelfModified = Literal['key', 'value', 'target', 'eta', 'alpha']
MemoryName = Literal['memory', 'key', 'value', 'query', 'eta', 'alpha']
KernelSet = Literal['plain', 'gpu', 'gpu_unverified', 'tpu']  # see nested_jax.layers.kernels
Mixer = Literal[
    'attention', 'titans', 'gated-delta-rule', 'self-modifying',
    'linear-attention', 'retention', 'gated-linear-attention', 'delta-rule', 'mamba2', 'ttt',
    'mamba', 'mamba-attention', 'lstm', 'srwm', 'dla', 'moneta', 'yaad', 'memora', 'atlas',
    'titans-mac', 'titans-mag', 'titans-mal', 'rwkv7', 'comba',
]  # fmt: skip
# Hybrids: the mixers of layers that follow one another, again and again.
HYBRIDS: dict[str, tuple[Mixer, ...]] = {'mamba-attention': ('mamba', 'attention')}


def added(default: Any) -> Any:
    """A dataclass field that came after results were stored: `as_dict` leaves it out while it holds its default.

    Runs that say nothing of it keep the configuration, and so the digest and the folder, that they had before.
    """
    return dataclasses.field(default=default, metadata={'added': True})


def as_dict(value: Any) -> Any:
    """What `dataclasses.asdict` makes of a configuration, without `added` fields at their default."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: (field, getattr(value, field.name)) for field in dataclasses.fields(value)}
        told = {name: part for name, (field, part) in fields.items() if not field.metadata.get('added') or part != field.default}
        return {name: as_dict(part) for name, part in told.items()}
    return tuple(map(as_dict, value)) if isinstance(value, tuple) else value


_SECRET_WORDS = set('token key apikey secret password passwd passphrase credential credentials auth authorization'.split())
# Of the services that training meets, and what stands before the @ of an address.
_SECRET_SHAPES = re.compile(
    r'(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{30,}|\bgh[a-z]_[A-Za-z0-9]{30,}|\b(?:github_pat_|glpat-|sk-)[\w-]{20,}|\bAKIA[0-9A-Z]{16}|\bAIza[\w-]{30,}'
)


def redacted(value: Any, name: str = '') -> Any:
    """A configuration as it may be stored: texts that are secrets, by their field's name or by their form, are replaced by 'redacted'.

    Args:
        value: of dicts, lists, tuples and what they hold.
        name: of the field that holds it; it tells by its words (hf_token does, eval_tokens and tokenizer do not).
    """
    if isinstance(value, dict):
        return {key: redacted(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(part, name) for part in value)
    if not isinstance(value, str) or not value:
        return value
    return 'redacted' if _SECRET_WORDS & set(re.split('[^a-z]+', name.lower())) else _SECRET_SHAPES.sub('redacted', value)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary wavelengths beyond those that pre-training saw whole (`layers.attention.rotary_frequencies`)."""

    factor: float  # that long wavelengths grow by
    low_frequency_factor: float  # wavelengths above original_max_length / this are stretched in full
    high_frequency_factor: float  # wavelengths below original_max_length / this are left alone
    original_max_length: int  # tokens of pre-training's sequences


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention with rotary positions and grouped queries."""

    num_kv_heads: int | None = None  # None: one for each query head
    window: int | None = None  # tokens each query sees, itself included; None: all, up to max_length
    rope_theta: float = 10_000.0
    query_block: int | None = None  # queries at a time, which skip later keys and keep no scores; None: all
    num_persistent: int | None = None  # learned tokens that every query sees beside its window (Sec. 3.3, arXiv:2501.00663v1)
    segment: int | None = None  # titans-mac: tokens that see one another, a multiple of memory.chunk_size
    short_convolution: bool = False  # the width-4 convolutions of the memories on q, k and v, as a control
    qkv_bias: bool = added(False)  # biases of q, k and v, as in Qwen2
    qk_norm: bool = added(False)  # RMSNorm of each head's q and k before they are rotated, as in Qwen3
    rope_scaling: RopeScaling | None = added(None)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Titans' memory and the self-modifying memories (sections 8.1 and 8.2, arXiv:2512.24695v1)."""

    kind: Literal['matrix', 'mlp'] = 'mlp'
    chunk_size: int = 16  # tokens between two refreshes of the main memory's anchor
    projection_chunk_size: int = 16  # tokens between two refreshes of k, v, eta, alpha and v_hat; one size divides the other
    hidden_dim: int | None = None  # MLP memories; None: the head's width, of TTT-MLP four times that
    dgd: Literal['per_layer', 'input_only', 'none'] = 'per_layer'
    gradient: Literal['token', 'chunk'] = 'chunk'  # matrix memories may take it token by token at no cost
    read: Literal['running', 'anchor'] = 'running'
    momentum: bool = True
    retention: bool = True  # False: alpha = 1, nothing decays
    decay_to: Literal['zero', 'init'] = 'zero'
    window: int = 8  # tokens whose gradients Atlas' steps sum
    adaptive_query: bool = False
    positive_eigenvalues: bool = False  # keep eta below alpha, so that no eigenvalue turns negative
    negative_eigenvalues: bool = False  # of the (gated) delta rule: beta up to 2 instead of 1
    self_modified: tuple[SelfModified, ...] = get_args(SelfModified)  # what memories generate; the rest is static; 'target': v_hat, else v
    matrix_memories: tuple[MemoryName, ...] = added(())  # self-modifying memories that are matrices beside MLPs


@dataclasses.dataclass(frozen=True)
class StateSpaceConfig:
    """Sizes of Mamba-2, as published: it has more and smaller heads than `ModelConfig` says (Sec. 7, arXiv:2405.21060)."""

    state_dim: int = 128  # N
    head_dim: int = 64  # P
    expand: int = 2  # all heads together are this many widths


@dataclasses.dataclass(frozen=True)
class LevelConfig:
    """One level of a Continuum Memory System: an MLP and how often it is updated (Eq. 71, arXiv:2512.24695v1)."""

    hidden_dim: int
    period: int  # tokens between two updates


@dataclasses.dataclass(frozen=True)
class InSequenceConfig:
    """CMS updated within a sequence, by the gradient of the model's own next-token loss."""

    blocks: tuple[int, ...]  # the blocks whose levels are updated
    learning_rate: float = 1e-2  # of the inner update; sums over a period's tokens, as Eq. 71 does
    variant: Literal['sequential', 'nested'] = 'sequential'  # nested: a level starts anew when the next slower one is updated
    bptt: int | None = None  # chunks the outer gradient goes back through; None: all


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: pre-norm blocks of a token mixer and a channel mixer.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    mixer: Mixer
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    levels: tuple[LevelConfig, ...]  # fastest first, as in Eq. 70; one level without updates is a Transformer's MLP
    vocab_size: int = 256
    max_length: int = 4096  # tokens softmax attention looks back at most
    aggregation: Literal['chain', 'sum'] = 'chain'  # of the levels: Eq. 70, or the independent variant of Eq. 74
    attention: AttentionConfig = AttentionConfig()
    memory: MemoryConfig = MemoryConfig()
    state_space: StateSpaceConfig = StateSpaceConfig()
    in_sequence: InSequenceConfig | None = None
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-6
    dtype: Literal['float32', 'bfloat16', 'float16', 'float64'] = (
        'float32'  # of activations and matrix products; parameters and memories are float32
    )
    scan_layers: bool = True
    remat: Literal['none', 'block', 'dots'] = 'none'
    # Share of the embeddings and of what mixers and levels add to the residual stream that is dropped (section 5.4, arXiv:1706.03762): in
    # the loss of `training.step.make_loss` when it is trained, nowhere else.
    dropout: float = added(0.0)
    # Levels updated across steps start anew when the next slower one is updated, from initial states that its period learns (Eq. 72).
    nested_levels: bool = added(False)

    def __post_init__(self):
        _check_choices(self, '')
        _check_choices(self.memory, 'memory.')
        _check_counts(self, '', 'num_layers', 'width', 'num_heads', 'head_dim', 'vocab_size', 'max_length')
        _check_counts(self.memory, 'memory.', 'chunk_size', 'projection_chunk_size', 'hidden_dim', 'window')
        _check_counts(self.attention, 'attention.', 'num_kv_heads', 'window', 'query_block', 'num_persistent', 'segment')
        _check_counts(self.state_space, 'state_space.', 'state_dim', 'head_dim', 'expand')
        check(0 <= self.dropout < 1, 'dropout', self.dropout, 'a share from 0 on and below 1')
        self._check_levels()
        self._check_memory()
        self._check_mixer()
        for mixer in self.unit if len(self.unit) > 1 else ():  # what each of a hybrid's layers demands
            dataclasses.replace(self, mixer=mixer)

    def _check_levels(self) -> None:
        check(len(self.levels) >= 1, 'levels', self.levels, 'at least one level')
        for level in self.levels:
            _check_counts(level, 'levels.', 'hidden_dim', 'period')
        check(len(self.levels) > 1 or not self.nested_levels, 'nested_levels', True, 'False with one level')
        count = len(self.unit)
        check(self.num_layers % count == 0, 'num_layers', self.num_layers, f'a multiple of {count}, the mixers of {self.mixer!r}')
        if self.in_sequence is None:
            return
        check(count == 1, 'in_sequence', self.in_sequence, f'None with the mixer {self.mixer!r}')
        # The inner gradient goes through the blocks too, and no source says whether it is one of a model with or without dropout.
        check(self.dropout == 0, 'dropout', self.dropout, '0 where levels are updated within a sequence')
        _check_choices(self.in_sequence, 'in_sequence.')
        _check_counts(self.in_sequence, 'in_sequence.', 'bptt')
        rate = self.in_sequence.learning_rate
        check(0 <= rate < math.inf, 'in_sequence.learning_rate', rate, 'a finite number of 0 or more')
        blocks = self.in_sequence.blocks
        inside = bool(blocks) and all(0 <= block < self.num_layers for block in blocks)
        check(inside, 'in_sequence.blocks', blocks, f'block numbers from 0 to {self.num_layers - 1}')
        periods = [level.period for level in self.levels]
        on_grid = periods == sorted(periods) and all(period % periods[0] == 0 for period in periods)
        check(on_grid, 'levels.period', periods, 'ascending multiples of the first, for updates within a sequence')

    def _check_mixer(self) -> None:
        inner, attends = self.num_heads * self.head_dim, self.mixer == 'attention' or self.mixer.startswith('titans-')
        if attends or self.mixer in ('retention', 'ttt'):
            check(self.head_dim % 2 == 0, 'head_dim', self.head_dim, 'an even number, for rotary positions')
        if self.mixer == 'gated-linear-attention':
            check(self.head_dim % 2 == 0, 'head_dim', self.head_dim, 'an even number, for keys half as wide')
        if attends:
            kv_heads = self.num_kv_heads
            check(self.num_heads % kv_heads == 0, 'attention.num_kv_heads', kv_heads, f'a divisor of num_heads={self.num_heads}')
        self._check_variants()
        if self.mixer == 'titans-mac':
            segment, size = self.attention.segment, self.memory.chunk_size
            multiple = segment is not None and segment % size == 0
            check(multiple, 'attention.segment', segment, f'a multiple of memory.chunk_size={size}')
            check(
                self.width == inner,
                'width',
                self.width,
                f'num_heads * head_dim={inner}: what memory and attention give is read as tokens are',
            )
        if self.mixer == 'srwm':
            check(inner == self.width, 'num_heads * head_dim', inner, f'width={self.width}, which the heads share')
        if self.mixer == 'mamba2':
            channels, size = self.state_space.expand * self.width, self.state_space.head_dim
            check(channels % size == 0, 'state_space.head_dim', size, f'a divisor of state_space.expand * width={channels}')

    def _check_variants(self) -> None:
        """Of softmax attention, as pre-trained models have them."""
        for field in dataclasses.fields(self.attention):
            value = getattr(self.attention, field.name)
            if field.metadata.get('added') and value != field.default:
                check(self.mixer == 'attention', f'attention.{field.name}', value, f'{field.default!r} with the mixer {self.mixer!r}')
        scaling = self.attention.rope_scaling
        if scaling is not None:
            factors = scaling.high_frequency_factor > scaling.low_frequency_factor > 0 and scaling.factor > 0
            check(factors, 'attention.rope_scaling', scaling, 'factors above 0, that of high frequencies above that of low ones')
            _check_counts(scaling, 'attention.rope_scaling.', 'original_max_length')

    def _check_memory(self) -> None:
        memory = self.memory
        known = set(memory.self_modified) <= set(get_args(SelfModified))
        check(known, 'memory.self_modified', memory.self_modified, f'some of {get_args(SelfModified)}')
        self._check_kinds()
        sizes = memory.chunk_size, memory.projection_chunk_size
        names = 'memory.chunk_size and memory.projection_chunk_size'
        check(max(sizes) % min(sizes) == 0, names, sizes, 'sizes of which one divides the other')
        delta_rule = self.mixer in ('delta-rule', 'gated-delta-rule')
        check(delta_rule or not memory.negative_eigenvalues, 'memory.negative_eigenvalues', True, 'False without the (gated) delta rule')
        if self.mixer == 'self-modifying' and memory.gradient == 'token':
            check(memory.kind == 'matrix', 'memory.gradient', 'token', "'chunk' for MLP memories, which are not linear in their weights")
            check(not memory.momentum, 'memory.momentum', True, "False with memory.gradient='token', whose erasure is part of the gradient")
        if self.mixer == 'atlas':
            longest = memory.chunk_size + 1
            check(memory.window <= longest, 'memory.window', memory.window, f'at most memory.chunk_size + 1, {longest}')

    def _check_kinds(self) -> None:
        """Of memories that are matrices beside MLPs."""
        memory, mixes = self.memory, self.mixer == 'self-modifying' and self.memory.kind == 'mlp'
        names = {name for name in get_args(MemoryName) if name != 'query' or memory.adaptive_query}
        some = set(memory.matrix_memories) < names
        allowed = f'some of {get_args(MemoryName)}, query with adaptive_query only; for all of them: kind=matrix'
        check(some, 'memory.matrix_memories', memory.matrix_memories, allowed)
        alone = mixes or not memory.matrix_memories
        check(alone, 'memory.matrix_memories', memory.matrix_memories, "none but with self-modifying memories of kind='mlp'")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> 'ModelConfig':
        """The configuration that `as_dict` took apart, also when it went through JSON; fields it lacks take their defaults."""
        return _rebuild(cls, fields)

    @property
    def unit(self) -> tuple[Mixer, ...]:
        """Mixers of the layers that are scanned over as one: several in a hybrid."""
        return HYBRIDS.get(self.mixer, (self.mixer,))

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of softmax attention."""
        return self.attention.num_kv_heads or self.num_heads

    @property
    def state_space_heads(self) -> int:
        """Heads of Mamba-2."""
        return self.state_space.expand * self.width // self.state_space.head_dim

    @property
    def grid(self) -> int:
        """Tokens between the places where a packed document may start; 1 where it may start anywhere."""
        sizes = {
            'titans': (self.memory.chunk_size,),
            'ttt': (self.memory.chunk_size,),
            'dla': (self.memory.chunk_size,),
            'moneta': (self.memory.chunk_size,),
            'yaad': (self.memory.chunk_size,),
            'memora': (self.memory.chunk_size,),
            'atlas': (self.memory.chunk_size,),
            'titans-mac': (self.attention.segment,),
            'titans-mag': (self.memory.chunk_size,),
            'titans-mal': (self.memory.chunk_size,),
            'self-modifying': (self.memory.chunk_size, self.memory.projection_chunk_size),
        }.get(self.mixer, ())
        return math.lcm(*sizes, 1 if self.in_sequence is None else self.levels[0].period)


def _rebuild(hint: Any, value: Any) -> Any:
    """A value of type `hint`, of what `as_dict` and JSON make of it."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: _rebuild(hints[name], part) for name, part in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_rebuild(get_args(hint)[0], part) for part in value)
    if get_origin(hint) is UnionType and value is not None:
        return _rebuild(get_args(hint)[0], value)
    return value


def check(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError naming the argument, its value and what is allowed, unless it holds."""
    if not holds:
        raise ValueError(f'{name} is {value!r}, allowed is {allowed}')


def _check_counts(config: Any, prefix: str, *names: str) -> None:
    """Integers of at least 1, None where a field may be None."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= 1, prefix + name, value, 'an integer of at least 1')


def _check_choices(config: Any, prefix: str) -> None:
    """Fields that are a Literal hold one of its values."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            value = getattr(config, name)
            check(value in get_args(hint), prefix + name, value, f'one of {get_args(hint)}')
