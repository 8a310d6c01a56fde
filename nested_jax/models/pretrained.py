"""Pre-trained Transformers in Hugging Face's format: Llama 3, Qwen 2.5 and Qwen 3, read into a `LanguageModel` and written back.

A folder holds config.json and the weights as safetensors, in one file or in shards with an index. Files are mapped into memory and read
tensor by tensor, of each only the part that a device holds. What a model computes is written in config.json alone (siblings differ in
theta and epsilon), so nothing is assumed from a name, and a setting that this code would not follow is an error.

Accelerators round the factors of float32 products to fewer bits: for logits to compare, set `jax_default_matmul_precision` to 'highest'.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from nested_jax.config import AttentionConfig, LevelConfig, ModelConfig, RopeScaling, check
from nested_jax.models.language_model import LanguageModel

PyTree = Any
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = ('F64', 'F32', 'F16', 'BF16')


class _Architecture(NamedTuple):
    name: str
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None  # where config.json has none; None: width / heads


_ARCHITECTURES = {
    'llama': _Architecture('LlamaForCausalLM', False, False, None),
    'qwen2': _Architecture('Qwen2ForCausalLM', True, False, None),
    'qwen3': _Architecture('Qwen3ForCausalLM', False, True, 128),
}

# Keys of config.json whose other values would change what the model computes in ways it has no part for.
_ONLY = {
    'hidden_act': 'silu',
    'attention_bias': False,  # would be one of the output projection too
    'mlp_bias': False,
    'use_sliding_window': False,
    'partial_rotary_factor': 1.0,
    'quantization_config': None,
}

# Our parameters' paths, and their names in the files; matrices are (in, out) here and (out, in) there.
_BLOCK = 'model.layers.{}.'
_NAMES = {
    'embedding': 'model.embed_tokens.weight',
    'head': 'lm_head.weight',
    'norm/scale': 'model.norm.weight',
    'blocks/mixer_norm/scale': _BLOCK + 'input_layernorm.weight',
    'blocks/mixer/query/kernel': _BLOCK + 'self_attn.q_proj.weight',
    'blocks/mixer/key/kernel': _BLOCK + 'self_attn.k_proj.weight',
    'blocks/mixer/value/kernel': _BLOCK + 'self_attn.v_proj.weight',
    'blocks/mixer/output/kernel': _BLOCK + 'self_attn.o_proj.weight',
    'blocks/mixer/query/bias': _BLOCK + 'self_attn.q_proj.bias',
    'blocks/mixer/key/bias': _BLOCK + 'self_attn.k_proj.bias',
    'blocks/mixer/value/bias': _BLOCK + 'self_attn.v_proj.bias',
    'blocks/mixer/query_norm/scale': _BLOCK + 'self_attn.q_norm.weight',
    'blocks/mixer/key_norm/scale': _BLOCK + 'self_attn.k_norm.weight',
    'blocks/channel/level_0/norm/scale': _BLOCK + 'post_attention_layernorm.weight',
    'blocks/channel/level_0/gate/kernel': _BLOCK + 'mlp.gate_proj.weight',
    'blocks/channel/level_0/up/kernel': _BLOCK + 'mlp.up_proj.weight',
    'blocks/channel/level_0/down/kernel': _BLOCK + 'mlp.down_proj.weight',
}


class _Parameter(NamedTuple):
    """One of our parameters, and where it is in the files."""

    shape: tuple[int, ...]  # stacked over layers where `name` has a place for their number
    name: str
    transposed: bool

    @property
    def stacked(self) -> bool:
        return '{}' in self.name

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the files, layer by layer."""
        shape = self.shape[1:] if self.stacked else self.shape
        shape = shape[::-1] if self.transposed else shape
        return {self.name.format(i): shape for i in range(self.shape[0] if self.stacked else 1)}


