"""Long texts in which a few sentences matter and a question at the end asks for them: what needles and bAbI stories share.

Tokens are bytes, and texts ASCII. A text is `length` + 1 bytes: a head, the haystack with the sentences that matter at their depths, a
tail that asks, and the answer; targets are the next bytes, weights mark the answer's. What is left over between sentence and tail is
blanks. A text is made sentence by sentence, so that `stream` holds no more than a chunk of it, whatever the length.

The prose between the sentences that matter comes of a small grammar: "The old gardener watched the narrow bridge. "
"""

import abc
import dataclasses
import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from nested_jax.data.tasks.task import Example, Task, check

_ADJECTIVES = 'old narrow quiet distant broken wooden silver patient curious heavy gentle crooked'.split()
_NOUNS = 'gardener bridge teacher river lantern captain window clock farmer mountain painter letter soldier market dog tower'.split()
_VERBS = 'watched carried followed painted remembered repaired described passed avoided greeted measured noticed'.split()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a text is made of, the haystack apart."""

    head: bytes
    inserts: tuple[tuple[float, bytes], ...]  # depths from 0 to 1, ascending, and sentences
    tail: bytes
    answer: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.head) + sum(len(sentence) for _, sentence in self.inserts) + len(self.tail) + len(self.answer)


@dataclasses.dataclass(frozen=True)
class HaystackTask(Task):
    """The answer to a question about a few sentences of a long text."""

    length: int = 4096
    """Tokens, which are bytes."""

    prompt_end: ClassVar[re.Pattern]  # what comes right before the answer

    @property
    def vocab_size(self) -> int:
        """Bytes."""
        return 256

    @abc.abstractmethod
    def read(self, prompt: str) -> list[str]:
        """The answers to a prompt, head to tail, read sentence by sentence."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, split: str) -> Plan:
        """What a text is made of."""

    def signature(self, drawn: Plan) -> bytes:
        """The question and its answer."""
        return drawn.tail + drawn.answer

    def sentences(self, rng: np.random.Generator, plan: Plan) -> Iterator[bytes]:
        """Sentences of the haystack without end; here prose."""
        words = [_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS]
        while True:
            for first, second, third, fourth, fifth in rng.integers(0, [len(kind) for kind in words], (64, 5)).tolist():
                subject = f'The {_ADJECTIVES[first]} {_NOUNS[second]}'
                yield f'{subject} {_VERBS[third]} the {_ADJECTIVES[fourth]} {_NOUNS[fifth]}. '.encode()

    def stream(self, index: int, chunk_size: int, *, split: str = 'train', seed: int = 0) -> Iterator[Example]:
        """The example of an index in chunks of `chunk_size` tokens, the last perhaps shorter; see `example`."""
        check('chunk_size', chunk_size, chunk_size >= 1, 'an integer of at least 1')
        return self._chunks(*self.deal(index, split, seed), chunk_size)

    def render(self, rng: np.random.Generator, drawn: Plan) -> Example:
        """The text as one chunk."""
        [example] = self._chunks(rng, drawn, self.length)
        return example

    def _chunks(self, rng: np.random.Generator, plan: Plan, chunk_size: int) -> Iterator[Example]:
        begin, first_scored, text = 0, self.length - len(plan.answer), bytearray()
        for piece in self._pieces(rng, plan):
            text += piece
            while len(text) > chunk_size or begin + len(text) == self.length + 1 and len(text) > 1:
                chunk = np.frombuffer(bytes(text[: chunk_size + 1]), np.uint8).astype(np.int32)
                places = begin + np.arange(len(chunk) - 1)
                yield dict(tokens=chunk[:-1], targets=chunk[1:], weights=(places >= first_scored).astype(np.float32))
                del text[: len(places)]
                begin += len(places)

    def _pieces(self, rng: np.random.Generator, plan: Plan) -> Iterator[bytes]:
        room, used, waiting = self.length + 1 - plan.size, 0, list(plan.inserts)
        if room < 0:
            raise ValueError(f'length={self.length}; allowed: at least {plan.size - 1} for this example')
        yield plan.head
        for sentence in self.sentences(rng, plan):
            while waiting and waiting[0][0] * room <= used:
                yield waiting.pop(0)[1]
            if used + len(sentence) > room:
                break
            yield sentence
            used += len(sentence)
        yield b''.join(sentence for _, sentence in waiting) + b' ' * (room - used) + plan.tail + plan.answer

    def solve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads the text up to where the answer begins; see `Task.solve`."""
        prompt = self.prompt(tokens)
        return self.say(prompt, self.read(prompt), len(tokens))

    def prompt(self, tokens: np.ndarray) -> str:
        """The text up to where the answer begins."""
        text = bytes(tokens.tolist()).decode()
        return text[: [match.end() for match in self.prompt_end.finditer(text)][-1]]

    def say(self, prompt: str, answers: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Targets (length,) that give the answers behind a prompt, and weights."""
        spoken = spell(answers)
        targets, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        span = slice(len(prompt) - 1, len(prompt) - 1 + len(spoken))
        targets[span], weights[span] = np.frombuffer(spoken, np.uint8)[: len(targets[span])], 1
        return targets, weights


def spell(answers: list[str]) -> bytes:
    """How answers are written."""
    return f' {", ".join(answers)}.'.encode()
