"""Knowledge incorporation with a pre-trained model and real passages: `python -m experiments.seal_squad --model M --data D --test-data T`.

Table 2, arXiv:2506.10943v2, single passage, of Qwen2.5-7B on 200 passages of SQuAD's development set (974 questions, marked by GPT-4.1):
base 32.7 %, passage only 33.5, untrained self-edits 39.7, GPT-4.1's 46.3, SEAL after one round 43.7 and after two 47.0.

The defaults are that table's: two rounds of 50 passages, five self-edits each at temperature 1, three adapter starts, updates of rank 32 on
queries and values, one sequence a step for ten epochs at 1e-3; the writer learns by adapters of rank 64 on every projection, merged after
each round. Answers are greedy, without the passage, and marked by `--grader` here, not by GPT-4.1: its figures are to be compared with
each other. What the writer is rewarded for is that mark too, or by `--reward` the log-probability of the gold answers, or a rubric that
needs no update, as the paper's proxy does (Sec. B.10; 45.6 in place of 47.0). Learning rates fall linearly to zero over an update, of the
writer too. Differences from the published code: padding costs and teaches nothing, the text ends with the model's end token, the best edit
must beat the answers without one, and ties are broken by the log-probability of the gold answers.

Continued pre-training (--setting), n = 200, base 32.7 %: passage only 32.2 by adapters and 36.0 by all weights, untrained self-edits 41.0
and 50.6, GPT-4.1's 39.4 and 59.4, SEAL 43.8 and 58.2. Five self-edits of each passage, each kept whole, and the passage are learned
together: by adapters in three epochs at 1e-3 (the passage alone 1e-4), or by all weights in one at 7e-5 after a warm-up over 3 % of the
steps. The passage comes once; the first version repeated it for each self-edit. Rounds and rewards are those of single passages.

--model is a folder in Hugging Face's format (Qwen 2.5, Qwen 3, Llama 3) with its tokenizer.json; --data and --test-data are SQuAD's own
train-v1.1.json and dev-v1.1.json, or the files of SEAL's repository. No row: this needs published weights and an accelerator. The tests
run it with a tiny checkpoint.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.arguments import parse_arguments
from experiments.seal_runs import RunArgs, run_seeds
from experiments.seal_world import Budget, Edit, Marks
from nested_jax.config import as_dict, check
from nested_jax.data.passages import Passage, load_passages, passages_digest, shuffled_passages
from nested_jax.data.pretrained_tokenizer import load_pretrained_tokenizer
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.loss import next_token_loss
from nested_jax.models.pretrained import load_parameters, read_config
from nested_jax.models.sampling import generate, pad_prompts
from nested_jax.seal.buckets import Candidate, buckets, real_share, round_up
from nested_jax.seal.inner_loop import InnerConfig, make_inner_loop
from nested_jax.seal.lora import LoraConfig, attach, init_lora, merge
from nested_jax.seal.outer_loop import Algorithm, OuterConfig, Samples, digest, make_policy_update
from nested_jax.seal.rewards import GRADERS, REWARDS, Tried
from nested_jax.seal.self_edits import KNOWLEDGE_PROMPTS, InvalidEditError, knowledge_prompt, question_prompt, training_texts
from nested_jax.seal.stages import Stages

PyTree = Any
EXPERIMENT = 'seal_squad'
RESULTS = pathlib.Path(__file__).parent / 'results' / f'{EXPERIMENT}.jsonl'
PROJECTIONS = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')
Setting = Literal['single', 'continued-lora', 'continued-full']
ROWS = 8  # sequences a step of continued pre-training
SEARCH = tuple(Budget(rate, epochs) for rate in (1e-4, 3e-4, 5e-4, 1e-3, 2e-3) for epochs in (1, 5, 10, 15, 20))  # the paper's


@dataclasses.dataclass(frozen=True)
class Args(RunArgs):
    """Have a pre-trained model learn to write its own training data."""

    model: pathlib.Path = tyro.MISSING
    """Folder of the model."""
    data: pathlib.Path = tyro.MISSING
    """Passages of the rounds."""
    test_data: pathlib.Path = tyro.MISSING
    """Passages of the test; the first --tests of them."""
    rounds: int = 2
    """Updates of the writer."""
    contexts: int = 50
    """Passages of a round."""
    each: int = 5
    """Self-edits of a passage."""
    repetitions: int = 3
    """Adapter starts of a self-edit."""
    tests: int = 200
    """Passages of the test."""
    setting: Setting = 'single'
    """What the test updates on: each passage by itself, or all of them in one update of adapters (the paper's first version) or of all
    weights (its second)."""
    prompt: str = 'implications'
    """What the model is asked to write: implications, implications-long, implications-very-long, implications-chain-of-thought, rewrite,
    self-qa or none."""
    grader: str = 'gold_recall'
    """What marks an answer: gold_recall, contains, exact_match or token_f1."""
    learning_rate: float = 1e-3
    """Of an update."""
    epochs: int = 10
    """Of an update, over the sequences of a self-edit and its passage."""
    search: bool = False
    """Try the paper's grid of learning rates and epochs on other passages of --data first."""
    edit_tokens: int = 1024
    """Longest self-edit; the paper allows 8,192."""
    answer_tokens: int = 64
    """Longest answer."""
    together: int = 16
    """Candidates, and prompts, in one program; as many as memory allows."""
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
    """Of the weights and of the computation; adapters are float32."""
    runs: pathlib.Path = pathlib.Path('runs') / EXPERIMENT
    """Folder of the stages."""
    results: pathlib.Path = RESULTS
    """File that a row for each seed is added to."""

    def __post_init__(self):
        super().__post_init__()
        check(self.prompt in KNOWLEDGE_PROMPTS, 'prompt', self.prompt, f'one of {", ".join(KNOWLEDGE_PROMPTS)}')
        check(self.grader in GRADERS, 'grader', self.grader, f'one of {", ".join(GRADERS)}')
        check(self.learning_rate > 0, 'learning_rate', self.learning_rate, 'a number above 0')
        for name in ('epochs', 'edit_tokens', 'answer_tokens', 'together'):
            check(getattr(self, name) >= 1, name, getattr(self, name), 'an integer of at least 1')

    @property
    def inner(self) -> InnerConfig:
        """Shared by all updates."""
        return InnerConfig(lora=LoraConfig(rank=32, alpha=64.0, targets=('query', 'value')))

    @property
    def continued(self) -> OuterConfig:
        """Continued pre-training of all weights."""
        return OuterConfig(learning_rate=7e-5, epochs=1, batch_size=ROWS, schedule='linear', warmup_share=0.03)

    def outer(self, algorithm: Algorithm) -> OuterConfig:
        """Of the writer's update."""
        lora = LoraConfig(rank=64, alpha=128.0, targets=PROJECTIONS)
        return OuterConfig(algorithm=algorithm, learning_rate=3e-4, epochs=2, batch_size=10, lora=lora, schedule='linear')


def main(argv: list[str] | None = None) -> int:
    """Runs the seeds that have no row; returns the exit code."""
    args = parse_arguments(Args, argv, __doc__)
    if args.smoke:
        sizes = dict(rounds=1, contexts=2, each=2, repetitions=2, tests=2, epochs=1, edit_tokens=16, answer_tokens=4, together=4)
        args = dataclasses.replace(args, **sizes, seeds=args.seeds[:1], runs=args.runs / 'smoke')
    try:
        domain = Passages(args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    budgets = SEARCH if args.search else (Budget(args.learning_rate, args.epochs),)
    return run_seeds(EXPERIMENT, args.model.name, args, lambda: domain, domain.config, budgets)


class Passages:
    """Passages with questions and a pre-trained model, a `Domain`. A budget's steps are epochs.

    Raises:
        ValueError, FileNotFoundError: for a folder or file that is not what it should be, or too few passages; before any device work.
    """

    def __init__(self, args: Args):
        self.args, self.shares = args, []
        self._train, self._test = load_passages(args.data), load_passages(args.test_data)
        needed = args.contexts * (args.rounds + args.search)
        check(len(self._train) >= needed, 'data', f'{len(self._train)} passages', f'at least {needed}, rounds and search times contexts')
        check(len(self._test) >= args.tests, 'test_data', f'{len(self._test)} passages', f'at least {args.tests}, as --tests says')
        self._model = LanguageModel(read_config(args.model, dtype=args.dtype, remat='block'))
        self.coder, vocabulary = load_pretrained_tokenizer(args.model), self._model.config.vocab_size
        check(self.coder.vocab_size <= vocabulary, 'model', f'a tokenizer of {self.coder.vocab_size} tokens', f'at most {vocabulary}')
        self._params = load_parameters(args.model, self._model.config, param_dtype=args.dtype)
        self._learn = make_inner_loop(self._model, args.inner)
        self._updates = {name: make_policy_update(self._model, args.outer(name)) for name in args.algorithms}
        self._front = self.coder.encode_prompt('').tolist()  # what the model expects before a text
        self._learn_fully = make_policy_update(self._model, args.continued)
        self.reward = REWARDS[args.grader if args.reward == 'right' else args.reward]
        self._marks = REWARDS[args.grader], REWARDS['log_prob']  # those of `Marks`
        self.test_edits = 1 if args.setting == 'single' else args.each
        self._answers = jax.jit(jax.vmap(self._answer, (None, 0, 0, 0)))
        self._log_probs = jax.jit(jax.vmap(self._log_prob, (None, 0, 0, 0, 0)))

    def config(self, seed: int) -> dict[str, Any]:
        """Everything that decides what a seed's numbers come out as."""
        args = self.args
        files = dict(weights=digest(self._params), data=passages_digest(self._train), test_data=passages_digest(self._test))
        names = ('setting', 'prompt', 'grader', 'learning_rate', 'epochs', 'search', 'edit_tokens', 'answer_tokens', 'dtype')
        settings = {name: getattr(args, name) for name in names} | args.sizes
        parts = dict(model=as_dict(self._model.config), inner=as_dict(args.inner), outer=as_dict(args.outer(args.algorithms[0])))
        return parts | files | settings | dict(seed=seed)

    def start(self, stages: Stages, seed: int) -> PyTree:
        """As published."""
        return self._params

    def texts(self, split: str, count: int, seed: int, index: int = 0) -> list[Passage]:
        """The test's first passages, or those of a round ('dev' being the one after the last), in an order of the seed."""
        if split == 'test':
            return self._test[:count]
        place = self.args.rounds if split == 'dev' else index - 1
        return shuffled_passages(self._train, seed)[place * count : (place + 1) * count]

    def write(self, params: PyTree, texts: list[Passage], each: int, seed: int) -> np.ndarray:
        """Self-edits (C, M, tokens) at temperature 1."""
        prompts = [self._prompt(text) for text in texts for _ in range(each)]
        options = dict(max_new_tokens=self.args.edit_tokens, temperature=1.0, top_p=0.95, stop=self.coder.stop)
        written = []
        for start in range(0, len(prompts), self.args.together):
            part, key = prompts[start : start + self.args.together], jax.random.fold_in(jax.random.key(seed), start)
            tokens, segment_ids = pad_prompts(part + part[:1] * (self.args.together - len(part)), _bucket(part))
            model = self._sized(tokens.shape[1] + self.args.edit_tokens)
            written.append(
                np.asarray(generate(model, {'params': params}, tokens, key=key, segment_ids=segment_ids, **options))[: len(part)]
            )
        return np.concatenate(written).reshape(len(texts), each, -1)

    def update(
        self, algorithm: Algorithm, params: PyTree, texts: list[Passage], edits: np.ndarray, values: np.ndarray, seed: int
    ) -> PyTree:
        """Adapters of the writer."""
        rows = [(self._prompt(text), self._own(edit)) for text, each in zip(texts, edits, strict=True) for edit in each]
        return self._updates[algorithm](params, Samples(*_behind(*zip(*rows, strict=True))), values, seed)

    def advance(self, params: PyTree, learned: PyTree) -> PyTree:
        """The adapters merged into the weights."""
        return merge(params, learned, self.args.outer(self.args.algorithms[0]).lora)

    def ask(self, params: PyTree, texts: list[Passage]) -> Marks:
        """Marks (C, 1)."""
        shapes = jax.eval_shape(lambda params: init_lora(params, jax.random.key(0), self.args.inner.lora), params)
        count = min(self.args.together, len(texts))
        nothing = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape)), shapes)
        found = []
        for start in range(0, len(texts), count):
            part = texts[start : start + count]
            marks = self._mark(params, nothing, part + part[:1] * (count - len(part)))
            found.append([mark[: len(part)] for mark in marks])
        return Marks(*(np.concatenate(marks)[:, None] for marks in zip(*found, strict=True)))

    def learn_and_ask(
        self, params: PyTree, texts: list[Passage], edits: Sequence[Edit | None], budget: Budget, repetitions: Sequence[int]
    ) -> Marks:
        """Marks (C, P); a self-edit that nothing can be learned from gets none."""
        found = np.stack([np.zeros((len(texts), len(repetitions))), np.full((len(texts), len(repetitions)), -np.inf)])
        candidates, places = [], []
        for index, (text, edit) in enumerate(zip(texts, edits, strict=True)):
            try:
                sequences = self._sequences(text, edit)
            except InvalidEditError:
                continue
            steps = budget.steps * len(sequences)
            candidates += [Candidate(sequences, budget.learning_rate, steps, seed) for seed in repetitions]
            places += [(index, place) for place in range(len(repetitions))]
        for part, batch in buckets(candidates, rows_per_step=1, at_most=self.args.together):
            self.shares.append(real_share(batch))
            filled = [*part, *part[:1] * (batch.tokens.shape[0] - len(part))]
            marks = self._mark(params, self._learn(params, batch).adapters, [texts[places[place][0]] for place in filled])
            for place, right, log_prob in zip(part, *marks, strict=False):
                found[(slice(None), *places[place])] = right, log_prob
        return Marks(*found)

    def test(self, params: PyTree, texts: list[Passage], edits: Sequence[Edit | None], budget: Budget, repetitions: Sequence[int]) -> Marks:
        """Marks (C, P); of all texts learned together where the setting is so, at rates and epochs of its own."""
        if self.args.setting == 'single':
            return self.learn_and_ask(params, texts, edits, budget, repetitions)
        sequences = [row for text, edit in zip(texts, edits, strict=True) for row in self._documents(text, edit)]
        learners = (self._continued(params, sequences, seed, with_edits=edits[0] is not None) for seed in repetitions)
        return Marks(*(np.concatenate(marks, 1) for marks in zip(*(self.ask(learner, texts) for learner in learners), strict=True)))

    def tried(self, text: Passage, edit: Edit) -> Tried:
        """In words."""
        return Tried(text.context, self._text(edit))

    def joined(self, edits: np.ndarray) -> Edit:
        """Self-edits between lines of dashes, or the first one of a single passage."""
        if self.args.setting == 'single':
            return edits[0].tolist()
        return self.coder.encode('\n---\n'.join(map(self._text, edits))).tolist()

    def oracle(self, texts: list[Passage], seed: int) -> list[Edit]:
        """The questions of the test with their answers."""
        notes = lambda text: '\n'.join(f'Question {n}: {asked}\nAnswer: {gold}' for n, (asked, gold) in enumerate(text.questions, 1))
        return [self.coder.encode(notes(text)).tolist() for text in texts]

    def shuffled(self, edit: Edit, seed: int) -> Edit:
        """The words of each line dealt out anew among all places."""
        lines = [line.split() for line in self._text(edit).split('\n')]
        order = iter(np.random.default_rng(seed).permutation([word for line in lines for word in line]).tolist())
        return self.coder.encode('\n'.join(' '.join(next(order) for _ in line) for line in lines)).tolist()

    def composition(self, texts: list[Passage], edits: Sequence[Edit]) -> dict[str, Any]:
        """Words and sequences of an edit, the share that cannot be learned from, and coverage: answers whose words it has."""
        written = [self._text(edit) for edit in edits]
        golds = [(asked.answer, edit) for text, edit in zip(texts, written, strict=True) for asked in text.questions]
        invalid = [not edit.strip() for edit in written]
        return dict(
            words=float(np.mean([len(edit.split()) for edit in written])), invalid=float(np.mean(invalid)),
            coverage=float(np.mean([GRADERS['contains'](' '.join(edit.split()), answer) for answer, edit in golds])),
        )  # fmt: skip

    def known(self, params: PyTree) -> float:
        """Share right of the test's questions by the model alone."""
        return float(self.ask(params, self.texts('test', self.args.tests, 0)).right.mean())

    def _sized(self, length: int) -> LanguageModel:
        """The model with room for as many tokens of state."""
        return LanguageModel(dataclasses.replace(self._model.config, max_length=length))

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text from its start; a special token that is spelled out in it is not one."""
        return self._front + self.coder.encode(text).tolist()

    def _prompt(self, text: Passage) -> list[int]:
        return self._encode(knowledge_prompt(self.args.prompt, text.title, text.context))

    def _own(self, edit: Edit | np.ndarray) -> Edit:
        """What the writer wrote, its stop token included."""
        tokens = np.asarray(edit, int).tolist()
        ends = [place for place, token in enumerate(tokens) if token in self.coder.stop]
        return tokens[: ends[0] + 1] if ends else tokens

    def _text(self, edit: Edit) -> str:
        """What stands in a text for the tokens; vocabularies padded beyond the tokenizer's have ids without text."""
        own = [token for token in self._own(edit) if token not in self.coder.stop and token < self.coder.vocab_size]
        return self.coder.decode(own).decode(errors='replace')

    def _continued(self, params: PyTree, sequences: list[tuple[int, ...]], seed: int, *, with_edits: bool) -> PyTree:
        """Parameters that have learned all sequences together."""
        if self.args.setting == 'continued-full':
            return self._learn_fully(params, Samples(*_behind([row[:1] for row in sequences], [row[1:] for row in sequences])),
                                     np.ones(len(sequences)), seed)  # fmt: skip
        steps, rate = 3 * -(-len(sequences) // ROWS), 1e-3 if with_edits else 1e-4
        ((_, batch),) = buckets([Candidate(tuple(sequences), rate, steps, seed)], rows_per_step=ROWS)
        adapters = jax.tree.map(lambda leaf: leaf[0], self._learn(params, batch).adapters)
        return merge(params, adapters, self.args.inner.lora)

    def _documents(self, text: Passage, edit: Edit | None) -> tuple[tuple[int, ...], ...]:
        """What continued pre-training learns of a passage: of an invalid edit the passage alone, since all passages share the update."""
        try:
            return self._sequences(text, edit, split_lines=False)
        except InvalidEditError:
            return self._sequences(text, None)

    def _sequences(self, text: Passage, edit: Edit | None, *, split_lines: bool = True) -> tuple[tuple[int, ...], ...]:
        if edit is None:
            parts = [f'{text.title}\n{text.context.strip()}']
        else:
            parts = training_texts(text.title, text.context, self._text(edit), split_lines=split_lines)
        end = [] if self.coder.end is None else [self.coder.end]
        return tuple((*self._encode(part), *end) for part in parts)

    def _mark(self, params: PyTree, adapters: PyTree, texts: list[Passage]) -> tuple[np.ndarray, np.ndarray]:
        """Shares right and mean log-probabilities of the gold answers, (K,) each, of K adapters asked about a text each."""
        count = round_up(max(len(text.questions) for text in texts))
        asked = [[text.questions[n % len(text.questions)] for n in range(count)] for text in texts]
        prompts = [self._encode(question_prompt(text.title, each.question)) for text, row in zip(texts, asked, strict=True) for each in row]
        golds = [self.coder.encode(f' {each.answer}').tolist() for row in asked for each in row]
        by_text = lambda arrays: (array.reshape(len(texts), count, -1) for array in arrays)
        answers = np.asarray(self._answers(params, adapters, *by_text(pad_prompts(prompts, _bucket(prompts)))))
        log_probs = np.asarray(self._log_probs(params, adapters, *by_text(_behind(prompts, golds))))
        tried = []
        for text, written, log in zip(texts, answers, log_probs, strict=True):
            own = slice(len(text.questions))
            golds = [each.answer for each in text.questions]
            tried.append(Tried(text.context, golds=golds, answers=[self._text(answer) for answer in written[own]], log_probs=log[own]))
        return tuple(np.array(list(map(reward.mark, tried))) for reward in self._marks)

    def _answer(self, params: PyTree, adapters: PyTree, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """(Q, T) prompts -> (Q, answer_tokens) of the likeliest tokens."""
        options = dict(max_new_tokens=self.args.answer_tokens, temperature=0.0, stop=self.coder.stop, segment_ids=segment_ids)
        model = self._sized(tokens.shape[1] + self.args.answer_tokens)
        return generate(model, attach(params, adapters, self.args.inner.lora), tokens, key=jax.random.key(0), **options)

    def _log_prob(self, params: PyTree, adapters: PyTree, tokens: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """(Q, T) -> (Q,) mean log-probability of the targets of weight 1."""
        hidden, _ = self._model.apply(attach(params, adapters, self.args.inner.lora), tokens, method='hidden')
        loss = lambda hidden, targets, weights: next_token_loss(hidden, self._model.head(params), targets, weights)
        return -jax.vmap(loss)(hidden, targets, weights) / weights.sum(1)


def _bucket(rows: Sequence[Sequence[int]], multiple: int = 64) -> int:
    """Length of the longest, rounded up so that few programs are compiled."""
    return multiple * -(-max(map(len, rows)) // multiple)


def _behind(prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, targets and weights (N, T) of texts behind their prompts; weights are 1 where the target is the text's own."""
    rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    length = _bucket(rows)
    tokens, weights = np.zeros((len(rows), length + 1), np.int32), np.zeros((len(rows), length), np.float32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        tokens[row, : len(prompt) + len(text)] = prompt + text
        weights[row, len(prompt) - 1 : len(prompt) + len(text) - 1] = 1.0
    return tokens[:, :-1], tokens[:, 1:], weights


if __name__ == '__main__':
    sys.exit(main())
