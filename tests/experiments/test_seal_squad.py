"""SEAL with a pre-trained model: a tiny checkpoint from the command line, its parts, and bad input."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import seal_squad
from experiments.seal_world import Budget
from nested_jax.config import AttentionConfig, LevelConfig, ModelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.models.pretrained import load_parameters, read_config, save_pretrained
from nested_jax.models.sampling import generate
from nested_jax.seal.buckets import Candidate
from nested_jax.seal.inner_loop import learn_all
from nested_jax.seal.lora import merge
from nested_jax.seal.outer_loop import learning_rates
from nested_jax.seal.rewards import REWARDS, graded
from tests.data.test_pretrained_tokenizer import make
from tests.models.small_models import random_params

CONFIG = ModelConfig(
    mixer='attention', num_layers=2, width=16, num_heads=2, head_dim=8, levels=(LevelConfig(24, 2048),), vocab_size=300, max_length=2048,
    attention=AttentionConfig(num_kv_heads=1, qkv_bias=True),
)  # fmt: skip
TEXTS = ['the quick dogs and the lazy fox', 'the other dog', 'a fox and the other fox and the quick dog']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model with its tokenizer, and passages."""
    folder = make(tmp_path_factory.mktemp('model'), first='<|begin_of_text|>')
    save_pretrained(folder, CONFIG, random_params(LanguageModel(CONFIG), dtype=np.float32))
    fields = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(fields | dict(eos_token_id=290)))
    ask = lambda text: [dict(question=f'who is {word}?', answer=word) for word in text.split()[1:3]]
    passages = [dict(title=f'dogs {n}', context=text, questions=ask(text)) for n, text in enumerate(TEXTS)]
    (folder / 'passages.json').write_text(json.dumps(passages))
    return folder


def arguments(folder, **changes) -> seal_squad.Args:
    data = folder / 'passages.json'
    sizes = dict(
        rounds=1, contexts=2, each=2, repetitions=2, tests=3, epochs=2, edit_tokens=8, answer_tokens=4, together=2, dtype='float32'
    )
    return seal_squad.Args(**(dict(model=folder, data=data, test_data=data) | sizes | changes))


@pytest.fixture(scope='module')
def domain(folder):
    return seal_squad.Passages(arguments(folder))


@pytest.mark.slow
def test_it_runs_from_the_command_line(folder, tmp_path, capsys):
    data = str(folder / 'passages.json')
    places = ['--runs', str(tmp_path / 'runs'), '--results', str(tmp_path / 'rows.jsonl')]
    run = lambda model: seal_squad.main(['--smoke', '--model', model, '--data', data, '--test-data', data, '--dtype', 'float32', *places])
    assert run(str(folder)) == 0
    said = capsys.readouterr().out
    assert all(arm in said for arm in ('base', 'passage only', 'shuffled', 'best of 2', 'oracle', 'rest-em, round 1', 'random, round 1'))
    assert list(tmp_path.rglob('arms.png')) and not (tmp_path / 'rows.jsonl').exists()
    assert run(str(tmp_path)) == 2 and 'config.json' in capsys.readouterr().err


def test_marks_are_those_of_a_model_updated_by_itself(domain):
    texts, edit = domain.texts('test', 3, 0), domain.coder.encode('the fox\nquick dogs').tolist()
    params, budget = domain.start(None, 0), Budget(3e-2, 3)
    marks = domain.learn_and_ask(params, texts, [edit, None, domain.coder.encode(' \n').tolist()], budget, [5, 6])
    assert marks.right.shape == (3, 2) and (marks.right[2] == 0).all() and np.isneginf(marks.log_prob[2]).all()
    sequences = domain._sequences(texts[0], edit)
    assert [domain.coder.decode(each).decode().split('\n') for each in sequences] == [
        ['dogs 0', 'the fox'], ['dogs 0', 'quick dogs'], ['dogs 0', TEXTS[0]],
    ]  # fmt: skip
    candidate = Candidate(sequences, budget.learning_rate, 3 * len(sequences), seed=6)
    updated = merge(params, learn_all(domain._learn, params, [candidate], rows_per_step=1)[0], domain.args.inner.lora)
    expected = []
    for asked in texts[0].questions:
        prompt = domain._encode(seal_squad.question_prompt(texts[0].title, asked.question))
        gold = domain.coder.encode(f' {asked.answer}').tolist()
        logits, _ = LanguageModel(CONFIG).apply({'params': updated}, jnp.asarray([prompt + gold]))
        log = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
        expected.append(log[np.arange(len(gold)), gold].mean())
    np.testing.assert_allclose(marks.log_prob[0, 1], np.mean(expected), rtol=1e-4)
    assert marks.log_prob[0, 1] != pytest.approx(domain.ask(params, texts[:1]).log_prob[0, 0], rel=1e-3)


