"""The experiment from its command line: a smoke run, going on after an interrupt or a kill, and bad input."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import seal_knowledge, seal_runs, seal_squad, seal_world
from experiments.seal_world import PROTOTYPE, Marks
from nested_jax.seal.outer_loop import StaleRewardsError, digest
from nested_jax.seal.stages import Stages

ROOT, RNG = pathlib.Path(__file__).parents[2], np.random.default_rng(0)
STAGES = ('edits', 'rewards-0', 'writer', 'test')
POINTS = (
    ('edits', 'begun'), ('rewards-0', 'begun'), ('rewards-0', 'asked'), ('writer', 'begun'), ('writer', 'written'), ('test', 'begun'),
)  # fmt: skip


def stored(folder: pathlib.Path) -> dict[str, bytes]:
    """Every stage below a folder, byte for byte."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*.stage')}


def test_smoke_run_goes_on_where_it_was_stopped_and_stores_no_row(tmp_path, capsys, monkeypatch):
    ways = ('rest-em', 'random', 'grpo')
    places = ('--runs', str(tmp_path / 'runs'), '--results', str(tmp_path / 'rows.jsonl'))
    smoke = lambda: seal_knowledge.main(['--smoke', *places, '--algorithms', *ways])
    make = Stages.__call__

    def stopping(self, name, compute):
        if name.endswith('rest-em-1/writer'):
            raise KeyboardInterrupt
        return make(self, name, compute)

    monkeypatch.setattr(Stages, '__call__', stopping)
    assert smoke() == 130 and 'the same command goes on' in capsys.readouterr().out
    before = stored(tmp_path / 'runs')
    monkeypatch.setattr(Stages, '__call__', make)
    assert smoke() == 0
    said, after = capsys.readouterr().out, stored(tmp_path / 'runs')
    assert before and before.items() < after.items()
    assert all(arm in said for arm in ('base', 'passage only', 'shuffled', 'best of 2', 'oracle', *(f'{way}, round 1' for way in ways)))
    assert "the paper's order" in said and not (tmp_path / 'rows.jsonl').exists() and list(tmp_path.rglob('arms.png'))


@pytest.mark.parametrize('form', [['--model', '{}'], ['--model={}']], ids=['word', 'equals'])
def test_with_a_model_the_arguments_are_those_of_seal_squad(tmp_path, capsys, monkeypatch, form):
    model = [word.format(tmp_path / 'model') for word in form]
    words = ['--data', str(tmp_path / 'train.json'), '--tests', '3', *model, '--test-data', str(tmp_path / 'test.json')]
    asked = []

    def passages(args):
        asked.append(args)
        raise FileNotFoundError('no passages')

    monkeypatch.setattr(seal_squad, 'Passages', passages)
    assert seal_knowledge.main(words) == 2 and 'no passages' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', ['seal_knowledge', *words])
    assert seal_knowledge.main() == 2
    expected = dict(model=tmp_path / 'model', data=tmp_path / 'train.json', test_data=tmp_path / 'test.json', tests=3)
    assert asked == [seal_squad.Args(**expected)] * 2
    with pytest.raises(SystemExit):
        seal_knowledge.main([*model, '--help'])
    assert '--answer-tokens' in capsys.readouterr().out


def test_its_own_help_names_the_other_setting(capsys):
    with pytest.raises(SystemExit):
        seal_knowledge.main(['--help'])
    said = capsys.readouterr().out
    assert '--model FOLDER' in said and '--learner' in said and '--answer-tokens' not in said


