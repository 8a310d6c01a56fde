"""Pre-trained models against `transformers`: logits, both spellings of config.json, saving, sharded loading, and bad folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from nested_jax.config import AttentionConfig, InSequenceConfig, LevelConfig, ModelConfig, RopeScaling
from nested_jax.models import pretrained
from nested_jax.models.axes import logical_axes
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.pretrained import load_parameters, load_pretrained, read_config, save_pretrained
from tests.models import pretrained_goldens as goldens

TOLERANCE = 1e-4  # relative, or absolute below 1; logits have a standard deviation above 2
LLAMA3 = RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.fixture(scope='module')
def golden():
    return np.load(goldens.GOLDENS)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A folder of each tiny model, not to be changed."""
    return {name: goldens.write(tmp_path_factory.mktemp(name), name) for name in goldens.CONFIGS}


@pytest.fixture
def folder(tmp_path):
    """A folder of the tiny Llama for the test alone."""
    return goldens.write(tmp_path / 'model', 'llama')


def logits(config, params, length: int) -> np.ndarray:
    """At the stored places."""
    run = jax.jit(lambda params, tokens: LanguageModel(config).apply({'params': params}, tokens)[0][0])
    return np.asarray(run(params, goldens.tokens(length)))[goldens.positions(length)]


def error(y: np.ndarray, expected: np.ndarray) -> float:
    return float((np.abs(y - expected) / np.maximum(np.abs(expected), 1)).max())


def edit(folder, **fields) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / 'config.json'
    told = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def rewrite(folder, change) -> None:
    tensors = load_file(folder / 'model.safetensors')
    save_file(change(tensors) or tensors, folder / 'model.safetensors')


# ---- logits


@pytest.mark.parametrize('length', goldens.LENGTHS)
@pytest.mark.parametrize('name', goldens.CONFIGS)
def test_logits_are_those_of_transformers(folders, golden, name, length):
    expected = golden[f'{name}_{length}']
    assert expected.shape == (64, goldens.VOCAB) and expected.std() > 1
    config, params = load_pretrained(folders[name])
    assert error(logits(config, params, length), expected) < TOLERANCE


def test_stored_places_reach_beyond_2048_tokens():
    assert (goldens.positions(3000) > 2048).sum() >= 16


def without_biases(config, params):
    zero = lambda path, leaf: leaf * ('bias' not in jax.tree_util.keystr(path))
    return config, jax.tree_util.tree_map_with_path(zero, params)


def with_attention(**fields):
    return lambda config, params: (dataclasses.replace(config, attention=dataclasses.replace(config.attention, **fields)), params)


@pytest.mark.parametrize(
    ('name', 'length', 'change'),
    [
        ('llama', 64, with_attention(rope_theta=1e6)),
        ('llama', 64, with_attention(rope_scaling=None)),
        ('llama', 3000, with_attention(rope_scaling=None)),
        ('llama', 64, with_attention(rope_scaling=dataclasses.replace(LLAMA3, factor=8.0))),
        ('llama', 64, lambda config, params: (dataclasses.replace(config, norm_epsilon=1e-3), params)),
        ('qwen2', 64, with_attention(rope_theta=1e4)),
        ('qwen2', 64, without_biases),
        ('qwen3', 64, with_attention(rope_theta=5e5)),
    ],
)
def test_a_wrong_setting_fails_the_comparison(folders, golden, name, length, change):
    config, params = change(*load_pretrained(folders[name]))
    assert error(logits(config, params, length), golden[f'{name}_{length}']) > 30 * TOLERANCE


def test_tokens_one_by_one_and_in_blocks(folders, golden):
    config, params = load_pretrained(folders['llama'], max_length=64)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, query_block=24))
    assert error(logits(config, params, 64), golden['llama_64']) < TOLERANCE
    model = LanguageModel(config)
    step = jax.jit(lambda state, token: model.apply({'params': params}, token[None, None], state)[::-1])
    _, rows = jax.lax.scan(step, model.init_state(1), goldens.tokens(64)[0])
    assert error(np.asarray(rows)[:, 0, 0], golden['llama_64']) < TOLERANCE


# ---- config.json


