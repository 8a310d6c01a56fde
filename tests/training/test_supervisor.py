"""The local supervisor, over small programs: it sees every end, ends the others, starts all again, and knows when not to."""

import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from nested_jax.training.cluster import FAILED
from nested_jax.training.supervisor import Supervisor, Whereabouts, read_whereabouts

ROOT = pathlib.Path(__file__).parents[2]
# Each program is told its place, and counts its attempts in a file of its own.
BEGIN = """
import os, pathlib, signal, sys, time
sys.path.insert(0, sys.argv[1])
from nested_jax.training.cluster import LOCAL
from nested_jax.training.supervisor import VARIABLE, Whereabouts
coordinator, count, index = (os.environ[name] for name in LOCAL)
index, where, counted = int(index), Whereabouts(os.environ[VARIABLE]), pathlib.Path(sys.argv[2]) / f'attempts-{index}'
attempt = int(counted.read_text()) + 1 if counted.exists() else 1
print('process', index, 'of', count, 'at', coordinator, 'attempt', attempt, flush=True)
counted.write_text(str(attempt))

def others_wait():
    # For process 1, as in a collective; it goes on when process 0 has counted this attempt too.
    if index != 1:
        time.sleep(60)
    first = counted.with_name('attempts-0')
    while not first.exists() or first.read_text() in ('', str(attempt - 1)):
        time.sleep(0.01)
"""
OTHERS_WAIT = 'others_wait()\n'


def command(folder, program):
    return [sys.executable, '-c', BEGIN + program, str(ROOT), str(folder)]


def supervise(folder, program, processes=2, **arguments):
    said = []
    code = Supervisor(command(folder, program), processes, logs=folder / 'logs', say=said.append, **arguments).run()
    return code, said, [int((folder / f'attempts-{index}').read_text()) for index in range(processes)]


def test_all_end_well(tmp_path, capsys):
    code, said, attempts = supervise(tmp_path, 'print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAX_PLATFORMS"])', 3, devices=4)
    assert (code, said, attempts) == (0, [], [1, 1, 1])
    logs = [(tmp_path / 'logs' / f'attempt-1-process-{index}.log').read_text() for index in range(3)]
    assert len({re.search(r'at localhost:(\d+)', log)[1] for log in logs}) == 1
    for index, log in enumerate(logs):
        assert f'process {index} of 3' in log and '4 cpu' in log
    assert capsys.readouterr().out == logs[0]


LISTENS = """
import jax
jax.distributed.initialize(coordinator, 1, 0, cluster_detection_method='deactivate')
port = int(coordinator.rpartition(':')[2])
lines = [line.split() for name in ('tcp', 'tcp6') for line in pathlib.Path('/proc/net', name).read_text().splitlines()[1:]]
print('listens on', {words[1] for words in lines if words[3] == '0A' and words[1].endswith(f':{port:04X}')})
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc/net/tcp').exists(), reason='asks Linux who listens')
def test_the_coordinator_listens_to_this_machine_only(tmp_path, capsys):
    """JAX's default is every address of the machine, and whoever reaches it is let in."""
    assert supervise(tmp_path, LISTENS, 1) == (0, [], [1])
    addresses = set(re.findall(r"'([0-9A-F]+):[0-9A-F]{4}'", capsys.readouterr().out))
    assert addresses and addresses <= {'0100007F', '00000000000000000000000001000000', '0000000000000000FFFF00000100007F'}


@pytest.mark.parametrize(
    'end, code',
    [('sys.exit(3)', 3), ('os.kill(os.getpid(), signal.SIGKILL)', 137), ('raise RuntimeError', 1)],
    ids=['exit', 'kill', 'error'],
)
def test_one_bad_end_starts_all_again_at_once(tmp_path, end, code):
    began = time.monotonic()
    program = f'where.say(7, 5)\nif attempt == 1:\n    {OTHERS_WAIT.strip()}\n    {end}\n'
    assert supervise(tmp_path, program) == (
        0,
        [
            f'attempt 1: process 1 ended with code {code} at step 7; its output is in {tmp_path / "logs"}',
            'all processes are started again, from step 5',
        ],
        [2, 2],
    )
    assert time.monotonic() - began < 30  # the other one would wait for a minute
    ports = {re.search(r'localhost:(\d+)', path.read_text())[1] for path in (tmp_path / 'logs').glob('*.log')}
    assert len(ports) == 2  # one for each attempt


@pytest.mark.parametrize('later_s', [0, 0.3])
def test_a_process_that_another_one_made_fail_is_not_the_one_that_is_named(tmp_path, later_s):
    """On a busy machine process 0's collective has failed, and its program ended, before process 1 is seen to be killed."""
    ends = f'sys.exit({FAILED}) if index == 0 else (time.sleep({later_s}), os.kill(os.getpid(), signal.SIGKILL))'
    both = "while not all(counted.with_name(f'attempts-{other}').exists() for other in (0, 1)):\n        time.sleep(0.01)"
    code, said, attempts = supervise(tmp_path, f'where.say(7, 5)\nif attempt == 1:\n    {both}\n    {ends}\n')
    assert (code, attempts) == (0, [2, 2])
    assert said[0].startswith('attempt 1: process 1 ended with code 137 at step 7')


