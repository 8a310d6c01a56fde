"""What a self-edit is worth: rewards that need no other model, one of them no update either, and how reliable a reward is.

A grader maps (answer, gold answer) to a mark from 0 to 1; `GRADERS` has those of text by name. A `Reward` maps all that is known of a
self-edit to a number and says whether an update has to come first; `REWARDS` has them by name: the mean mark of each grader, the
log-probability of the gold answers, the rubric. SEAL's reward is the mean mark of the questions of a passage after the update (Sec. 3.1,
arXiv:2506.10943v2), marked by GPT-4.1; of the graders here `gold_recall` agrees with it best.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nested_jax.data.tasks.arc import Grid
from nested_jax.seal.voting import vote

Grader = Callable[[Any, Any], float]
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize(text: str) -> list[str]:
    """Words of a text as SQuAD's evaluation compares them: lower case, no punctuation, no articles (arXiv:1606.05250v3)."""
    return _ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split()


def first_line(text: str) -> str:
    """What stands before the first line break of the stripped text: base models go on after their answer."""
    return text.strip().split('\n', 1)[0]


def gold_recall(answer: str, gold: str) -> float:
    """1 when the first line of the answer has every word of the gold answer, as often as that has it."""
    found, wanted = (collections.Counter(normalize(text)) for text in (first_line(answer), gold))
    return float(bool(wanted) and not wanted - found)


def contains(answer: str, gold: str) -> float:
    """1 when the words of the gold answer stand in the first line of the answer, together and in order."""
    found, wanted = (f' {" ".join(normalize(text))} ' for text in (first_line(answer), gold))
    return float(bool(wanted.strip()) and wanted in found)


def exact_match(answer: str, gold: str) -> float:
    """1 when the first line of the answer is the gold answer."""
    return float(bool(normalize(gold)) and normalize(first_line(answer)) == normalize(gold))


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words of the first line, SQuAD's F1."""
    found, wanted = (collections.Counter(normalize(text)) for text in (first_line(answer), gold))
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def vote_pass_2(answers: Mapping[str, Sequence[Grid | None]], gold: Grid) -> float:
    """1 when the right grid is one of the two that the views of a task vote for, as SEAL's rewards on ARC are."""
    return float(gold in vote(answers))


GRADERS: dict[str, Grader] = {grader.__name__: grader for grader in (gold_recall, contains, exact_match, token_f1)}


class Agreement(NamedTuple):
    """How far two graders' verdicts are alike."""

    share: float  # of answers marked alike
    kappa: float  # Cohen's: the same above what chance would give


def agreement(verdicts: Sequence[bool], others: Sequence[bool]) -> Agreement:
    """Compares two verdicts on the same answers.

    Raises:
        ValueError: for no verdicts, or not as many of both.
    """
    one, other = np.asarray(verdicts, bool), np.asarray(others, bool)
    if one.shape != other.shape or one.size == 0:
        raise ValueError(f'others has {other.size} verdicts, allowed are as many as verdicts has, {one.size}, and at least one')
    share = float((one == other).mean())
    chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    return Agreement(share, (share - chance) / (1 - chance) if chance < 1 else 1.0)


class Reliability(NamedTuple):
    """Where the variance of rewards within a context comes from."""

    candidates: float  # variance between candidates' true means, not below 0
    noise: float  # variance of one measurement
    icc: float  # share of the variance of a candidate's mean over its repetitions that is its own


def reliability(rewards: np.ndarray) -> Reliability:
    """Intraclass correlation of mean rewards, by the moments of a one-way analysis of variance within each context.

    Args:
        rewards: (contexts, candidates, repetitions), at least two of the latter.

    Returns:
        Components averaged over contexts; an icc of 0 says that the best of a context's candidates is chosen by chance.

    Raises:
        ValueError: for an array of another shape.
    """
    rewards = np.asarray(rewards, float)
    if rewards.ndim != 3 or min(rewards.shape[1:]) < 2:
        raise ValueError(f'rewards has shape {rewards.shape}, allowed is (contexts, candidates >= 2, repetitions >= 2)')
    repetitions = rewards.shape[2]
    noise = float(rewards.var(2, ddof=1).mean())
    candidates = max(float(rewards.mean(2).var(1, ddof=1).mean()) - noise / repetitions, 0.0)
    total = candidates + noise / repetitions
    return Reliability(candidates, noise, candidates / total if total else 0.0)


class Rubric(NamedTuple):
    """Marks of a self-edit from 1 to 5, from its text alone."""

    length: float
    diversity: float
    quality: float
    correctness: float

    @property
    def total(self) -> float:
        """Their sum, 4 to 20."""
        return sum(self)


def rubric(edit: str, passage: str, *, full_length: int = 150) -> Rubric:
    """Marks a self-edit without an update, on the four scales of SEAL's proxy reward (Sec. B.10, arXiv:2506.10943v2).

    The paper asks GPT-4.1; here length is words up to `full_length`, diversity the share of word pairs that differ, quality the share of
    lines that are sentences of their own (at least three words, a full stop, not said before), correctness the share of words with
    four letters or more that the passage has too. It can be talked into marks by copying the passage: a proxy to compare, not to report.
    """
    words, lines = normalize(edit), [line.strip() for line in edit.splitlines() if line.strip()]
    pairs = list(zip(words, words[1:], strict=False))
    said = collections.Counter(' '.join(normalize(line)) for line in lines)
    sentences = [line for line in lines if len(line.split()) >= 3 and line.endswith(('.', '!', '?'))]
    known, long = set(normalize(passage)), [word for word in words if len(word) >= 4]
    shares = (
        min(len(words) / full_length, 1.0),
        len(set(pairs)) / len(pairs) if pairs else 0.0,
        sum(said[' '.join(normalize(line))] == 1 for line in sentences) / len(lines) if lines else 0.0,
        sum(word in known for word in long) / len(long) if long else 0.0,
    )
    return Rubric(*(1 + 4 * share for share in shares))


class Tried(NamedTuple):
    """What is known of a self-edit: its text at once, the rest, by question, when a model has been updated on it and asked."""

    passage: str
    edit: str = ''
    golds: Sequence[Any] = ()
    answers: Sequence[Any] = ()  # texts, or of `vote_pass_2` grids by view
    log_probs: Sequence[float] = ()  # of the gold answers, nats a token


class Reward(NamedTuple):
    """A way to say what a self-edit earns."""

    mark: Callable[[Tried], float]
    needs_update: bool = True


def graded(grader: Grader) -> Reward:
    """The mean mark of the answers."""
    return Reward(lambda tried: float(np.mean([grader(*each) for each in zip(tried.answers, tried.golds, strict=True)])))


def by_rubric(full_length: int = 150) -> Reward:
    """The rubric's total, with so many words as full length."""
    return Reward(lambda tried: rubric(tried.edit, tried.passage, full_length=full_length).total, needs_update=False)


REWARDS: dict[str, Reward] = {name: graded(grader) for name, grader in GRADERS.items()}
REWARDS |= {
    'vote_pass_2': graded(vote_pass_2),
    'log_prob': Reward(lambda tried: float(np.mean(tried.log_probs))),
    'rubric': by_rubric(),
}