def test_configuration_of_each_architecture(folders):
    llama, qwen2, qwen3 = (read_config(folders[name]) for name in ('llama', 'qwen2', 'qwen3'))
    assert llama == ModelConfig(
        mixer='attention', num_layers=2, width=64, num_heads=4, head_dim=64, levels=(LevelConfig(96, 1),), vocab_size=64, max_length=4096,
        attention=AttentionConfig(num_kv_heads=1, rope_theta=5e5, rope_scaling=LLAMA3), tie_embeddings=True, norm_epsilon=1e-5,
    )  # fmt: skip
    assert qwen2.attention == AttentionConfig(num_kv_heads=2, rope_theta=1e6, qkv_bias=True)
    assert (qwen2.head_dim, qwen2.tie_embeddings, qwen2.norm_epsilon) == (16, False, 1e-6)
    assert qwen3.attention == AttentionConfig(num_kv_heads=2, rope_theta=1e6, qk_norm=True) and qwen3.head_dim == 32
    changed = read_config(folders['llama'], max_length=128, dtype='bfloat16')
    assert changed == dataclasses.replace(llama, max_length=128, dtype='bfloat16')


def test_axes_of_normed_heads_and_biases(folders):
    mixer = lambda name: logical_axes(load_pretrained(folders[name])[1])['blocks']['mixer']
    assert mixer('qwen3')['query_norm']['scale'] == mixer('qwen3')['key_norm']['scale'] == ('layers', None)
    assert {mixer('qwen2')[name]['bias'] for name in ('query', 'key', 'value')} == {('layers', 'heads')}


def test_both_spellings_of_the_rotary_settings_are_read(folder):
    old = read_config(folder)
    scaling = goldens.CONFIGS['llama']['rope_scaling']
    edit(folder, rope_theta=None, rope_scaling=None, rope_parameters=dict(rope_theta=5e5, **scaling))
    assert read_config(folder) == old
    first = {'type': 'llama3', **{key: value for key, value in scaling.items() if key != 'rope_type'}}
    edit(folder, rope_theta=5e5, rope_scaling=first, rope_parameters=None)
    assert read_config(folder) == old
    edit(folder, rope_scaling=None, rope_parameters=dict(rope_type='default', rope_theta=5e5))
    assert read_config(folder).attention == AttentionConfig(num_kv_heads=1, rope_theta=5e5)
    edit(folder, rope_theta=None, rope_parameters=None, num_key_value_heads=None, head_dim=None)
    config = read_config(folder)
    assert config.attention == AttentionConfig(num_kv_heads=4, rope_theta=1e4) and config.head_dim == 16
    edit(folder, model_type='qwen3', architectures=None)
    assert read_config(folder).head_dim == 128


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(model_type='mamba2'), r"model_type is 'mamba2', allowed is one of LlamaForCausalLM \(llama\), Qwen2ForCausalLM"),
        (dict(model_type=None), 'model_type is None'),
        (dict(architectures=['LlamaForTokenClassification']), r"architectures is \['LlamaForTokenClassification'\], allowed is \['Llama"),
        (dict(hidden_act='gelu'), "hidden_act is 'gelu', allowed is 'silu'"),
        (dict(attention_bias=True), 'attention_bias is True, allowed is False'),
        (dict(mlp_bias=True), 'mlp_bias is True'),
        (dict(use_sliding_window=True), 'use_sliding_window is True'),
        (dict(layer_types=['full_attention', 'sliding_attention']), 'layer_types is .* allowed is'),
        (dict(quantization_config={'bits': 4}), 'quantization_config is'),
        (dict(partial_rotary_factor=0.5), 'partial_rotary_factor is 0.5'),
        (dict(hidden_size=None), 'hidden_size is None, allowed is an integer of at least 1'),
        (dict(num_key_value_heads=3), 'num_kv_heads is 3, allowed is a divisor of num_heads=4'),
        (dict(rope_scaling=dict(rope_type='yarn', factor=4.0)), "rope_scaling.rope_type is 'yarn', allowed is 'default' or 'llama3'"),
        (dict(rope_scaling=dict(rope_type='llama3', factor=4.0)), 'rope_scaling.low_freq_factor is None'),
        (dict(rope_parameters=dict(rope_theta=1e4, rope_type='default')), r'rope_theta is \[10000.0, 500000.0\], allowed is one value'),
        (dict(rope_parameters=dict(rope_type='default')), 'rope_parameters and rope_scaling is'),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), 'rope_parameters.partial_rotary_factor is 0.5'),
    ],
)
def test_settings_that_would_not_be_followed_are_errors(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


def test_config_must_be_there_and_be_an_object(folder):
    with pytest.raises(FileNotFoundError, match='config.json is not there, allowed is a folder in Hugging Face format'):
        read_config(folder / 'nowhere')
    for text, message in (('{', 'config.json is not JSON'), ('[1]', 'config.json holds a list')):
        (folder / 'config.json').write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(folder)


# ---- weights


@pytest.mark.parametrize('name', goldens.CONFIGS)
def test_saved_shards_are_the_tensors_that_were_read(folders, tmp_path, name):
    config, params = load_pretrained(folders[name])
    save_pretrained(tmp_path / 'saved', config, params, max_shard_bytes=40_000)
    shards = sorted((tmp_path / 'saved').glob('model-*.safetensors'))
    assert len(shards) > 2 and shards[0].name == f'model-00001-of-{len(shards):05}.safetensors'
    tensors = {key: value for shard in shards for key, value in load_file(shard).items()}
    expected = goldens.checkpoint(name)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)
    again, loaded = load_pretrained(tmp_path / 'saved')
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    told = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    for key in ('architectures', 'model_type', 'rms_norm_eps', 'tie_word_embeddings', 'num_key_value_heads', 'torch_dtype'):
        assert told[key] == goldens.CONFIGS[name][key], key


