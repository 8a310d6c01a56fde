"""Policies over configurations, for `experiments/seal_arc.py`: baselines, and policies that learn from rewards that are in a table.

Expected rewards are exact: probabilities of all configurations times what the table says. Letters in shapes: C tasks, M self-edits of each.
"""

from typing import Any

import numpy as np

from experiments.seal_arc_rewards import Table, family_of
from experiments.seal_arc_world import draw_task, probabilities, read_edits, samples, write_edits
from nested_jax.models.language_model import LanguageModel
from nested_jax.seal.outer_loop import OuterConfig, advantages, choose, make_policy_update
from nested_jax.seal.stages import Stages

PyTree = Any


def baselines(train: Table, test: Table) -> dict[str, np.ndarray]:
    """Measures (C, 3) on the test tasks, of arms that need no policy; constants are chosen on the training tasks.

    A family without training tasks has the constant of all; each task's own best is what no policy can beat.
    """
    families = np.array([family_of(index) for index in train.indices])
    constant, own = best(train.measures.mean(0)), []
    for index in test.indices:
        alike = families == family_of(index)
        own.append(best(train.measures[alike].mean(0)) if alike.any() else constant)
    places = np.arange(len(test.indices))
    return {
        'no update': test.base,
        'uniform': test.measures.mean(1),
        'best constant': test.measures[:, constant],
        'best constant of a family': test.measures[places, own],
        'best of each task': test.measures[places, [best(found) for found in test.measures]],
    }


def best(measures: np.ndarray) -> int:
    """The configuration of the highest reward, of equals that of the largest share of cells; measures (512, 3)."""
    return max(range(len(measures)), key=lambda place: (measures[place, 0], measures[place, 2]))


def expected(probability: np.ndarray, measures: np.ndarray) -> np.ndarray:
    """(C, 512), (C, 512, 3) -> (C, 3); what is missing to 1 is the probability of invalid self-edits, which earn 0."""
    return np.einsum('ce,cem->cm', probability, measures)


def look_up(table: Table, edits: np.ndarray) -> np.ndarray:
    """(C, M, 3) measures of self-edits (C, M, tokens), 0 for those that cannot be read."""
    found = np.zeros((*edits.shape[:2], table.measures.shape[-1]))
    for task, written in enumerate(edits):
        for index, place in enumerate(read_edits(written)):
            if place is not None:
                found[task, index] = table.measures[task, place]
    return found


class Policies:
    """Policies of one run, each of whose rounds is a stage."""

    def __init__(self, model: LanguageModel, stages: Stages, train: Table, test: Table):
        self.model, self.stages, self.table, self.test_table = model, stages, train, test
        self.train, self.test = ([draw_task(index, family_of(index)) for index in half.indices] for half in (train, test))

    def expected(self, name: str, params: PyTree) -> tuple[np.ndarray, float]:
        """Measures (C, 3) on the test tasks, and the mean probability of invalid self-edits."""
        found = self.stages(f'{name}/probabilities', lambda: dict(found=probabilities(self.model, params, self.test)))['found']
        return expected(found, self.test_table.measures), float(1 - found.sum(1).mean())

    def rounds(self, name: str, params: PyTree, config: OuterConfig, count: int, each: int, seed: int) -> list[dict[str, Any]]:
        """What came out of each round.

        Args:
            name: of the stages.
            params: of the policy as it begins.
            config: of its updates.
            count: of rounds.
            each: M.
            seed: of the samples and of the updates.

        Returns:
            For each round what `expected` gives, and the mean reward of the self-edits that were learned from.
        """
        update, history = make_policy_update(self.model, config), []
        for index in range(count):
            draw = lambda params=params, index=index: write_edits(self.model, params, self.train, each, 1000 * seed + index)
            edits = self.stages(f'{name}-{index}/edits', lambda draw=draw: dict(tokens=draw()))['tokens']
            found = look_up(self.table, edits)
            values = self._values(config, found, np.random.default_rng([seed, index]))
            learn = lambda params=params, edits=edits, values=values: update(params, samples(self.train, edits), values, seed)
            params = self.stages.tree(f'{name}-{index}/policy', learn)
            reward, invalid = self.expected(f'{name}-{index}', params)
            history.append(dict(expected=reward, invalid=invalid, mean=float(found[..., 0].mean())))
        return history

    def _values(self, config: OuterConfig, found: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(C M,) what each self-edit counts in the update; the baseline of a gain is the learner without an update."""
        rewards, cells = found[..., 0], found[..., 2]
        values = choose(config, rewards, self.table.base[:, 0], cells, rng) if config.imitates else advantages(config.algorithm, rewards)
        return values.reshape(-1).astype(float)
