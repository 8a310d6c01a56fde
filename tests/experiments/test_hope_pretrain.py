"""The main job as a user meets it: a process, its output, its exit code and what it leaves behind."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import hope_pretrain
from nested_jax.config import InSequenceConfig
from nested_jax.evaluation.rows import read_rows
from nested_jax.models import sampling
from nested_jax.training import loop
from nested_jax.training.config import lock_folder
from nested_jax.training.metrics import read_metrics
from tests.training.stored import stored_arrays

ROOT = pathlib.Path(__file__).parents[2]
TINY = (
    '--model.preset transformer-tiny --train.batch-size 2 --train.sequence-length 32 --train.warmup-steps 1 --train.eval-tokens 64'.split()
)


@pytest.fixture(scope='module', autouse=True)
def compilations_on_disk(tmp_path_factory):
    """Processes of one shape compile once between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('compilations')))
        patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
        yield


def start(*arguments, **settings):
    environment = os.environ | dict(JAX_NUM_CPU_DEVICES='1', JAX_PLATFORMS='cpu', XLA_FLAGS='') | settings
    command = [sys.executable, '-m', 'experiments.hope_pretrain', *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processor_seconds():
    """Of all processes that this one has waited for; unlike time by the clock, no other work on the machine adds to it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*arguments, **settings):
    """(exit code, standard output, standard error, processor seconds) of a finished process."""
    began = processor_seconds()
    process = start(*arguments, **settings)
    said, complained = process.communicate(timeout=300)
    return process.returncode, said, complained, processor_seconds() - began


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('texts')
    for number in range(60):
        (folder / f'{number}.txt').write_text(f'This is document {number}. ' * 20)
    return folder


def test_rows_of_a_changed_model_have_a_name_of_their_own():
    from experiments.hope_pretrain import parse

    changes = (
        [],
        ['--model.without', 'dgd', 'cms'],
        ['--model.decay-to', 'zero'],
        ['--model.in-sequence.blocks', '0', '2', '--model.periods', '32', '64'],
        ['--model.in-sequence.blocks', '1', '--model.in-sequence.variant', 'nested', '--model.in-sequence.bptt', '2'],
        ['--model.qk-norm'],
        ['--model.dropout', '0.1'],
        ['--model.matrix-memories', 'key', 'value'],
        ['--model.nested-levels'],
    )
    assert [parse(arguments).model.name.removeprefix('hope-linear-tiny') for arguments in changes] == [
        '', ' without dgd without cms', ' decaying to zero',
        ' with periods 32 64 learning in sequence in blocks 0 2', ' learning in sequence in blocks 1 variant nested bptt 2',
        ' with QK-norm', ' with dropout 0.1', ' with matrices key value', ' with nested levels',
    ]  # fmt: skip


def test_qk_norm_and_dropout_reach_the_model_and_the_configuration(texts, tmp_path):
    rest = ['--data.corpus', str(texts), '--train.batch-size', '8', '--train.output']
    for number, flags in enumerate(([], ['--model.qk-norm', '--model.dropout', '0.1'])):
        args = hope_pretrain.parse(['--model.preset', 'transformer-tiny', *flags, *rest, str(tmp_path / str(number))])
        model, _, settings = hope_pretrain.prepare(args)
        assert model.attention.qk_norm is bool(flags)
        assert settings['model']['attention'].get('qk_norm', False) is bool(flags)
        assert model.dropout == settings['model'].get('dropout', 0.0) == (0.1 if flags else 0.0)


def test_memories_of_both_kinds_reach_the_model(texts, tmp_path):
    flags = ['--model.preset', 'hope-tiny', '--model.matrix-memories', 'key', 'alpha', '--train.batch-size', '8']
    model, _, settings = hope_pretrain.prepare(
        hope_pretrain.parse([*flags, '--data.corpus', str(texts), '--train.output', str(tmp_path / 'run')])
    )
    assert model.memory.matrix_memories == settings['model']['memory']['matrix_memories'] == ('key', 'alpha')


def test_levels_that_learn_within_sequences_reach_the_model(texts, tmp_path):
    flags = ['--model.periods', '32', '128', '--model.in-sequence.blocks', '3', '--model.in-sequence.learning-rate', '0.1']
    args = hope_pretrain.parse([*flags, '--train.batch-size', '8', '--data.corpus', str(texts), '--train.output', str(tmp_path / 'run')])
    model, _, settings = hope_pretrain.prepare(args)
    assert [level.period for level in model.levels] == [level['period'] for level in settings['model']['levels']] == [32, 128]
    assert model.in_sequence == InSequenceConfig(blocks=(3,), learning_rate=0.1)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model.matrix-memories', 'key'], r"memory\.matrix_memories is \('key',\), allowed is none but with"),
        (['--model.preset', 'transformer-tiny', '--model.nested-levels'], r'nested_levels is True, allowed is False with one level'),
        (['--model.periods', '32'], r'periods is \(32,\), allowed is one for each level: 2'),
        (['--model.in-sequence.bptt', '2'], r'in_sequence\.blocks is \(\), allowed is block numbers'),
        (['--model.in-sequence.blocks', '0', '--model.in-sequence.bptt', '0'], r'in_sequence\.bptt is 0'),
        (['--model.in-sequence.blocks', '0', '--model.in-sequence.learning-rate', '-1'], r'in_sequence\.learning_rate is -1\.0'),
        (['--model.in-sequence.blocks', '0', '--model.periods', '256', '512'], r'model\.periods is \(256, 512\), allowed is some below'),
    ],
)
def test_what_the_model_cannot_do_is_refused(flags, message, texts, tmp_path):
    args = hope_pretrain.parse([*flags, '--data.corpus', str(texts), '--train.output', str(tmp_path / 'run')])
    with pytest.raises(ValueError, match=message):
        hope_pretrain.prepare(args)


WRONG = {
    'misspelt flag': (['--model.presett', 'hope-tiny'], r'Unrecognized.*--model\.presett.*--model\.preset'),
    'unknown preset': (['--model.preset', 'hope-tny'], r"preset is 'hope-tny'.*hope-tiny"),
    'wrong type': (['--train.steps', 'many'], r'train\.steps.*many'),
    'impossible value': (['--train.steps', '0'], r'train\.steps is 0, allowed is'),
    'contradiction': (['--train.steps', '5', '--train.warmup-steps', '9'], r'train\.warmup_steps is 9, allowed is .*steps=5'),
    'impossible share': (['--model.dropout', '1'], r'dropout is 1\.0, allowed is a share'),
    'unknown choice': (['--model.remat', 'some'], r'some.*remat'),
    'no such folder': (['--data.corpus', '/nowhere/at/all'], r'/nowhere/at/all'),
    'unknown tokenizer': (['--data.tokenizer', 'words', '--data.corpus', '{texts}'], r'words'),
    'off the grid': (
        ['--model.preset', 'hope-tiny', '--train.sequence-length', '33', '--data.corpus', '{texts}'],
        r'train\.sequence_length is 33',
    ),
    'nothing that learns': (
        ['--model.in-sequence.blocks', '0', '--data.corpus', '{texts}'],
        r'model\.periods is \(512, 2048\), allowed is some below train\.sequence_length=256',
    ),
    'spikes without skipping': (['--train.spike-sigma', '5'], r"train\.spike_sigma is 5\.0, allowed is 6\.0 unless on_nonfinite='skip'"),
    'mesh': (['--mesh', 'data=2,fdsp=2', '--data.corpus', '{texts}'], r"mesh is 'data=2,fdsp=2', allowed is axis=size"),
    'kernels and devices': (['--train.kernels', 'tpu', '--data.corpus', '{texts}'], r"train\.kernels is 'tpu', allowed on 4 devices is"),
    'small vocabulary': (['--model.vocab-size', '100', '--data.corpus', '{texts}'], r'model\.vocab_size is 100'),
    'batch and devices': (
        ['--train.batch-size', '6', '--data.corpus', '{texts}'],
        r'train\.batch_size is 6, allowed is .* 1 x 4',
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, texts, tmp_path, record_property):
    """F1: within two seconds, by key, value and what is allowed."""
    arguments, message = WRONG[case]
    arguments = [argument.format(texts=texts) for argument in arguments]
    code, said, complained, seconds = run(*arguments, '--train.output', tmp_path / 'run', JAX_NUM_CPU_DEVICES='4')
    record_property('seconds', seconds)
    assert code == 2 and said == '' and seconds < 2
    assert re.search(message, complained) and complained.startswith('error: ') and complained.count('\n') == 1, complained
    assert not (tmp_path / 'run').exists()


def test_empty_folder_is_one_line_and_exit_code_2(tmp_path):
    code, said, complained, seconds = run('--data.corpus', tmp_path, '--train.output', tmp_path / 'run')
    assert code == 2 and str(tmp_path) in complained and complained.count('\n') == 1 and seconds < 2, complained


def test_what_the_trainer_refuses_is_one_line_and_exit_code_2(texts, tmp_path):
    """Too little text for a batch; and a folder in which another run is at work."""
    arguments = [*TINY, '--train.batch-size', '4096', '--data.corpus', texts, '--train.output', tmp_path / 'run']
    code, _, complained, _ = run(*arguments)
    assert code == 2 and re.match(r'error: batch_size=4096: .* allowed: at most \d+\n$', complained), complained
    with lock_folder(tmp_path / 'run'):
        code, _, complained, _ = run(*arguments)
    assert code == 2 and 'in use by another run' in complained and complained.count('\n') == 1, complained


def test_errors_of_others_keep_the_way_there(monkeypatch, tmp_path, texts):
    def train(*args, **options):
        return int('a fault of the program')

    monkeypatch.setattr(loop, 'train', train)
    with pytest.raises(ValueError, match='invalid literal'):
        hope_pretrain.main([*TINY, '--train.batch-size', '8', '--data.corpus', str(texts), '--train.output', str(tmp_path / 'run')])


def test_cache_that_others_can_write_to_and_processes_that_cannot_be_joined_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('WORLD_SIZE', '2')
    tmp_path.chmod(0o777)
    assert hope_pretrain.main([]) == 2
    assert capsys.readouterr().err.startswith(f"error: JAX_COMPILATION_CACHE_DIR is '{tmp_path}', allowed is a folder of your own")
    tmp_path.chmod(0o700)
    assert hope_pretrain.main([]) == 1
    complained = capsys.readouterr().err
    assert complained.startswith("error: WORLD_SIZE is '2', as torchrun") and complained.count('\n') == 1


def test_errors_that_need_no_device_are_met_before_jax_is_imported(tmp_path):
    """F1. Two seconds are more or less by the machine; what is imported is not."""
    program = (
        'import sys; from experiments.hope_pretrain import main; codes = [main(argument.split()) for argument in sys.argv[1:]]; '
        'assert codes == [2] * len(codes), codes; assert not {"jax", "flax", "orbax", "grain"} & set(sys.modules)'
    )
    arguments = [
        '--model.preset nope',
        '--model.presett x',
        '--train.steps 0',
        f'--data.corpus {tmp_path}',
        '--data.tokenizer nope',
        '--model.qk-norm',
    ]
    result = subprocess.run([sys.executable, '-c', program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_names_every_group():
    code, said, complained, _ = run('--help')
    assert code == 0 and complained == ''
    for flag in ('--model.preset', '--data.corpus', '--data.tokenizer', '--train.learning-rate', '--train.output', '--smoke'):
        assert flag in said


def compiled_steps():
    """Training steps in the persistent cache."""
    return {path.name for path in pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']).glob('jit_train_step-*-cache')}


def test_smoke_run_leaves_everything_behind(tmp_path, texts):
    """F5: its second process finds the compiled step."""
    folder = tmp_path / 'run'
    arguments = ['--smoke', '--model.preset', 'transformer-tiny', '--data.corpus', texts, '--train.output', folder]
    before = compiled_steps()
    code, said, complained, _ = run(*arguments, JAX_ENABLE_COMPILATION_CACHE='true')
    assert code == 0, complained
    assert len(stored := compiled_steps() - before) == 1
    assert 'step 4/4' in said and re.search(r'transformer-tiny +\d\.\d{4} +perplexity', said) and 'a sample' in said
    assert (folder / 'loss.png').stat().st_size > 1000
    (row,) = read_rows(folder / 'results.jsonl')
    assert row['model'] == 'transformer-tiny' and row['metrics']['tokens'] == 4 * 8 * 64 and row['metrics']['rejected_checkpoints'] == []
    assert row['config']['data']['digest'] and row['command'].startswith('python -m experiments.hope_pretrain --smoke')
    again, said, complained, _ = run(*arguments, JAX_ENABLE_COMPILATION_CACHE='true')
    assert again == 0 and 'going on from step 4' in said
    assert compiled_steps() - before == stored  # it was found there; what is not is stored anew
    assert len(read_rows(folder / 'results.jsonl')) == 1
    other, _, complained, _ = run(*arguments, '--train.seed', '1')
    assert other == 2 and 'train.seed is 1' in complained and complained.count('\n') == 1


@pytest.fixture(scope='module')
def forty_steps(texts):
    return [
        *TINY,
        *f'--train.steps 40 --train.log-every 1 --train.checkpoint-every 100 --train.eval-tokens 64 --data.corpus {texts}'.split(),
    ]


@pytest.fixture(scope='module')
def unbroken(forty_steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    code, _, complained, _ = run(*forty_steps, '--train.output', folder)
    assert code == 0, complained
    return folder


def lines_without_speed(folder):
    lines = read_metrics(folder / 'metrics.jsonl')
    return [{name: value for name, value in line.items() if name != 'tokens_per_second'} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_process_resumed_ends_with_the_numbers_of_the_unbroken_one(unbroken, forty_steps, tmp_path, number, code):
    """R8 too: these processes are another user's, whose sets and dictionaries of strings have other orders."""
    other = dict(HOME=str(tmp_path), PYTHONHASHSEED=str(code), LC_ALL='C', TZ='Asia/Tokyo')
    process = start(*forty_steps, '--train.output', tmp_path / 'run', **other)
    for line in process.stdout:
        if line.startswith('step 3/'):
            process.send_signal(number)
            break
    said, complained = process.communicate(timeout=120)
    assert process.returncode == code, complained
    stopped = int(re.search(r'saved step (\d+) to', said)[1])
    assert 3 <= stopped < 40 and '--train.output' in said
    code, said, complained, _ = run(*forty_steps, '--train.output', tmp_path / 'run', **other)
    assert code == 0 and f'going on from step {stopped}' in said, complained
    assert lines_without_speed(tmp_path / 'run') == lines_without_speed(unbroken)
    rows = [read_rows(folder / 'results.jsonl')[0]['metrics'] for folder in (unbroken, tmp_path / 'run')]
    assert rows[0] | {'resumed_from': stopped} == rows[1]
    last = 'checkpoints/00000040'
    assert stored_arrays(tmp_path / 'run' / last) == stored_arrays(unbroken / last)


@pytest.mark.slow
def test_sigterm_before_the_steps_ends_the_process_and_nothing_is_lost(unbroken, forty_steps, tmp_path):
    """S2: while programs are compiled there is nothing to save."""
    arguments = [*forty_steps, '--train.output', tmp_path]
    process = start(*arguments, JAX_ENABLE_COMPILATION_CACHE='false')  # which takes seconds
    for line in process.stdout:
        if 'output in' in line:
            process.terminate()
            break
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM and not list((tmp_path / 'checkpoints').glob('*'))
    code, _, complained, _ = run(*arguments)
    assert code == 0, complained
    assert lines_without_speed(tmp_path) == lines_without_speed(unbroken)


@pytest.mark.slow
def test_killed_and_hung_processes_resumed_end_with_the_numbers_of_the_unbroken_one(unbroken, forty_steps, tmp_path):
    """C1. A killed save, a step that hangs until the watchdog ends it, a flipped bit and a full disk: one after the other in one folder."""
    arguments = [*forty_steps, '--train.checkpoint-every', '5', '--train.output', tmp_path]
    code, _, complained, _ = run(*arguments, NESTED_JAX_FAULTS='kill@10/arrays')
    assert code == -signal.SIGKILL, complained
    code, said, complained, _ = run(*arguments, '--train.watchdog-s', '5', NESTED_JAX_FAULTS='sleep@17=300')
    assert code == 76 and 'going on from step 5' in said
    assert 'watchdog: step 17 has not ended within 5 s' in complained and 'in reach' in complained and 'Thread 0x' in complained
    code, said, complained, _ = run(*arguments, NESTED_JAX_FAULTS='flip_bit@20/renamed=777,disk_full@25/arrays')
    assert code == 1 and 'going on from step 15' in said and complained.count('\n') == 1
    assert re.match(
        r'error: step 25 could not be saved in .*No space left on device.*; the newest checkpoint is that of step 20', complained
    )
    code, said, complained, _ = run(*arguments)
    assert code == 0 and 'passed over a damaged checkpoint: step 20' in said and 'going on from step 15' in said, complained
    assert lines_without_speed(tmp_path) == lines_without_speed(unbroken)
    (metrics,) = (row['metrics'] for row in read_rows(tmp_path / 'results.jsonl'))
    assert metrics['resumed_from'] == 15 and [reason.split(':')[0] for reason in metrics['rejected_checkpoints']] == ['step 20']


@pytest.mark.slow
def test_run_that_diverges_is_one_line_exit_code_1_and_no_checkpoint(forty_steps, tmp_path):
    code, said, complained, _ = run(*forty_steps, '--train.output', tmp_path, NESTED_JAX_FAULTS='nan_batch@3')
    assert code == 1 and complained == 'error: at step 3 the loss is nan and the norm of the gradient nan; the step is not saved\n'
    assert [line['step'] for line in read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2]
    assert not list((tmp_path / 'checkpoints').iterdir())


@pytest.mark.parametrize('spec, asked', [(P(), 1), (P('data'), 8)], ids=['whole', 'split'])
def test_a_sample_is_made_on_one_device_where_it_has_all_parameters(monkeypatch, spec, asked):
    mesh, used = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)), []

    def generate(model, variables, prompt, *, key, **options):
        used.extend(len(array.sharding.device_set) for array in (variables['params'], key))
        return np.zeros((1, 3), np.int32)

    monkeypatch.setattr(sampling, 'generate', generate)
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    state = SimpleNamespace(params=place(jnp.ones(8), spec), key=place(jax.random.key(0), P()), step=place(jnp.zeros((), int), P()))
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(list(ids)))
    data = SimpleNamespace(heldout=SimpleNamespace(read=lambda *place: [104, 105]), tokenizer=tokenizer)
    said = hope_pretrain.sample(data, SimpleNamespace(model=None, state=state))
    assert said == 'hi|\0\0\0' and set(used) == {asked}


