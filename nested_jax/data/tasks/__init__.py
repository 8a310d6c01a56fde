"""Generated tasks of small-scale evaluation, one module a family; nothing is downloaded and nothing stored. See `task.Task`."""

from nested_jax.data.tasks.formal_languages import FormalLanguage
from nested_jax.data.tasks.task import Scores, Source, Task, score

__all__ = ['FormalLanguage', 'Scores', 'Source', 'Task', 'score']
