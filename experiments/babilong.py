"""bAbI's stories in a haystack, at lengths far beyond those trained on: `python -m experiments.babilong`.

Fig. 9, arXiv:2512.24695v1, has no numbers: large models, not trained on the task, fail between 128k and 256k tokens; Titans, ARMT and Hope,
fine-tuned on it, keep up to 1M, and Hope to 10M.

Models and protocol are those of `experiments/needle.py`, the stories those of `nested_jax/data/tasks/babilong.py` with eight sentences, in
training on short texts with as many as fit: whole texts of 256 bytes first, then of 384, 512 and 1,024 too. The bytes outside the answer
count a twentieth in the loss. Beside a result stand the most frequent answer and the place, person or object named last.

No rows yet: a pilot of hope-linear-zero on qa1, in other settings, had 72 % right of 32 texts of 1,024 bytes after 2,400 steps.

    taskset -c 0 python -m experiments.babilong --minutes 40 --tasks qa1 qa4
    taskset -c 1 python -m experiments.babilong --minutes 40 --tasks qa2 qa3 qa5
"""

import contextlib
import dataclasses
import pathlib
import sys

from experiments.arguments import parse_arguments
from experiments.haystack_runs import HaystackArgs, run
from nested_jax.data.tasks.babilong import MOST_FACTS, QUESTIONS, BabiHaystack
from nested_jax.data.tasks.haystack import HaystackTask

EXPERIMENT = 'babilong'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'


@dataclasses.dataclass(frozen=True)
class Args(HaystackArgs):
    """Train small models to follow stories and test them on longer texts."""

    known_tasks = QUESTIONS

    tasks: tuple[str, ...] = QUESTIONS
    """Of qa1 to qa5."""
    num_facts: int = 8
    """Sentences of a story, in qa4 at most 5, in training fewer where texts are too short for as many."""
    train_lengths: tuple[int, ...] = (256, 384, 512, 1024)
    """Bytes of the texts trained on, the shortest alone at first, then the next one too, and so on; those too short are left out."""
    elsewhere: float = 0.05
    """Factor of the loss of bytes outside the answer, whose own is 1; most of them are prose that nobody could know."""
    results: pathlib.Path = RESULTS
    """File that a row for each run is added to."""

    def __post_init__(self):
        super().__post_init__()
        facts = {(task, self.text(task, length).num_facts) for task in self.tasks for length in self.lengths(task, 'test_lengths')}
        wanted = {(task, self.most(task)) for task in self.tasks}
        self.check('num_facts', facts == wanted, 'a number that fits into the shortest of test_lengths')

    def most(self, task: str) -> int:
        """Sentences of a task's stories where texts are long enough."""
        return min(self.num_facts, MOST_FACTS.get(task, self.num_facts))

    def text(self, task: str, length: int) -> HaystackTask:
        """A question about stories of as many sentences as fit."""
        for num_facts in range(self.most(task), 0, -1):
            with contextlib.suppress(ValueError):
                return BabiHaystack(length=length, question=task, num_facts=num_facts)
        return BabiHaystack(length=length, question=task, num_facts=self.most(task))


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that have no row; returns the exit code."""
    return run(EXPERIMENT, parse_arguments(Args, argv, __doc__))


if __name__ == '__main__':
    sys.exit(main())
