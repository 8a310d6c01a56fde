"""Self-edits: how they are asked for, how they are read, and what the model learns from them.

The prompts say in this project's words what those of the paper ask (Appendix B, arXiv:2506.10943v2); the rules by which a text becomes
training sequences are the reference's.
"""

import dataclasses
import json
import re
from typing import Any

# What each of the paper's seven prompts asks for, and the header at which the model goes on.
_REQUESTS = {
    'implications': ('Read the passage and list what follows from it, directly or indirectly.', 'Implications:'),
    'implications-long': ('Read the passage and make a long list of what follows from it, directly or indirectly.', 'Implications:'),
    'implications-very-long': (
        'Read the passage and make a very long list of what follows from it, directly or indirectly, leaving nothing out.',
        'Implications:',
    ),
    'implications-chain-of-thought': (
        'Read the passage. First think step by step about what it says, under the header "Thought Process:"; then list what follows from '
        'it, directly or indirectly, under the header "Implications:".',
        'Thought Process:',
    ),
    'rewrite': ('Read the passage and say it again in several other ways, each on a line of its own.', 'Rewritten passages:'),
    'self-qa': ('Read the passage and turn what it says into questions with their answers.', 'Question 1: '),
    'none': ('', ''),
}
KNOWLEDGE_PROMPTS = tuple(_REQUESTS)
_QUESTION = re.compile(r'(?=Question \d+:)')
_IMPLICATIONS = 'Implications:'
LEARNING_RATES = (1e-5, 1e-2)  # what a configuration may ask for
MOST_EPOCHS = 100
_AUGMENTATIONS = ('use_basic_augmentations', 'use_size_augmentations', 'use_chain_augmentations', 'use_repeat_augmentations')
_STRATEGIES = ('train_using_all_tokens', 'train_using_output_tokens')


class InvalidEditError(ValueError):
    """A self-edit that cannot be learned from; its message says why. It earns nothing, and is not drawn again until one fits."""


def knowledge_prompt(variant: str, title: str, passage: str) -> str:
    """What a model is asked before it writes a self-edit of a passage.

    Raises:
        ValueError: for a variant that is not one of `KNOWLEDGE_PROMPTS`.
    """
    if variant not in _REQUESTS:
        raise ValueError(f'variant is {variant!r}, allowed is one of {", ".join(KNOWLEDGE_PROMPTS)}')
    request, header = _REQUESTS[variant]
    return '\n'.join(part for part in (request, f'Passage:\n{title}\n{passage}', header) if part)


def question_prompt(title: str, question: str) -> str:
    """What a model is asked after the update; it does not see the passage."""
    return f'Answer the question in as few words as it takes.\n\nQuestion: Topic: {title}\n{question}\nAnswer:'


def training_texts(title: str, passage: str, edit: str, *, split_lines: bool = True) -> list[str]:
    """The sequences a self-edit of a passage becomes, the passage itself last.

    Parts are what stands between lines of '---'. A part with numbered questions and answers is cut before each question; any other,
    with `split_lines` (an edit of one passage; of several they are kept whole), at line breaks, and loses a first line that only
    announces a list, its second line beginning with '1.'. Of a chain of thought only what follows "Implications:" is learned.
    Every sequence has the title in front.

    Raises:
        InvalidEditError: for an edit without text.
    """
    if edit.lstrip().startswith('Thought Process:') and _IMPLICATIONS in edit:
        edit = edit.split(_IMPLICATIONS, 1)[1]
    texts = [text for part in re.split(r'^-{3,}\s*$', edit, flags=re.MULTILINE) for text in _cut(part.strip(), split_lines)]
    if not texts:
        raise InvalidEditError('edit is empty, allowed is a text with at least one line')
    return [f'{title}\n{text}' for text in [*texts, passage.strip()]]


def _cut(part: str, split_lines: bool) -> list[str]:
    if _QUESTION.search(part) and 'Answer:' in part:
        texts = _QUESTION.split(part)
    elif split_lines:
        texts = part.split('\n')
        if len(texts) > 1 and texts[1].lstrip().startswith('1.'):
            texts = texts[1:]
    else:
        texts = [part]
    return [text.strip() for text in texts if text.strip()]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A self-edit of few-shot abstraction: how to make data of a task's demonstrations, and how to train on them (Sec. 3.2)."""

    basic: bool
    size: bool
    chain: bool
    repeat: bool
    output_tokens_only: bool
    learning_rate: float
    epochs: int


def configuration_prompt(demonstrations: list[tuple[list[list[int]], list[list[int]]]]) -> str:
    """What a model is asked before it configures its own training on a task of grids."""
    show = lambda grid: '\n'.join(' '.join(map(str, row)) for row in grid)
    shown = '\n\n'.join(f'Input:\n{show(given)}\nOutput:\n{show(made)}' for given, made in demonstrations)
    flags = ', '.join(f'"{name}": true or false' for name in _AUGMENTATIONS)
    return (
        f'{shown}\n\nOne rule makes each output of its input. Configure the training of a model on this task: which transformed copies of '
        'the examples it sees, on which tokens it is trained, and for how long. Answer with JSON alone, of this form:\n'
        f'{{"data_generation": {{{flags}}}, "training": {{"strategy": "{_STRATEGIES[0]}" or "{_STRATEGIES[1]}", '
        '"learning_rate": a number, "num_train_epochs": an integer}}'
    )


def parse_configuration(text: str) -> Configuration:
    """Reads a configuration.

    Raises:
        InvalidEditError: naming what is missing or not allowed.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InvalidEditError(f'edit is not JSON ({error})') from error
    generation, training = (_part(fields, name) for name in ('data_generation', 'training'))
    flags = [_field(generation, name, lambda value: isinstance(value, bool), 'true or false') for name in _AUGMENTATIONS]
    strategy = _field(training, 'strategy', lambda value: value in _STRATEGIES, ' or '.join(_STRATEGIES))
    low, high = LEARNING_RATES
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    rate = _field(training, 'learning_rate', lambda value: number(value) and low <= value <= high, f'a number from {low} to {high}')
    count = lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_EPOCHS
    epochs = _field(training, 'num_train_epochs', count, f'an integer from 1 to {MOST_EPOCHS}')
    return Configuration(*flags, strategy == _STRATEGIES[1], float(rate), epochs)


def _part(fields: Any, name: str) -> dict:
    part = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(part, dict):
        raise InvalidEditError(f'{name} is {part!r}, allowed is an object')
    return part


def _field(part: dict, name: str, allows: Any, allowed: str) -> Any:
    value = part.get(name)
    if not allows(value):
        raise InvalidEditError(f'{name} is {value!r}, allowed is {allowed}')
    return value