def test_self_edits_and_answers_are_what_the_model_writes(domain, monkeypatch):
    texts, params = domain.texts('test', 3, 0), domain.start(None, 0)
    edits = domain.write(params, texts, 2, 0)
    assert edits.shape == (3, 2, 8)
    np.testing.assert_array_equal(edits, domain.write(params, texts, 2, 0))
    assert (edits != domain.write(params, texts, 2, 1)).any()
    asked = texts[0].questions[0]
    prompt = jnp.asarray([domain._encode(seal_squad.question_prompt(texts[0].title, asked.question))])
    answer = generate(LanguageModel(CONFIG), {'params': params}, prompt, key=jax.random.key(0), max_new_tokens=4, temperature=0.0, stop=290)
    found = domain._text(answer[0].tolist())
    heard = graded(lambda said, gold: float(said == found and gold == asked.answer))
    monkeypatch.setattr(domain, '_marks', (heard, domain._marks[1]))
    assert domain.ask(params, texts[:1]).right[0, 0] == 0.5


def test_the_reward_is_chosen_by_name(folder, domain, monkeypatch):
    """The rubric reads an edit beside its passage; a grader and the log-probability are of what an updated model answers."""
    monkeypatch.setattr(seal_squad, 'load_parameters', lambda *_, **__: {})
    named = lambda **changes: seal_squad.Passages(arguments(folder, **changes))
    assert domain.reward is REWARDS['gold_recall'] and named(grader='contains').reward is REWARDS['contains']
    assert named(reward='log_prob').reward is REWARDS['log_prob'] and named(reward='rubric').reward is REWARDS['rubric']
    tried = domain.tried(domain.texts('test', 1, 0)[0], np.array([*domain.coder.encode('the fox'), 290, 5]))
    assert tried == (TEXTS[0], 'the fox', (), (), ())


def test_the_writer_learns_what_is_chosen(domain):
    texts, params = domain.texts('test', 3, 0), domain.start(None, 0)
    edits = domain.write(params, texts, 2, 0)
    values = np.array([1.0, 0, 0, 0, 0, 0])
    learned = domain.advance(params, domain.update('rest-em', params, texts, edits, values, 0))
    prompt, own = domain._prompt(texts[0]), domain._own(edits[0, 0])

    def log_prob(params) -> float:
        logits, _ = LanguageModel(CONFIG).apply({'params': params}, jnp.asarray([prompt + own]))
        return float(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])[np.arange(len(own)), own].sum())

    assert log_prob(learned) > log_prob(params)


def test_learning_rates_of_the_updates_are_those_of_the_published_code(folder):
    """200 passages with five self-edits each are 1,200 sequences, 150 steps of all weights of which 5 rise; 50 winners are 10 steps."""
    args, steps = arguments(folder), np.arange(150)
    rates = np.array([float(learning_rates(args.continued, 150)(step)) for step in steps])
    np.testing.assert_allclose(rates, 7e-5 * np.minimum(steps / 5, (150 - steps) / 145), rtol=1e-5)
    rates = [float(learning_rates(args.outer('rest-em'), 10)(step)) for step in range(10)]
    np.testing.assert_allclose(rates, 3e-4 * (1 - np.arange(10) / 10), rtol=1e-5)


@pytest.mark.parametrize('setting', ['continued-lora', 'continued-full'])
def test_continued_pretraining_learns_all_passages_together(folder, setting):
    domain = seal_squad.Passages(arguments(folder, setting=setting))
    texts, params = domain.texts('test', 3, 0), domain.start(None, 0)
    first, second = (domain.coder.encode(text).tolist() for text in ('the fox\nthe dog', 'quick\n dogs'))
    edit = domain.joined(np.array([each + [290] * (12 - len(each)) for each in (first, second)]))
    assert [len(domain._documents(texts[0], part)) for part in (edit, None, [])] == [3, 1, 1]
    marks = domain.test(params, texts, [edit] * 3, Budget(1.0, 1), [0, 1])
    assert marks.right.shape == (3, 2) and np.isfinite(marks.log_prob).all()
    assert (np.abs(marks.log_prob - domain.ask(params, texts).log_prob) > 1e-6).all()


def test_controls_and_composition(domain):
    texts, edit = domain.texts('test', 3, 0), domain.coder.encode('the fox and\nquick dogs').tolist()
    mixed = domain._text(domain.shuffled(edit, 0))
    assert sorted(mixed.split()) == sorted('the fox and quick dogs'.split()) and [len(line.split()) for line in mixed.split('\n')] == [3, 2]
    oracle = domain.oracle(texts, 0)
    told = domain.composition(texts, oracle)
    assert told['coverage'] == 1 and told['invalid'] == 0
    assert len(domain._sequences(texts[0], oracle[0])) == 3
    assert domain.composition(texts, [[], *oracle[1:]])['invalid'] == pytest.approx(1 / 3)