def test_a_process_that_failed_by_itself_is_named(tmp_path):
    program = f'where.say(7, 5)\nif attempt == 1:\n    {OTHERS_WAIT.strip()}\n    sys.exit({FAILED})\n'
    code, said, attempts = supervise(tmp_path, program)
    assert (code, attempts) == (0, [2, 2])
    assert said[0].startswith(f'attempt 1: process 1 ended with code {FAILED} at step 7')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_stopped_is_not_started_again(tmp_path, number):
    """A single process that saved and stopped, told by somebody else, says so by its code; one that the signal killed has none."""
    assert supervise(tmp_path, f'sys.exit({128 + number})', 1) == (128 + number, [], [1])


@pytest.mark.parametrize('step, where', [(7, 'at step 7'), (0, 'before the first step')])
def test_a_crash_loop_is_not_started_again(tmp_path, step, where):
    """S7. The first attempt ends elsewhere; saving something on the way does not help."""
    say = f'where.say(5 if attempt == 1 else {step}, attempt)\n' if step else ''
    code, said, attempts = supervise(tmp_path, say + OTHERS_WAIT + 'sys.exit(4)')
    assert code == 4 and attempts == ([4, 4] if step else [3, 3])
    assert said[-1] == f'a crash loop, 3 times in a row {where}: not started again'


def test_the_budget_is_given_anew_with_every_checkpoint(tmp_path):
    """Two restarts after that of step 10, two after that of step 20: and then no more."""
    saved = 'saved = {1: 0, 2: 10, 3: 10, 4: 20}.get(attempt, 20)\nwhere.say(100 + attempt, saved)\n'
    code, said, attempts = supervise(tmp_path, saved + OTHERS_WAIT + 'sys.exit(4)', restarts=2)
    assert code == 4 and attempts == [6, 6]
    assert said[-1] == 'started again 2 times without a newer checkpoint than that of step 20: not started again'


def launch(folder, program, *arguments):
    own = [str(ROOT / 'scripts' / 'launch_local.py'), '--logs', str(folder / 'logs'), *arguments, '--']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *own, *command(folder, program)], **pipes)


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


SAVES = """
def stop(number, frame):
    global signals
    signals += 1
    if signals == 2:
        os._exit(9)
signals = 0
signal.signal(signal.SIGTERM, stop)
(counted.parent / f'ready-{index}').touch()
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_is_started_again(tmp_path, number):
    process = launch(tmp_path, SAVES + 'while not signals: time.sleep(0.01)\nprint("saved")\nsys.exit(0)')
    for index in range(2):
        wait_for(tmp_path / f'ready-{index}')
    process.send_signal(number)
    said, complained = process.communicate(timeout=30)
    assert process.returncode == 0 and said.endswith('saved\n'), complained
    assert (tmp_path / 'attempts-1').read_text() == '1'


@pytest.mark.parametrize('stuck, signals, code', [('time.sleep(0.01)', 2, 9), ('signal.pause()', 3, 137)])
def test_more_signals_do_not_wait(tmp_path, stuck, signals, code):
    begin = SAVES if signals == 2 else SAVES.replace('signals += 1', 'pass')  # the latter does not care for SIGTERM
    process = launch(tmp_path, begin + f'while True: {stuck}')
    for index in range(2):
        wait_for(tmp_path / f'ready-{index}')
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(30) == code
    process.communicate()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(command=[]), r'command is \[\], allowed is a program and its arguments'),
        (dict(processes=0), 'processes is 0, allowed is an integer of at least 1'),
        (dict(devices=0), 'devices is 0, allowed is an integer of at least 1 or None'),
        (dict(restarts=-1), 'restarts is -1, allowed is an integer of at least 0'),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Supervisor(**dict(command=['true'], processes=1, logs=tmp_path) | arguments)


def test_command_line(tmp_path):
    process = launch(tmp_path, '', '--dry-run', '--processes', '3', '--devices', '2')
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and said.startswith(f'3 processes with 2 devices each, logs in {tmp_path / "logs"}: ')
    assert not (tmp_path / 'logs').exists()
    done = subprocess.run([sys.executable, str(ROOT / 'scripts' / 'launch_local.py')], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: command is []')


def test_whereabouts(tmp_path):
    assert read_whereabouts(tmp_path / 'none') == (0, 0)
    where = Whereabouts(str(tmp_path / 'file'))
    assert read_whereabouts(tmp_path / 'file') == (0, 0)
    where.say(123456, 123000)
    where.say(saved=123456)  # in a thread that saves, while the run is at a step
    where.say(123457)
    assert read_whereabouts(tmp_path / 'file') == (123457, 123456)
    where.say(7, 5)
    assert read_whereabouts(tmp_path / 'file') == (7, 5)
    again = Whereabouts(str(tmp_path / 'again'))
    again.say(saved=40)  # read, and no step begun
    assert read_whereabouts(tmp_path / 'again') == (0, 40)
    Whereabouts(None).say(1, 1)