def load_pretrained(
    folder: str | os.PathLike,
    *,
    param_dtype: jnp.dtype | str = 'float32',
    shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
    **overrides,
) -> tuple[ModelConfig, PyTree]:
    """Read a pre-trained model: `read_config`, then `load_parameters`.

    Args:
        folder: with config.json and *.safetensors.
        param_dtype: as of `load_parameters`.
        shardings: as of `load_parameters`.
        **overrides: as of `read_config`.

    Returns:
        The configuration, and the parameters of `LanguageModel(config)`.

    Raises:
        ValueError, FileNotFoundError: as the two functions.
    """
    config = read_config(folder, **overrides)
    return config, load_parameters(folder, config, param_dtype=param_dtype, shardings=shardings)


def read_config(folder: str | os.PathLike, **overrides) -> ModelConfig:
    """The configuration of a pre-trained model.

    Args:
        folder: with config.json, in the spelling before transformers 5 (rope_theta, rope_scaling) or since (rope_parameters).
        **overrides: fields of `ModelConfig` to replace. A state of `max_length` tokens, by default all that the model was made for, is
            kept for every sequence: set it to what will be read. `dtype` is that of the computation.

    Returns:
        The configuration, of one MLP in each block.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: for an architecture that is not known, a key that is missing, or a value that the model has no part for.
    """
    path = pathlib.Path(folder) / 'config.json'
    fields = _read_json(path, 'a folder in Hugging Face format')
    try:
        model = _model_fields(fields)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    return ModelConfig(**model | overrides)


def load_parameters(
    folder: str | os.PathLike,
    config: ModelConfig,
    *,
    param_dtype: jnp.dtype | str = 'float32',
    shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """Read the parameters of a pre-trained model.

    Every tensor's name and shape is checked before the first is read. At most one parameter, stacked over layers, is in host memory at a
    time; with shardings, of that only the part of one device.

    Args:
        folder: with model.safetensors, or its shards and model.safetensors.index.json.
        config: what `read_config` returned.
        param_dtype: of the parameters, whatever the files hold; 'bfloat16' halves the memory.
        shardings: where they shall lie: one `jax.sharding.Sharding` for all, a pytree of them like the parameters, or a function that
            makes it of the parameters' shapes (from `logical_axes`, say). None: the default device.

    Returns:
        The parameters of `LanguageModel(config)`.

    Raises:
        FileNotFoundError: if the weights or a shard are missing.
        ValueError: for a file that is not safetensors, a missing or surplus tensor, a wrong shape, or a dtype that is not a float's.
    """
    parameters = _parameters(config)
    is_parameter = lambda x: isinstance(x, _Parameter)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, param_dtype), parameters, is_leaf=is_parameter)
    placed = shardings(shapes) if callable(shardings) else shardings
    if placed is None or isinstance(placed, jax.sharding.Sharding):
        placed = jax.tree.map(lambda _: placed, shapes)
    with contextlib.ExitStack() as stack:
        files = _open_weights(pathlib.Path(folder), stack)
        _check_tensors(files, parameters, config)
        load = lambda parameter, sharding: _load(files, parameter, jnp.dtype(param_dtype), sharding)
        return jax.tree.map(load, parameters, placed, is_leaf=is_parameter)