def test_stored_transformer_is_found_by_digest_and_nearest_budget(tmp_path):
    args = hope_pretrain.Args()
    tokens = args.train.steps * args.train.tokens_per_step
    line = lambda: hope_pretrain.stored_transformer(args, 'same', tmp_path)
    assert 'no stored row for this text;' in line()

    def store(digest, trained, bits, model='transformer-tiny', rate=1e-3, seed=0, heldout_bytes=900):
        config = {'data': {'digest': digest}, 'train': {'learning_rate': rate}}
        metrics = {'tokens': trained, 'heldout_bits_per_byte': bits, 'heldout_bytes': heldout_bytes}
        row = dict(model=model, seed=seed, config=config, metrics=metrics)
        with open(tmp_path / 'rows.jsonl', 'a') as file:
            file.write(json.dumps(row) + '\n')

    store('other', tokens, 1.0)
    store('same', tokens, 1.0, model='hope-tiny')
    assert 'only one for another text' in line()
    store('same', tokens // 2, 3.0)
    assert '3.0000' in line() and f'{tokens // 2:,} instead of {tokens:,}' in line()
    store('same', tokens, 2.0)
    store('same', tokens, 2.2, seed=1)
    store('same', tokens, 1.5, seed=2, heldout_bytes=300)  # on a part of the held-out text
    store('same', tokens, 2.15, rate=2e-3)  # a learning rate that is worse in the mean
    assert '2.1000' in line() and 'mean of 2 stored runs on as many tokens' in line()
