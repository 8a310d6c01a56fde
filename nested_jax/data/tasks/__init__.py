"""Generated tasks of small-scale evaluation, one module a family; nothing is downloaded and nothing stored. See `task.Task`."""

from nested_jax.data.tasks import mad
from nested_jax.data.tasks.formal_languages import FormalLanguage
from nested_jax.data.tasks.mqar import MultiQueryRecall
from nested_jax.data.tasks.task import Scores, Source, Task, score
from nested_jax.data.tasks.word_problems import WordProblem

__all__ = ['FormalLanguage', 'MultiQueryRecall', 'Scores', 'Source', 'Task', 'WordProblem', 'mad', 'score']
