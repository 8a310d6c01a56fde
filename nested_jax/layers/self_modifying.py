"""Self-modifying Titans, the token mixer of Hope (Sec. 8, arXiv:2512.24695v1)."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested_jax.config import ModelConfig
from nested_jax.layers.common import Context
from nested_jax.layers.kernels import self_modifying_form
from nested_jax.layers.memory_block import MemoryBlock
from nested_jax.memory import self_modifying as memory


class SelfModifyingTitansState(NamedTuple):
    """What one layer carries from call to call."""

    memories: memory.SelfModifyingState
    convolution: tuple[jax.Array, ...]  # inputs of q's, k's and v's convolutions, (B, 3, H * D)


class SelfModifyingTitans(nn.Module):
    """Token mixer whose keys, values and rates come from memories that it writes; `config.memory` sets it."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: SelfModifyingTitansState | None, context: Context
    ) -> tuple[jax.Array, SelfModifyingTitansState]:
        """(B, T, width) -> (B, T, width), and the state after the call's last token."""
        options = self.config.memory
        gates = ('alpha', 'eta', 'momentum') if options.momentum else ('alpha', 'eta')
        block = MemoryBlock(self.config, gates=gates, name='block')
        inputs = block.inputs(x, None if state is None else state.convolution, context)
        rows = memory.Inputs(
            inputs.query, inputs.key, inputs.value, inputs.gates['eta'], inputs.gates['alpha'], inputs.gates.get('momentum')
        )
        fields = {field.name for field in dataclasses.fields(memory.Rule)}
        rule = memory.Rule(**{name: value for name, value in dataclasses.asdict(options).items() if name in fields})
        if not context.update:
            rows = _unwritten(rows)
        initial = self._initial(rule)
        y, memories = memory.self_modifying(
            rows, inputs.retention_scale, initial, rule=rule, state=None if state is None else state.memories,
            position=context.position, segment_ids=context.segment_ids, implementation=self_modifying_form(rule, x.shape[1], initial),
        )  # fmt: skip
        new_state = SelfModifyingTitansState(memories, inputs.convolution)
        return block.output(y, inputs.output_gate), new_state if context.update else state

    def _initial(self, rule: memory.Rule) -> memory.Memories:
        """The meta-learned initial states: one parameter for each memory and layer, concatenated."""
        heads, width = self.config.num_heads, self.config.head_dim
        hidden = self.config.memory.hidden_dim or width
        small, lecun = nn.initializers.normal(0.02), nn.initializers.normal(width**-0.5)
        wide, names = memory.WIDE[: rule.wide], memory.WIDE[: rule.wide] + memory.GATES
        outputs = {name: width if name in wide else 1 for name in names}
        is_matrix = lambda name: rule.kind == 'matrix' or name in rule.matrix_memories
        mlps = [name for name in names if not is_matrix(name)]
        first = [self.param(f'initial_{name}_in', lecun, (heads, width, hidden)) for name in mlps]
        first += [self.param(f'initial_{name}', small, (heads, width, outputs[name])) for name in names if is_matrix(name)]
        if not mlps:
            return memory.Memories(jnp.concatenate(first, -1), None, None)
        second = {name: self.param(f'initial_{name}_out', small, (heads, hidden, outputs[name])) for name in mlps}
        none = [jnp.zeros((heads, 0, hidden, columns), first[0].dtype) for columns in (width, 1)]
        stacked = [
            jnp.concatenate([empty, *(second[name][:, None] for name in mlps if name in chosen)], 1)
            for empty, chosen in zip(none, (wide, memory.GATES), strict=True)
        ]
        return memory.Memories(jnp.concatenate(first, -1), *stacked)


def _unwritten(rows: memory.Inputs) -> memory.Inputs:
    """The same tokens with eta = 0, alpha = 1 and no momentum: they write nothing."""
    never = jnp.full_like(rows.eta, -jnp.inf)
    return rows._replace(eta=never, alpha=never, momentum=None if rows.momentum is None else never)