# Says which stages a process computed, a line each. Within one that is named it dies: a moment after it began to make it, when the first
# candidates have answered and no other was tried, or when all is written and not yet renamed.
COUNTED = """
import os, pathlib, signal, sys, threading, time
from experiments import seal_knowledge, seal_world
from nested_jax.seal.stages import Stages
within, point, list_of_stages = (sys.argv.pop(1) for _ in range(3))
call, init, ends = Stages.__call__, seal_world.Reader.__init__, set()
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def asking(self, *arguments, **options):
    init(self, *arguments, **options)
    ask = self._ask
    self._ask = lambda *arguments: (ask(*arguments), 'asked' in ends and die())[0]

def counted(self, name, make):
    def dying():
        threading.Timer(0.05, die).start()
        make()
        time.sleep(60)
    if name.endswith(within):
        ends.add(point)
    if 'written' in ends:
        pathlib.Path.replace = die
    before = self.computed
    found = call(self, name, dying if 'begun' in ends else make)
    if self.computed > before:
        with open(list_of_stages, 'a') as file:
            print(name, file=file)
    return found

Stages.__call__, seal_world.Reader.__init__ = counted, asking
sys.exit(seal_knowledge.main(sys.argv[1:]))
"""


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """Starts a smoke run in a folder by its name, and says where that is."""
    folder = tmp_path_factory.mktemp('runs')
    environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

    def started(name: str, program: tuple[str, ...] = ('-m', 'experiments.seal_knowledge')) -> tuple[subprocess.Popen, pathlib.Path]:
        command = [sys.executable, *program, '--smoke', '--runs', str(folder / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT), folder / name

    return started


@pytest.fixture(scope='module')
def whole(start):
    """Stages of a run that nothing happens to."""
    process, folder = start('whole')
    assert process.wait(300) == 0
    return stored(folder)


@pytest.mark.exhaustive
def test_killed_after_every_stage_it_ends_bit_equal(start, whole):
    for stage, number in zip(STAGES, 2 * (signal.SIGKILL, signal.SIGTERM), strict=True):
        process, folder = start('after')
        while process.poll() is None and not list(folder.glob(f'**/rest-em-1/{stage}.stage')):
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() == -number, stage
    process, folder = start('after')
    assert process.wait(300) == 0 and stored(folder) == whole


@pytest.mark.exhaustive
def test_killed_within_every_stage_it_does_each_once(start, whole, tmp_path):
    """R7: while self-edits are written, tried, learned from and tested. A stage counts once it is stored: no candidate is tried twice."""
    done = tmp_path / 'stages'
    for stage, point in POINTS:
        process, folder = start('within', ('-c', COUNTED, f'rest-em-1/{stage}', point, str(done)))
        assert process.wait(300) == -signal.SIGKILL, stage
        assert not list(folder.glob(f'**/rest-em-1/{stage}.stage'))
    process, folder = start('within', ('-c', COUNTED, 'none', 'begun', str(done)))
    assert process.wait(300) == 0 and stored(folder) == whole
    computed = done.read_text().split()
    assert len(computed) == len(set(computed)) == len(whole)
    assert {f'{name}.stage' for name in computed} == {path.split('/', 2)[-1] for path in whole}


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.slow
def test_dead_in_the_middle_of_a_stage_it_does_each_once(tmp_path, monkeypatch):
    """R7 in one process, dead by an exception: when self-edits are written, an inner loop has learned, the first candidates have answered,
    and before the policy has its name. It ends as the run that nothing happened to; no stage, so no candidate, counts twice.
    """
    run = lambda name: seal_knowledge.main(['--smoke', '--algorithms', 'rest-em', '--runs', str(tmp_path / name)])
    assert run('whole') == 0
    whole, call, init, computed, ends = stored(tmp_path / 'whole'), Stages.__call__, seal_world.Reader.__init__, [], set()

    def then_die(point, inner):
        def wrapped(*arguments):
            found = inner(*arguments)
            if point in ends:
                raise Killed
            return found

        return wrapped

    def reading(self, *arguments, **options):
        init(self, *arguments, **options)
        self._learn, self._ask = then_die('learned', self._learn), then_die('asked', self._ask)

    monkeypatch.setattr(seal_world.Reader, '__init__', reading)
    for stage, point in (('edits', 'made'), ('rewards-0', 'learned'), ('rewards-0', 'asked'), ('writer', 'written'), (None, None)):

        def counted(self, name, make, stage=stage, point=point):
            ends.update({point} if name.endswith(f'rest-em-1/{stage}') else ())
            before = self.computed
            with monkeypatch.context() as patch:
                patch.setattr(pathlib.Path, 'replace', then_die('written', lambda *_: None) if 'written' in ends else pathlib.Path.replace)
                found = call(self, name, then_die('made', make))
            computed.extend([name] * (self.computed - before))
            return found

        monkeypatch.setattr(Stages, '__call__', counted)
        ends.clear()
        if stage is None:
            assert run('dead') == 0
            break
        with pytest.raises(Killed):
            run('dead')
        assert point in ends and not list((tmp_path / 'dead').glob(f'**/rest-em-1/{stage}.stage'))
    assert stored(tmp_path / 'dead') == whole
    assert len(computed) == len(set(computed)) == len(whole)


def test_stored_rewards_of_another_learner_are_refused(tmp_path):
    args = seal_knowledge.Args()
    run = seal_runs.Run(seal_knowledge.People(args), args, 0, Stages(tmp_path))
    params, texts, edits = {'w': np.ones(3)}, run.test_texts()[:2], np.zeros((2, 3, 8), np.int32)
    store = lambda name, learner: run.stages(f'{name}-0', lambda: dict(right=np.ones((6, 2)), log_prob=np.zeros((6, 2)), learner=learner))
    store('own', np.array(digest(params)))
    assert run.rewards('own', params, texts, edits, PROTOTYPE).right.shape == (2, 3, 2)
    store('other', np.array(digest({'w': np.zeros(3)})))
    with pytest.raises(StaleRewardsError, match='rewards are of learner'):
        run.rewards('other', params, texts, edits, PROTOTYPE)


def test_halving_tries_only_the_better_half_again_and_chooses_among_it(tmp_path, monkeypatch):
    args = seal_knowledge.Args(halving=True, contexts=3, each=4, repetitions=3)
    people, asked = seal_knowledge.People(args), []
    texts, edits = people.texts('train', 3, 0), np.arange(12, dtype=np.int32).reshape(3, 4, 1)
    first, again = np.array([3, 2, 1, 0, 0, 1, 2, 3, 1, 3, 0, 2]), np.arange(12) / 12 - 0.5  # rewards by edit

    def learn_and_ask(params, texts, edits, budget, repetitions):
        asked.append(([int(edit[0]) for edit in edits], list(repetitions)))
        right = np.array([[first[edit[0]] if seed == 0 else again[edit[0]] for seed in repetitions] for edit in edits])
        return Marks(right, right - 1)

    monkeypatch.setattr(people, 'learn_and_ask', learn_and_ask)
    run, params = seal_runs.Run(people, args, 0, Stages(tmp_path)), {'w': np.ones(3)}
    marks = run.rewards('rewards', params, texts, edits, PROTOTYPE)
    kept = [0, 1, 6, 7, 9, 11]
    assert asked == [(list(range(12)), [0]), (kept, [1, 2])]
    assert np.flatnonzero(np.isfinite(marks.right).all(2)).tolist() == kept

    monkeypatch.setattr(people, 'ask', lambda *_: Marks(np.zeros((3, 1)), np.zeros((3, 1))))
    chosen = {}
    monkeypatch.setattr(people, 'update', lambda *given: chosen.update(values=given[-2]) or params)
    monkeypatch.setattr(people, 'texts', lambda *_: texts)
    monkeypatch.setattr(run, 'edits', lambda *_: edits)
    told = run.round(params, PROTOTYPE, 'rest-em', 1, 'one')[1]
    assert np.flatnonzero(chosen['values']).tolist() == [0, 7, 9] and told['trained_on'] == 3
    assert told['mean'] == pytest.approx(np.where(np.isin(np.arange(12), kept), (first + 2 * again) / 3, first).mean())
    with pytest.raises(ValueError, match='halving is True, allowed is False with grpo'):
        seal_knowledge.Args(halving=True, algorithms=('rest-em', 'grpo'))


@pytest.fixture
def one_round(tmp_path, monkeypatch):
    """Runs a round of three passages with four self-edits each, the second, third and fourth the oracle of its passage.

    Takes what `learn_and_ask` and `ask` find; returns the values (12,) in the writer's update, and what is told.
    """

    def make(found: Marks | None, base: Marks | None, **changes) -> tuple[np.ndarray, dict]:
        args = seal_knowledge.Args(contexts=3, each=4, **changes)
        people, params, chosen = seal_knowledge.People(args), {'w': np.ones(3)}, {}
        texts = people.texts('train', 3, 0)
        written = [[people.world.note(RNG, text.person, 'off-topic') for _ in range(4)] for text in texts]
        for place, (edits, text) in enumerate(zip(written, texts, strict=True), 1):
            edits[place] = people.world.oracle(RNG, text.person)
        longest = max(len(edit) for edits in written for edit in edits)
        edits = np.array([[edit + [0] * (longest - len(edit)) for edit in edits] for edits in written])
        monkeypatch.setattr(people, 'learn_and_ask', lambda *_: found)
        monkeypatch.setattr(people, 'ask', lambda *_: base)
        monkeypatch.setattr(people, 'update', lambda *given: chosen.update(values=given[-2]) or params)
        monkeypatch.setattr(people, 'texts', lambda *_: texts)
        run = seal_runs.Run(people, args, 0, Stages(tmp_path / args.algorithms[0]))
        monkeypatch.setattr(run, 'edits', lambda *_: edits)
        told = run.round(params, PROTOTYPE, args.algorithms[0], 1, 'one')[1]
        return chosen['values'], told

    return make


def test_the_likeliest_answers_are_rewarded_and_an_invalid_edit_earns_the_least(one_round):
    log_prob = np.log(np.array([[2, 3], [4, 1], [9, 1], [1, 1], [1, 2], [9, 8], [8, 8], [3, 3], [5, 5], [4, 4], [6, 6], [7, 7]]) / 10)
    log_prob[[2, 11]] = -np.inf
    base = Marks(np.ones((3, 1)), np.log([[0.3], [0.9], [0.2]]))
    found = Marks(np.arange(24).reshape(12, 2) / 24, log_prob)
    values, told = one_round(found, base, reward='log_prob')
    assert np.flatnonzero(values).tolist() == [10] and told['best'] == pytest.approx(np.log([0.06**0.5, 0.72**0.5, 0.6]).mean())
    values, _ = one_round(found, base, reward='log_prob', algorithms=('dr-grpo',))
    valid = np.log([0.2, 0.3, 0.4, 0.1, 0.1, 0.1])
    mean = (valid.sum() / 2 + np.log(0.1)) / 4
    assert values[2] == pytest.approx(np.log(0.1) - mean) and np.isfinite(values).all()
    assert values[11] == pytest.approx(np.log(0.2) - np.log([0.5, 0.4, 0.6, 0.2]).mean()), 'no better than no edit at all'


def test_the_rubric_chooses_without_an_update(one_round):
    values, told = one_round(None, None, reward='rubric')
    assert np.flatnonzero(values).tolist() == [1, 6, 11] and told['best'] > told['mean'] > 4 and 'reliability' not in told


def test_what_is_rewarded_is_part_of_the_configuration_where_it_is_not_the_default():
    assert 'reward' not in seal_knowledge.Args().sizes and seal_knowledge.Args(reward='rubric').sizes['reward'] == 'rubric'
    with pytest.raises(ValueError, match='halving is True, allowed is False with the reward rubric'):
        seal_knowledge.Args(halving=True, reward='rubric')


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('reward', 'gold'),
        ('rounds', 0),
        ('contexts', 1),
        ('each', 1),
        ('repetitions', 1),
        ('tests', 1),
        ('seeds', ()),
        ('pretraining_steps', 1),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*allowed is'):
        seal_knowledge.Args(**{name: value})


def test_what_the_report_says_of_the_order():
    arms = {name: dict(right=[mean]) for name, mean in {'base': 0.1, 'passage only': 0.2, 'untrained self-edit': 0.3}.items()}
    assert 'reproduced' in seal_runs.order(arms | {'rest-em, round 1': dict(right=[0.2]), 'rest-em, round 2': dict(right=[0.4])})
    assert 'not reproduced' in seal_runs.order(arms | {'rest-em, round 1': dict(right=[0.3])})


def test_differences_are_paired():
    untrained = np.random.default_rng(0).uniform(size=50)
    found = seal_runs.summary({'untrained self-edit': untrained, 'base': untrained - 0.25})
    np.testing.assert_allclose(found['base']['above_untrained'], [-0.25] * 3)
    low, high = found['base']['right'][1:]
    assert high - low > 0.05