def test_saving_overwrites_nothing(folders, tmp_path):
    config, params = load_pretrained(folders['llama'])
    for limit in (10**9, 40_000):
        save_pretrained(tmp_path / str(limit), config, params, max_shard_bytes=limit)
        with pytest.raises(FileExistsError, match='holds weights, allowed is a folder without model.safetensors'):
            save_pretrained(tmp_path / str(limit), config, params)
    assert (tmp_path / '1000000000' / 'model.safetensors').is_file()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(levels=(LevelConfig(96, 1), LevelConfig(96, 4))), 'levels is .* allowed is one level'),
        (dict(attention=AttentionConfig(window=16)), 'attention is .* allowed is attention without window'),
        (dict(attention=AttentionConfig(qkv_bias=True, qk_norm=True)), r'qk_norm is \(True, True\), allowed is not both'),
        (dict(mixer='linear-attention', attention=AttentionConfig()), "mixer is 'linear-attention', allowed is 'attention'"),
        (dict(in_sequence=InSequenceConfig((0,))), 'in_sequence is .* allowed is None'),
        (dict(aggregation='sum'), "aggregation is 'sum', allowed is 'chain'"),
        (dict(vocab_size=32), r"shape of params\['embedding'\] is \(64, 64\), allowed is \(32, 64\)"),
        (dict(tie_embeddings=False), r"shape of params\['head'\] is None, allowed is \(64, 64\)"),
    ],
)
def test_models_that_the_format_cannot_express_are_not_saved(folders, tmp_path, fields, message):
    config, params = load_pretrained(folders['llama'])
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / 'saved', dataclasses.replace(config, **fields), params)
    assert not (tmp_path / 'saved').exists()


