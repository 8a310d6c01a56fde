"""Tiny checkpoints in Hugging Face's format, and what `transformers` makes of them.

The weights follow a recipe in numpy's frozen generator, so only logits are stored. Matrices are large enough that logits have a standard
deviation above 1 and heads attend sharply: an error of theta, scaling or bias then shows. To make the goldens again, in an environment
with torch, transformers and safetensors (5.24.0 and torch 2.13.0 for those stored):

    python tests/models/pretrained_goldens.py
"""

import json
import pathlib
import tempfile

import numpy as np
from safetensors.numpy import save_file

GOLDENS = pathlib.Path(__file__).parent / 'goldens' / 'pretrained.npz'
VOCAB, LENGTHS = 64, (64, 3000)

_COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, hidden_act='silu', max_position_embeddings=4096,
    initializer_range=0.02, use_cache=True, attention_dropout=0.0, bos_token_id=0, eos_token_id=1, torch_dtype='float32',
)  # fmt: skip
CONFIGS = {
    'llama': dict(  # Llama 3.2: its theta, scaling and epsilon, heads of 64 in groups of four, in the old spelling
        **_COMMON, architectures=['LlamaForCausalLM'], model_type='llama', num_attention_heads=4, num_key_value_heads=1, head_dim=64,
        rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False, mlp_bias=False, pretraining_tp=1, rope_theta=500000.0,
        rope_scaling=dict(
            rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
    ),
    'qwen2': dict(  # Qwen 2.5: biases, an untied head as from 7B, the old spelling
        **_COMMON, architectures=['Qwen2ForCausalLM'], model_type='qwen2', num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1000000.0, sliding_window=4096, use_sliding_window=False,
        max_window_layers=2,
    ),
    'qwen3': dict(  # Qwen 3: normed heads wider than width / heads, the new spelling
        **_COMMON, architectures=['Qwen3ForCausalLM'], model_type='qwen3', num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False, use_sliding_window=False, sliding_window=None,
        layer_types=['full_attention'] * 2, rope_parameters=dict(rope_theta=1000000.0, rope_type='default'),
    ),
}  # fmt: skip


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, as transformers writes them."""
    width, hidden, heads, kv_heads = (
        config[name] for name in ('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads')
    )
    head_dim = config.get('head_dim', width // heads)
    block = {'input_layernorm.weight': (width,), 'post_attention_layernorm.weight': (width,)}
    for name, count in {'q': heads, 'k': kv_heads, 'v': kv_heads}.items():
        block[f'self_attn.{name}_proj.weight'] = (count * head_dim, width)
        if config['model_type'] == 'qwen2':
            block[f'self_attn.{name}_proj.bias'] = (count * head_dim,)
    if config['model_type'] == 'qwen3':
        block |= {'self_attn.q_norm.weight': (head_dim,), 'self_attn.k_norm.weight': (head_dim,)}
    block |= {'self_attn.o_proj.weight': (width, heads * head_dim), 'mlp.down_proj.weight': (width, hidden)}
    block |= {'mlp.gate_proj.weight': (hidden, width), 'mlp.up_proj.weight': (hidden, width)}
    shapes = {'model.embed_tokens.weight': (VOCAB, width), 'model.norm.weight': (width,)}
    shapes |= {f'model.layers.{i}.{name}': shape for i in range(config['num_hidden_layers']) for name, shape in block.items()}
    return shapes if config['tie_word_embeddings'] else shapes | {'lm_head.weight': (VOCAB, width)}


def checkpoint(name: str) -> dict[str, np.ndarray]:
    """The tensors of a tiny model, float32."""
    random, tensors = np.random.RandomState(7), {}
    for key, shape in tensor_shapes(CONFIGS[name]).items():
        noise = random.standard_normal(shape)
        if 'norm' in key:
            tensors[key] = 1 + 0.2 * noise
        elif key.endswith('bias'):
            tensors[key] = noise
        elif 'q_proj' in key or 'k_proj' in key:
            tensors[key] = 1.5 * noise / np.sqrt(shape[-1])  # scores of a standard deviation above 2
        else:
            tensors[key] = noise / (3 if 'embed' in key or 'lm_head' in key else np.sqrt(shape[-1]))
    return {key: tensor.astype(np.float32) for key, tensor in tensors.items()}


def tokens(length: int) -> np.ndarray:
    """(1, length) int32."""
    return np.random.RandomState(length).randint(0, VOCAB, (1, length)).astype(np.int32)


def positions(length: int) -> np.ndarray:
    """The 64 places whose logits are stored, the last one among them."""
    return np.arange(64) if length == 64 else np.sort(np.append(np.random.RandomState(0).permutation(length - 1)[:63], length - 1))


def write(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A tiny model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(CONFIGS[name]))
    save_file(checkpoint(name), folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder


def _logits(model, length: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens(length)).long()).logits[0, positions(length)].numpy()


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    arrays = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder), name)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()
        for length in LENGTHS:
            logits, wide = (_logits(model.to(dtype), length) for dtype in (torch.float32, torch.float64))
            np.testing.assert_allclose(logits, wide, rtol=0, atol=3e-5, err_msg=f'{name}, {length} tokens: float32 against float64')
            print(f'{name}, {length} tokens: standard deviation {logits.std():.3f}, from float64 {np.abs(logits - wide).max():.1e}')
            arrays[f'{name}_{length}'] = logits
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == '__main__':
    main()
