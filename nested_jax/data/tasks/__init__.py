"""Generated tasks of small-scale evaluation, one module a family; nothing is downloaded and nothing stored.

    task = MultiQueryRecall(num_pairs=4)                       # parameters checked; the reference's where it has any
    batch = task.batch(0, 32, seed=1)                          # examples 0 to 31: tokens, targets, weights, each (32, 64)
    score(predictions, task.batch(0, 200, split='test'))       # shares right by position and by sequence
    task.baselines(split='test')                               # the same of trivial rules, to print beside a result
    grain.MapDataset.source(task.source(10_000)).batch(32)     # random access
    task.solve(batch['tokens'][0])                             # targets and weights from the tokens alone

Long texts (`Needles`, `BabiHaystack`) come in chunks too, `task.stream(index, chunk_size)`. See `task.Task`.
"""

from nested_jax.data.tasks import mad
from nested_jax.data.tasks.babilong import BabiHaystack
from nested_jax.data.tasks.formal_languages import FormalLanguage
from nested_jax.data.tasks.mqar import MultiQueryRecall
from nested_jax.data.tasks.needles import Needles
from nested_jax.data.tasks.task import Scores, Source, Task, score
from nested_jax.data.tasks.word_problems import WordProblem

__all__ = ['BabiHaystack', 'FormalLanguage', 'MultiQueryRecall', 'Needles', 'Scores', 'Source', 'Task', 'WordProblem', 'mad', 'score']
