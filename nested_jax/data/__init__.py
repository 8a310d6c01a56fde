"""Text, tokens and batches. Imports none of the other rooms, and no JAX."""

from nested_jax.data.datasets import Dataset, check_same_data, data_identity, open_dataset
from nested_jax.data.pipelines import batch_iterator, evaluation_batches, rows_per_epoch, training_batches

__all__ = [
    'Dataset',
    'batch_iterator',
    'check_same_data',
    'data_identity',
    'evaluation_batches',
    'open_dataset',
    'rows_per_epoch',
    'training_batches',
]
