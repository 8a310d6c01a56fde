"""Word problems of finite groups: after each element comes the product of all so far.

Merrill et al. 2024 (arXiv:2404.08819; rules of jopetty/word-problem): S5 and A5 are not solvable, so their products are NC1-complete,
while Z60, as large as A5, is abelian. Elements are numbered in the order of their permutations, written as the images of 0 to 4; a
product applies its left factor first. Elements are drawn uniformly and independently.

Prefixes of a sequence are sequences of their own, so one length is trained on; the reference trains on all lengths up to it and holds
out a fifth of the longest. One core draws 20,000 sequences of 64 elements a second.
"""

import dataclasses
import functools
import itertools

import numpy as np

from nested_jax.data.tasks.task import Example, Guess, Task, check, check_choice, make_example

GROUPS = ('S5', 'A5', 'Z60')


@dataclasses.dataclass(frozen=True)
class WordProblem(Task):
    """Prefix products of group elements."""

    group: str = 'S5'
    """S5, A5 or Z60."""
    length: int = 16
    """Elements of a sequence."""

    def __post_init__(self):
        check_choice('group', self.group, GROUPS)
        check('length', self.length, self.length >= 2, 'an integer of at least 2')

    @property
    def vocab_size(self) -> int:
        """Elements of the group."""
        return len(multiplication_table(self.group))

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """A sequence of elements and their prefix products."""
        elements = rng.integers(0, self.vocab_size, self.length)
        products, table, reach = elements.copy(), multiplication_table(self.group), 1
        while reach < self.length:  # each product doubles the elements it covers
            products[reach:] = table[products[:-reach], products[reach:]]
            reach *= 2
        return make_example(elements, products, np.ones(self.length, bool))

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Permutations applied one by one, remainders summed; see `Task.solve`."""
        if self.group == 'Z60':
            return np.cumsum(tokens) % 60, np.ones(len(tokens), np.float32)
        permutations = _permutations(self.group)
        images, products = (0, 1, 2, 3, 4), []
        for token in tokens:
            images = tuple(permutations[token][image] for image in images)
            products.append(permutations.index(images))
        return np.array(products), np.ones(len(tokens), np.float32)

    def guesses(self) -> dict[str, Guess]:
        """'copy': the element itself."""
        return dict(copy=lambda tokens: tokens)


@functools.cache
def multiplication_table(group: str) -> np.ndarray:
    """Products of a group's elements, (N, N); row: the factor applied first."""
    if group == 'Z60':
        return np.add.outer(np.arange(60), np.arange(60)) % 60
    permutations = np.array(_permutations(group))
    products = permutations[:, permutations].swapaxes(0, 1)  # [first, second, i] = second[first[i]]
    codes = permutations @ 5 ** np.arange(5)
    order = np.argsort(codes)
    return order[np.searchsorted(codes[order], products @ 5 ** np.arange(5))]


@functools.cache
def _permutations(group: str) -> list[tuple[int, ...]]:
    """Permutations of five in lexicographic order, for A5 the even ones."""
    inversions = lambda images: sum(first > second for first, second in itertools.combinations(images, 2))
    return [images for images in itertools.permutations(range(5)) if group == 'S5' or inversions(images) % 2 == 0]