def save_pretrained(folder: str | os.PathLike, config: ModelConfig, params: PyTree, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model as a Hugging Face folder, which `transformers` and `load_pretrained` read.

    config.json holds both spellings of the rotary settings, and `config.max_length` as the longest sequence. Tokenizer and generation
    settings are not touched: copy the files of the model that was read.

    Args:
        folder: made where it is missing.
        config: of a Transformer such as `read_config` returns.
        params: its parameters, on this process' devices; written in their dtype.
        max_shard_bytes: of tensors in one file; more make shards with an index.

    Raises:
        FileExistsError: if the folder holds weights already.
        ValueError: for a model that Llama, Qwen 2 and Qwen 3 cannot express, or parameters that are not its own.
    """
    folder = pathlib.Path(folder)
    fields, parameters = _config_fields(config), _parameters(config)
    _check_params(params, parameters)
    if any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        raise FileExistsError(f'{folder} holds weights, allowed is a folder without {WEIGHTS} and {INDEX}')
    folder.mkdir(parents=True, exist_ok=True)
    leaves = zip(jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, _Parameter)), jax.tree.leaves(params), strict=True)
    _write_weights(folder, dict(leaves), max_shard_bytes)
    fields['torch_dtype'] = str(jax.tree.leaves(params)[0].dtype)
    (folder / 'config.json').write_text(json.dumps(fields, indent=2) + '\n')


# ---- config.json


def _model_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Of `ModelConfig`, from those of config.json."""
    kind = _architecture(fields)
    for key, allowed in _ONLY.items():
        check(fields.get(key, allowed) in (allowed, None), key, fields.get(key), repr(allowed))
    layers = fields.get('layer_types') or []
    check(set(layers) <= {'full_attention'}, 'layer_types', layers, "'full_attention' for every layer")
    names = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings')
    for name in names:
        check(isinstance(fields.get(name), int) and fields[name] >= 1, name, fields.get(name), 'an integer of at least 1')
    heads, theta = fields['num_attention_heads'], _theta(fields)
    attention = AttentionConfig(
        num_kv_heads=fields.get('num_key_value_heads') or heads, rope_theta=theta, rope_scaling=_scaling(fields),
        qkv_bias=kind.qkv_bias, qk_norm=kind.qk_norm,
    )  # fmt: skip
    return dict(
        mixer='attention', num_layers=fields['num_hidden_layers'], width=fields['hidden_size'], num_heads=heads,
        head_dim=fields.get('head_dim') or kind.head_dim or fields['hidden_size'] // heads,
        levels=(LevelConfig(fields['intermediate_size'], 1),), vocab_size=fields['vocab_size'],
        max_length=fields['max_position_embeddings'], attention=attention, tie_embeddings=bool(fields.get('tie_word_embeddings', False)),
        norm_epsilon=float(fields.get('rms_norm_eps', 1e-6)),
    )  # fmt: skip


def _architecture(fields: dict[str, Any]) -> _Architecture:
    known = ', '.join(f'{kind.name} ({model_type})' for model_type, kind in _ARCHITECTURES.items())
    kind = _ARCHITECTURES.get(fields.get('model_type'))
    check(kind is not None, 'model_type', fields.get('model_type'), f'one of {known}')
    architectures = fields.get('architectures') or [kind.name]
    check(architectures == [kind.name], 'architectures', architectures, f'{[kind.name]} with model_type {fields["model_type"]!r}')
    return kind


def _theta(fields: dict[str, Any]) -> float:
    places = [fields, *(fields.get(key) or {} for key in ('rope_parameters', 'rope_scaling'))]
    told = {float(place['rope_theta']) for place in places if place.get('rope_theta') is not None}
    check(len(told) <= 1, 'rope_theta', sorted(told), 'one value, wherever it stands')
    return told.pop() if told else 10_000.0  # the format's default


def _scaling(fields: dict[str, Any]) -> RopeScaling | None:
    """Of the rotary wavelengths, from whichever spelling there is."""
    told = {_one_scaling(fields[key], key) for key in ('rope_parameters', 'rope_scaling') if fields.get(key)}
    check(len(told) <= 1, 'rope_parameters and rope_scaling', told, 'the same scaling, where both are there')
    return told.pop() if told else None


def _one_scaling(part: dict[str, Any], key: str) -> RopeScaling | None:
    kind = part.get('rope_type', part.get('type', 'default'))
    check(kind in ('default', 'llama3'), f'{key}.rope_type', kind, "'default' or 'llama3'")
    rotated = part.get('partial_rotary_factor') or 1.0
    check(rotated == 1.0, f'{key}.partial_rotary_factor', rotated, '1.0: all of a head is rotated')
    if kind == 'default':
        return None
    names = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    for name in names:
        check(part.get(name) is not None, f'{key}.{name}', part.get(name), "a number, with rope_type 'llama3'")
    *factors, length = (part[name] for name in names)
    return RopeScaling(*map(float, factors), int(length))


def _config_fields(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model; ValueError for one that no architecture expresses."""
    attention = config.attention
    plain = AttentionConfig(
        config.attention.num_kv_heads, rope_theta=attention.rope_theta, query_block=attention.query_block, qkv_bias=attention.qkv_bias,
        qk_norm=attention.qk_norm, rope_scaling=attention.rope_scaling,
    )  # fmt: skip
    check(config.mixer == 'attention', 'mixer', config.mixer, "'attention'")
    check(attention == plain, 'attention', attention, 'attention without window, persistent tokens and convolutions')
    check(config.in_sequence is None, 'in_sequence', config.in_sequence, 'None')
    check(len(config.levels) == 1, 'levels', config.levels, "one level, a Transformer's MLP")
    check(config.aggregation == 'chain', 'aggregation', config.aggregation, "'chain'")
    parts = attention.qkv_bias, attention.qk_norm
    found = [(model_type, kind) for model_type, kind in _ARCHITECTURES.items() if (kind.qkv_bias, kind.qk_norm) == parts]
    check(bool(found), 'attention.qkv_bias and attention.qk_norm', parts, 'not both')
    ((model_type, kind),) = found
    return dict(
        architectures=[kind.name], model_type=model_type, vocab_size=config.vocab_size, hidden_size=config.width,
        intermediate_size=config.levels[0].hidden_dim, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, hidden_act='silu', rms_norm_eps=config.norm_epsilon,
        max_position_embeddings=config.max_length, tie_word_embeddings=config.tie_embeddings, attention_bias=False,
        **_rope_fields(attention),
    )  # fmt: skip


def _rope_fields(attention: AttentionConfig) -> dict[str, Any]:
    theta, scaling = attention.rope_theta, attention.rope_scaling
    if scaling is None:
        return dict(rope_theta=theta, rope_scaling=None, rope_parameters=dict(rope_theta=theta, rope_type='default'))
    parts = dict(
        rope_type='llama3', factor=scaling.factor, low_freq_factor=scaling.low_frequency_factor,
        high_freq_factor=scaling.high_frequency_factor, original_max_position_embeddings=scaling.original_max_length,
    )  # fmt: skip
    return dict(rope_theta=theta, rope_scaling=parts, rope_parameters=dict(rope_theta=theta, **parts))


def _read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there, allowed is {what}')
    try:
        fields = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from None
    if not isinstance(fields, dict):
        raise ValueError(f'{path} holds a {type(fields).__name__}, allowed is a JSON object')
    return fields


# ---- weights


def _parameters(config: ModelConfig) -> PyTree:
    """A `_Parameter` in place of every parameter of the model."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)['params']

    def described(path, leaf) -> _Parameter:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        check(name in _NAMES, 'parameter', name, f'one of {", ".join(_NAMES)}')
        return _Parameter(leaf.shape, _NAMES[name], transposed=name == 'head' or name.endswith('kernel'))

    return jax.tree_util.tree_map_with_path(described, shapes)


def _open_weights(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open, memory-mapped file of every tensor, by the tensor's name."""
    if (folder / WEIGHTS).is_file():
        shards = [WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = _shards(folder)
    else:
        raise FileNotFoundError(f'{folder} has no weights, allowed is a folder with {WEIGHTS} or {INDEX}')
    files: dict[str, Any] = {}
    for shard in shards:
        try:
            file = stack.enter_context(safetensors.safe_open(folder / shard, framework='numpy'))
        except safetensors.SafetensorError as error:
            raise ValueError(f'{folder / shard} is not a whole safetensors file: {error}') from None
        twice = sorted(files.keys() & set(file.keys()))
        check(not twice, f'{folder / shard}: tensors', twice, 'tensors that no other shard holds')
        files |= dict.fromkeys(file.keys(), file)
    return files


def _shards(folder: pathlib.Path) -> list[str]:
    weight_map = _read_json(folder / INDEX, 'an index').get('weight_map')
    check(isinstance(weight_map, dict) and bool(weight_map), f'{folder / INDEX}: weight_map', weight_map, 'shards by tensor')
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        check(pathlib.PurePath(shard).name == shard, f'{folder / INDEX}: shard', shard, 'the name of a file in the same folder')
        if not (folder / shard).is_file():
            raise FileNotFoundError(f'{folder / shard} is not there: {INDEX} names {len(shards)} shards, and all are needed')
    return shards


def _check_tensors(files: dict[str, Any], parameters: PyTree, config: ModelConfig) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for parameter in jax.tree.leaves(parameters, is_leaf=lambda x: isinstance(x, _Parameter)):
        expected |= parameter.tensors()
    missing = sorted(expected.keys() - files.keys())
    check(not missing, 'tensors that are missing', _some(missing), f'none of the {len(expected)} that config.json asks for')
    surplus = sorted(files.keys() - expected.keys() - set(_redundant(files, config)))
    check(not surplus, 'tensors that are too many', _some(surplus), f'the {len(expected)} that config.json asks for')
    for name, shape in expected.items():
        tensor = files[name].get_slice(name)
        check(tuple(tensor.get_shape()) == shape, f'shape of {name}', tuple(tensor.get_shape()), str(shape))
        check(tensor.get_dtype() in DTYPES, f'dtype of {name}', tensor.get_dtype(), f'one of {DTYPES}')


def _redundant(files: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    """Tensors beside a model's own that say nothing else: old files' rotary frequencies, a tied head equal to the embedding."""
    yield from (name for name in files if name.endswith('self_attn.rotary_emb.inv_freq'))
    head, embedding = _NAMES['head'], _NAMES['embedding']
    if config.tie_embeddings and head in files:
        same = np.array_equal(files[head].get_tensor(head), files[embedding].get_tensor(embedding))
        check(same, head, 'another matrix', f'{embedding} itself with tie_word_embeddings')
        yield head


def _some(names: list[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def _load(files: dict[str, Any], parameter: _Parameter, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """One parameter on its devices."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        """The part of the parameter at `index`, read from the files and nothing besides."""
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, parameter.shape, strict=True)]
        if not parameter.stacked:
            return _tensor(files, parameter.name, bounds, parameter.transposed, dtype)
        part = np.empty([bound.stop - bound.start for bound in bounds], dtype)
        for place, layer in enumerate(range(bounds[0].start, bounds[0].stop)):
            part[place] = _tensor(files, parameter.name.format(layer), bounds[1:], parameter.transposed, dtype)
        return part

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(parameter.shape)))
    return jax.make_array_from_callback(parameter.shape, sharding, read)


def _tensor(files: dict[str, Any], name: str, index: list[slice], transposed: bool, dtype: np.dtype) -> np.ndarray:
    """Part of a tensor, `index` in our order of axes."""
    part = files[name].get_slice(name)[tuple(index[::-1] if transposed else index)]
    return (part.T if transposed else part).astype(dtype)


def _check_params(params: PyTree, parameters: PyTree) -> None:
    named = lambda tree, **options: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, **options)}
    given, wanted = named(params), named(parameters, is_leaf=lambda x: isinstance(x, _Parameter))
    for path in sorted(given.keys() | wanted.keys()):
        shape = given[path].shape if path in given else None
        allowed = wanted[path].shape if path in wanted else None
        check(shape == allowed, f'shape of params{path}', shape, f'{allowed}, as config says (None: no such parameter)')


def _write_weights(folder: pathlib.Path, leaves: dict[_Parameter, jax.Array], max_shard_bytes: int) -> None:
    """Tensors in the order of the parameters, a new file where one would exceed the limit."""
    tensors = [(name, leaf, i if parameter.stacked else None, parameter.transposed)
               for parameter, leaf in leaves.items() for i, name in enumerate(parameter.tensors())]  # fmt: skip
    shards, used = [[]], 0
    for tensor in tensors:
        _, leaf, layer, _ = tensor
        size = leaf.nbytes // (1 if layer is None else leaf.shape[0])
        if shards[-1] and used + size > max_shard_bytes:
            shards, used = [*shards, []], 0
        shards[-1].append(tensor)
        used += size
    names = [WEIGHTS] if len(shards) == 1 else [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        arrays = {key: _array(leaf, layer, transposed) for key, leaf, layer, transposed in shard}
        safetensors.numpy.save_file(arrays, folder / name, metadata={'format': 'pt'})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, *_ in shard}
        total = sum(leaf.nbytes for leaf in leaves.values())
        (folder / INDEX).write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map=weight_map), indent=2) + '\n')


def _array(leaf: jax.Array, layer: int | None, transposed: bool) -> np.ndarray:
    array = np.asarray(leaf if layer is None else leaf[layer])
    return np.ascontiguousarray(array.T if transposed else array)