def test_dtypes_of_files_and_of_parameters(folder, tmp_path, golden):
    half = lambda key, tensor: tensor.astype(ml_dtypes.bfloat16 if 'mlp' in key else np.float16 if 'k_proj' in key else tensor.dtype)
    rewrite(folder, lambda tensors: {key: half(key, tensor) for key, tensor in tensors.items()})
    config, params = load_pretrained(folder)
    mlp = goldens.checkpoint('llama')['model.layers.1.mlp.up_proj.weight']
    np.testing.assert_array_equal(params['blocks']['channel']['level_0']['up']['kernel'][1], mlp.T.astype(ml_dtypes.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    config, params = load_pretrained(folder, param_dtype='bfloat16', dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
    y = logits(config, params, 64)
    assert y.dtype == np.float32 and np.corrcoef(y.ravel(), golden['llama_64'].ravel())[0, 1] > 0.99
    save_pretrained(tmp_path / 'saved', config, params)
    assert json.loads((tmp_path / 'saved' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
    assert {tensor.dtype for tensor in load_file(tmp_path / 'saved' / 'model.safetensors').values()} == {np.dtype(ml_dtypes.bfloat16)}


def sharded(shapes):
    """By logical axes over eight devices."""
    mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    rules = {'embed': 'fsdp', 'heads': 'tensor', 'mlp': 'tensor', 'vocab': 'tensor'}
    place = lambda axes: NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in axes)))
    return jax.tree.map(place, logical_axes(shapes), is_leaf=lambda x: isinstance(x, tuple))


def test_each_device_reads_its_part(folders, golden, monkeypatch):
    config, whole = load_pretrained(folders['qwen2'])
    sizes, read = [], pretrained._tensor
    monkeypatch.setattr(pretrained, '_tensor', lambda *args: sizes.append((part := read(*args)).size) or part)
    params = load_parameters(folders['qwen2'], config, shardings=sharded)
    assert max(sizes) == 96 * 64 // 8
    kernel = params['blocks']['channel']['level_0']['up']['kernel']
    assert kernel.sharding.spec == PartitionSpec(None, 'fsdp', 'tensor') and kernel.addressable_shards[0].data.shape == (2, 32, 24)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert error(logits(config, params, 64), golden['qwen2_64']) < TOLERANCE
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    one = load_parameters(folders['qwen2'], config, param_dtype='bfloat16', shardings=device)
    assert all(leaf.devices() == {jax.devices()[3]} and leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(one))


def test_tensors_that_say_nothing_new_are_passed_over(folder):
    rewrite(
        folder,
        lambda t: {
            **t,
            'lm_head.weight': t['model.embed_tokens.weight'],
            'model.layers.0.self_attn.rotary_emb.inv_freq': t['model.norm.weight'],
        },
    )
    _, params = load_pretrained(folder)
    assert 'head' not in params
    rewrite(folder, lambda t: {**t, 'lm_head.weight': -t['lm_head.weight']})
    with pytest.raises(ValueError, match='lm_head.weight is .* allowed is model.embed_tokens.weight itself'):
        load_pretrained(folder)


Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: t.pop(Q) is None, rf"missing is '{Q}', allowed is none of the 20 that config.json asks for"),
        (lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': t['model.norm.weight']}), "too many is 'model.layers.0.*q_proj.bias'"),
        (lambda t: t.update({Q: t[Q].T.copy()}), rf'shape of {Q} is \(64, 256\), allowed is \(256, 64\)'),
        (lambda t: t.update({Q: t[Q].astype(np.int8)}), rf"dtype of {Q} is 'I8', allowed is one of \('F64', 'F32'"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_missing_and_damaged_files(folders, folder, tmp_path):
    config, params = load_pretrained(folders['llama'])
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match='model.safetensors is not a whole safetensors file'):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match='has no weights, allowed is a folder with model.safetensors or'):
        load_pretrained(folder)
    save_pretrained(folder, config, params, max_shard_bytes=40_000)
    first, second, *_ = sorted(folder.glob('model-*.safetensors'))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f'{second.name} is not there: model.safetensors.index.json names'):
        load_pretrained(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f'{second.name}: tensors is .* allowed is tensors that no other shard holds'):
        load_pretrained(folder)
    second.write_bytes(content)
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    index['weight_map']['model.norm.weight'] = '../model.safetensors'
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match="shard is '../model.safetensors', allowed is the name of a file in the same folder"):
        load_pretrained(folder)
    (folder / 'model.safetensors.index.json').write_text('{}')
    with pytest.raises(ValueError, match='weight_map is None, allowed is shards by tensor'):
        load_pretrained(folder)


PUBLISHED = {  # what config.json of the published models says (without the keys that are read by no one), and their parameters
    'Llama-3.2-1B': (
        1_235_814_400,
        dict(
            model_type='llama', vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True, rms_norm_eps=1e-5,
            rope_theta=500000.0, rope_scaling=goldens.CONFIGS['llama']['rope_scaling'],
        ),
    ),
    'Qwen2.5-0.5B': (
        494_032_768,
        dict(
            model_type='qwen2', vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, rms_norm_eps=1e-6,
            num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=1000000.0,
            sliding_window=32768, use_sliding_window=False, max_window_layers=24,
        ),
    ),
    'Qwen2.5-7B': (
        7_615_616_512,
        dict(
            model_type='qwen2', vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, rms_norm_eps=1e-6,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072, tie_word_embeddings=False, rope_theta=1000000.0,
        ),
    ),
    'Qwen3-0.6B': (
        596_049_920,
        dict(
            model_type='qwen3', vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, rms_norm_eps=1e-6,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
            rope_theta=1000000, rope_scaling=None,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_as_many_parameters_as_they_say(tmp_path, name):
    count, fields = PUBLISHED[name]
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    config = read_config(tmp_path)
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
