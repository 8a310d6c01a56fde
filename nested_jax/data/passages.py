"""Passages with questions, in the formats they are published in: SQuAD's own, and that of the files of SEAL's repository."""

import hashlib
import json
import lzma
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Question(NamedTuple):
    """What is asked, and the answer that counts."""

    question: str
    answer: str


class Passage(NamedTuple):
    """A text under a title, and what is asked about it."""

    title: str
    context: str
    questions: tuple[Question, ...]


def load_passages(path: str | os.PathLike) -> list[Passage]:
    """Reads passages.

    Args:
        path: SQuAD v1.1 as published (arXiv:1606.05250v3; the first answer of each question counts), or a list, or lines, of objects with
            title, context and questions, each of question and answer; `.xz` is unpacked.

    Returns:
        Passages in the file's order.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: for a file of another form, or a passage without text or without questions; naming which.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there, allowed is a file of passages with questions')
    try:
        text = (lzma.open(path).read() if path.suffix == '.xz' else path.read_bytes()).decode()
        passages = [_passage(fields) for fields in _records(text)]
    except (KeyError, TypeError, IndexError, UnicodeDecodeError, lzma.LZMAError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is not of SQuAD v1.1 or of passages with title, context and questions ({error!r})') from None
    for index, passage in enumerate(passages):
        if not passage.context.strip() or not passage.questions:
            what = 'no questions' if passage.context.strip() else 'no text'
            raise ValueError(f'{path}: passage {index} ({passage.title!r}) has {what}, allowed is a text with at least one question')
    if not passages:
        raise ValueError(f'{path} has no passages, allowed is at least one')
    return passages


def passages_digest(passages: list[Passage]) -> str:
    """Tells sets of passages apart: sha256 in hexadecimal."""
    return hashlib.sha256(json.dumps(passages).encode()).hexdigest()


def shuffled_passages(passages: list[Passage], seed: int) -> list[Passage]:
    """The same in an order of the seed."""
    return [passages[place] for place in np.random.default_rng(seed).permutation(len(passages))]


def _records(text: str) -> Iterator[dict[str, Any]]:
    """Objects with title, context and questions (or SQuAD's `qas`)."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(content, dict) and 'data' in content:
        for article in content['data']:
            yield from (dict(part, title=article['title']) for part in article['paragraphs'])
    else:
        yield from [content] if isinstance(content, dict) else content


def _passage(fields: dict[str, Any]) -> Passage:
    if 'qas' in fields:
        questions = [Question(asked['question'], asked['answers'][0]['text']) for asked in fields['qas']]
    else:
        questions = [Question(asked['question'], asked['answer']) for asked in fields['questions']]
    return Passage(fields['title'], fields['context'], tuple(questions))
