"""Language models: `preset`, `LanguageModel`, `generate` and more. Imported on first use, so that a name is checked without JAX."""

import importlib

_HOMES = {
    'LanguageModel': 'nested_jax.models.language_model',
    'ModelConfig': 'nested_jax.config',
    'generate': 'nested_jax.models.sampling',
    'load_pretrained': 'nested_jax.models.pretrained',
    'logical_axes': 'nested_jax.models.axes',
    'preset': 'nested_jax.models.presets',
    'preset_names': 'nested_jax.models.presets',
    'save_pretrained': 'nested_jax.models.pretrained',
    'stack_levels': 'nested_jax.models.level_stacking',
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_HOMES[name]), name)