def test_rounds_and_search_have_passages_of_their_own(folder):
    domain = seal_squad.Passages(arguments(folder, contexts=2, rounds=1))
    assert domain.texts('train', 2, 0, 1) == domain.texts('train', 2, 0, 1) and len(domain.texts('train', 2, 0, 1)) == 2
    with pytest.raises(ValueError, match=r"data is '3 passages', allowed is at least 4"):
        seal_squad.Passages(arguments(folder, search=True))
    with pytest.raises(ValueError, match=r"test_data is '3 passages', allowed is at least 9"):
        seal_squad.Passages(arguments(folder, tests=9))


@pytest.mark.parametrize(
    ('name', 'value'),
    [('prompt', 'x'), ('grader', 'x'), ('reward', 'x'), ('epochs', 0), ('learning_rate', 0.0), ('together', 0)],
)
def test_bad_arguments_are_named(folder, name, value):
    with pytest.raises(ValueError, match=f'{name} is .*allowed is'):
        arguments(folder, **{name: value})


def edited(name: str, **fields):
    """Changes fields of a JSON file in a folder; those of None go."""

    def change(folder: pathlib.Path) -> None:
        path = folder / name
        changed = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))

    return change


def written(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def without_a_shard(folder: pathlib.Path) -> None:
    params = load_parameters(folder, read_config(folder))
    (folder / 'model.safetensors').unlink()
    save_pretrained(folder, read_config(folder), params, max_shard_bytes=20_000)
    sorted(folder.glob('model-*.safetensors'))[1].unlink()


def cut_short(folder: pathlib.Path) -> None:
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def unasked(folder: pathlib.Path) -> None:
    passages = json.loads((folder / 'passages.json').read_text())
    passages[1]['questions'] = []
    (folder / 'passages.json').write_text(json.dumps(passages))


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (removed('config.json'), r'config\.json is not there'),
        (written('config.json', '{'), r'config\.json is not JSON'),
        (edited('config.json', model_type='gpt2'), r"config\.json: model_type is 'gpt2', allowed is one of .*qwen2"),
        (edited('config.json', architectures=['GPT2LMHeadModel']), r"architectures is \['GPT2LMHeadModel'\], allowed is"),
        (edited('config.json', hidden_size=None), r'hidden_size is None, allowed is an integer'),
        (edited('config.json', num_attention_heads=3), r'shape of .*o_proj\.weight is \(16, 16\), allowed is \(16, 24\)'),
        (edited('config.json', num_hidden_layers=3), r'tensors that are missing is .*layers\.2\.'),
        (without_a_shard, r'model-00002-of-.* is not there: model\.safetensors\.index\.json names \d+ shards'),
        (removed('model.safetensors'), r'has no weights, allowed is'),
        (cut_short, r'is not a whole safetensors file'),
        (removed('tokenizer.json'), r'tokenizer\.json is not there'),
        (written('tokenizer.json', '{'), r'tokenizer\.json'),
        (written('tokenizer.json', '{}'), r'tokenizer\.json|byte-level BPE'),
        (written('generation_config.json', '{'), r'generation_config\.json is no JSON object'),
        (written('generation_config.json', '[]'), r'generation_config\.json is no JSON object'),
        (unasked, r"passage 1 \('dogs 1'\) has no questions, allowed is"),
        (written('passages.json', '[]'), r'has no passages'),
        (written('passages.json', '[{"title": "dogs"}]'), r'is not of SQuAD'),
        (written('passages.json', b'\xff'), r'is not of SQuAD'),
        (removed('passages.json'), r'passages\.json is not there'),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line_before_any_training(folder, tmp_path, capsys, spoil, said):
    spoiled = tmp_path / 'model'
    shutil.copytree(folder, spoiled)
    spoil(spoiled)
    data = str(spoiled / 'passages.json')
    places = ['--runs', str(tmp_path / 'runs'), '--results', str(tmp_path / 'rows.jsonl')]
    sizes = '--rounds 1 --contexts 2 --each 2 --tests 2 --dtype float32'.split()
    assert seal_squad.main(['--model', str(spoiled), '--data', data, '--test-data', data, *sizes, *places]) == 2
    complaint = capsys.readouterr()
    assert complaint.err.count('\n') == 1 and re.search(said, complaint.err), complaint.err
    assert not complaint.out and {path.name for path in tmp_path.iterdir()} == {'model'}
