"""Launchers for machines elsewhere: what they would run, what they refuse, and what they do around commands that stand in for theirs."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.hope_pretrain import parse
from nested_jax.training.config import check_devices

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / 'scripts/README.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', README, re.S) for line in block.splitlines()]
RUN = ['--model.preset', 'hope-760m', '--train.output', '/mnt/a b']


def launch(*words, path=None, **variables):
    """Without gcloud, sbatch or xpk, unless a folder of stand-ins is given."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith('SLURM_')} | variables
    environment['PATH'] = f'{path}:/usr/bin:/bin' if path else '/usr/bin:/bin'
    return subprocess.run(['bash', *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def commands_of(name, *words):
    ended = launch(f'scripts/{name}', '--dry-run', *words)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return [shlex.split(line) for line in ended.stdout.splitlines()]


def test_tpu_is_asked_for_waited_for_filled_and_run_on():
    where = ['--name', 'hope', '--zone=us-west4-a', '--project', 'p']
    create, look, pack, copy, install, run = commands_of(
        'launch_tpu.sh', *where, '--type', 'v5litepod-64', '--runtime', 'v2', '--spot', '--setup', "echo 'a b'", '--', *RUN
    )
    common = ['--zone=us-west4-a', '--project=p']
    resource = ['gcloud', 'compute', 'tpus', 'queued-resources']
    wanted = ['--accelerator-type=v5litepod-64', '--runtime-version=v2', '--spot']
    assert create == [*resource, 'create', 'hope', '--node-id=hope', *common, *wanted]
    assert look == [*resource, 'describe', 'hope', *common, '--format=value(state.state)']
    archive = pack[-2].removeprefix('--output=')
    assert pack == ['git', 'archive', '--format=tar.gz', f'--output={archive}', 'HEAD'] and not pathlib.Path(archive).parent.exists()
    assert copy == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp', archive, 'hope:nested_jax.tar.gz', *common, '--worker=all']
    on_all = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'hope', *common, '--worker=all']
    assert install[:-1] == run[:-1] == on_all
    assert install[-1].startswith("--command=set -e; echo 'a b'; mkdir -p nested_jax; ")
    inside = shlex.split(run[-1].split('; ')[-1])
    assert inside == ['.venv/bin/python', '-m', 'experiments.hope_pretrain', *RUN, '2>&1', '|', 'tee', '-a', '~/nested_jax.log']
    assert commands_of('launch_tpu.sh', *where, '--delete') == [[*resource, 'delete', 'hope', *common, '--force']]


def test_slurm_starts_a_process_a_task_and_puts_the_job_back():
    step, requeue = commands_of('launch_slurm.sbatch', '--', *RUN)
    python = ['-m', 'experiments.hope_pretrain', '--distributed=auto', *RUN]
    assert step == ['srun', '--kill-on-bad-exit=1', '--gpu-bind=none', f'{ROOT}/.venv/bin/python', *python]
    assert requeue == ['scontrol', 'requeue', '$SLURM_JOB_ID']
    asked = set(re.findall(r'^#SBATCH (.*)$', (ROOT / 'scripts/launch_slurm.sbatch').read_text(), re.M))
    assert {'--requeue', '--signal=B:USR1@120', '--open-mode=append'} < asked


def test_gke_gets_one_workload():
    where = ['--cluster', 'c', '--workload', 'hope', '--zone', 'z']
    (create,) = commands_of('launch_gke_xpk.sh', *where, '--type', 'v5litepod-16', '--image', 'i', '--slices', '2', '--', *RUN)
    assert create[:9] == ['xpk', 'workload', 'create', *where]
    options = dict(zip(create[9::2], create[10::2], strict=True))
    assert shlex.split(options.pop('--command')) == ['exec', 'bash', 'scripts/launch_gke_xpk.sh', '--in-pod', *RUN]
    assert options == {
        '--tpu-type': 'v5litepod-16', '--num-slices': '2', '--base-docker-image': 'i', '--script-dir': str(ROOT), '--max-restarts': '10',
        '--restart-on-exit-codes': '75,76', '--termination-grace-period-seconds': '120',
    }  # fmt: skip
    assert commands_of('launch_gke_xpk.sh', *where, '--delete') == [['xpk', 'workload', 'delete', *where]]


TPU = 'launch_tpu.sh --zone z --name'
GKE = 'launch_gke_xpk.sh --cluster c --type t --image i --workload'


@pytest.mark.parametrize(
    'words, message',
    [
        ('launch_tpu.sh --zone z', '--name is missing'),
        (f'{TPU} hope --type t', '--runtime is missing'),
        (f'{TPU} hope --type --runtime r', '--type has no value'),
        (f'{TPU} hope --type', '--type has no value'),
        (f'{TPU} Hope', "--name is 'Hope', allowed is up to 40 of a-z, 0-9 and -, a letter first"),
        (f'{TPU} hope --tpye t', 'option is --tpye, allowed is one of --name --zone --type'),
        (f'{TPU} hope t', "argument is 't', allowed is an option, or --"),
        (f'{TPU} hope --type t --runtime r', "--train.output is '', allowed after -- is an absolute path"),
        (f'{TPU} hope --type t --runtime r -- --train.output=runs/x', "--train.output is 'runs/x', allowed after -- is an absolute path"),
        (f'{TPU} hope --delete -- --smoke', '--delete is given with arguments of a run'),
        ('launch_slurm.sbatch', "--train.output is '', allowed after -- is a folder on a disk that all nodes share"),
        ('launch_slurm.sbatch -- --train.output', "--train.output is ''"),
        ('launch_slurm.sbatch -- --train.output=x', 'SLURM_JOB_ID is not set, allowed is a job'),
        (f'{GKE} hope --slices 0 -- --train.output /x', "--slices is '0', allowed is an integer of at least 1"),
        (f'{GKE} hope_1', "--workload is 'hope_1'"),
        ('launch_gke_xpk.sh --workload hope', '--cluster is missing'),
    ],
)
def test_wrong_input_is_refused_in_a_line(words, message):
    name, *arguments = shlex.split(words)
    ended = launch(f'scripts/{name}', *arguments)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith(f'error: {message}') and ended.stderr.count('\n') == 1


@pytest.fixture
def tools(tmp_path):
    """A folder of stand-ins, which write down how they were called."""

    def make(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n')
        path.chmod(0o755)

    make.folder, make.calls = tmp_path, lambda: (tmp_path / 'calls').read_text().splitlines()
    return make


def test_tpu_is_not_asked_for_twice_and_a_lost_one_is_not_deleted(tools):
    words = shlex.split(f'scripts/{TPU} hope --type t --runtime r -- --train.output /x')
    tools('git', ':')
    tools('gcloud', 'case "$*" in *describe*) echo ACTIVE ;; esac')
    assert launch(*words, path=tools.folder).returncode == 0
    assert [line.split()[4] for line in tools.calls() if line.startswith('gcloud')] == ['describe', 'describe', 'scp', 'ssh', 'ssh']
    (tools.folder / 'calls').unlink()
    tools('gcloud', 'case "$*" in *describe*) echo SUSPENDED ;; esac')
    ended = launch(*words, path=tools.folder)
    assert ended.returncode == 2 and 'hope is SUSPENDED: delete it (--delete), then give the same command again' in ended.stderr
    assert {line.split()[4] for line in tools.calls()} == {'describe'}


def test_tpu_gets_the_last_commit_and_that_is_said_where_there_are_changes(tools):
    words = shlex.split(f'scripts/{TPU} hope --type t --runtime r -- --train.output /x')
    tools('gcloud', 'case "$*" in *describe*) echo ACTIVE ;; esac')
    note = 'note: the last commit is copied; what git status shows as changed or new is not\n'
    for status, said in ((':', ''), ('echo " M README.md"', note)):
        tools('git', f'case "$1" in status) {status} ;; esac')
        ended = launch(*words, path=tools.folder)
        assert (ended.returncode, ended.stderr) == (0, said)


def test_tpu_worker_without_a_python_gets_one(tools):
    """By the README's --setup: where python3 is too old, and only there, uv installs another, which the environment is made with."""
    (line,) = (line for line in COMMANDS if '--setup' in line)
    words = shlex.split(line)
    *_, install, _ = commands_of('launch_tpu.sh', *words[1:])
    setup = install[-1].removeprefix('--command=').replace('tar -xzf nested_jax.tar.gz -C nested_jax; ', '')
    (tools.folder / 'nested_jax/scripts').mkdir(parents=True)
    (tools.folder / 'nested_jax/scripts/environment.sh').write_text((ROOT / 'scripts/environment.sh').read_text())
    for name in ('dirname', 'mkdir', 'mv'):
        (tools.folder / name).symlink_to(shutil.which(name))
    tools('mountpoint', ':')
    tools('python3.12', ':')
    (tools.folder / 'python3.12').rename(tools.folder / 'later')
    tools('python3', 'case "$*" in *install\\ 3.12) mkdir -p ~/.local/bin; mv later ~/.local/bin/python3.12 ;; -c*) exit 1 ;; esac')
    environment = dict(PATH=str(tools.folder), HOME=str(tools.folder / 'home'))
    for _ in range(2):
        ended = subprocess.run(['/bin/bash', '-c', setup], cwd=tools.folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert tools.calls()[-1] == 'python3.12 scripts/environment.py tpu'
    assert [line for line in tools.calls() if 'install' in line] == ['python3 -m pip install -q uv', 'python3 -m uv python install 3.12']


SRUN = 'trap "echo told >> $0.told; exit 0" TERM; touch $0.ready; for _ in {1..200}; do sleep 0.05; done; exit 3'


def test_slurm_job_passes_the_warning_on_once_and_is_put_back(tools):
    tools('srun', SRUN)
    tools('scontrol', ':')
    environment = os.environ | dict(SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(ROOT), PATH=f'{tools.folder}:/usr/bin:/bin')
    copy = tools.folder / 'slurm_script'  # SLURM runs a copy
    copy.write_text((ROOT / 'scripts/launch_slurm.sbatch').read_text())
    job = subprocess.Popen(['bash', copy, '--', '--train.output', 'x'], env=environment, cwd='/')
    while job.poll() is None and not (tools.folder / 'srun.ready').exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)  # as a preempted one gets it, whose processes are told by SLURM
    time.sleep(0.2)
    assert job.poll() is None and not (tools.folder / 'srun.told').exists()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (tools.folder / 'srun.told').read_text() == 'told\n'
    assert tools.calls()[-1] == 'scontrol requeue 7'


@pytest.mark.parametrize(
    'code, restarts, told, back',
    [
        (1, None, '', False),
        (2, None, '', False),
        (75, None, '', True),
        (76, '9', '', True),
        (137, None, '', True),
        (76, '10', '', False),
        (75, None, 'kill -TERM $PPID; sleep 0.5; ', False),  # cancelled; bash loses the code of what ends at the very moment of a signal
    ],
)
def test_slurm_job_is_put_back_where_another_try_may_mend_it(tools, code, restarts, told, back):
    tools('srun', f'{told}exit {code}')
    tools('scontrol', ':')
    job = dict(SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(ROOT)) | ({} if restarts is None else dict(SLURM_RESTART_COUNT=restarts))
    ended = launch('scripts/launch_slurm.sbatch', '--', '--train.output=x', path=tools.folder, **job)
    assert ended.returncode == (0 if back else code), ended.stderr
    assert tools.calls()[1:] == (['scontrol requeue 7'] if back else [])


@pytest.mark.parametrize('told, code', [(True, 143), (False, 3)])
def test_pod_that_was_told_to_stop_is_not_done(tools, told, code):
    tools('python3', 'case "$*" in *hope_pretrain*) ' + SRUN.replace('{1..200}', '{1..10}') + ' ;; esac')
    checkout = tools.folder / 'checkout'
    (checkout / 'scripts').mkdir(parents=True)
    for name in ('launch.sh', 'launch_gke_xpk.sh'):
        (checkout / 'scripts' / name).write_text((ROOT / 'scripts' / name).read_text())
    (checkout / 'scripts/environment.sh').write_text('prepare_environment() { python=python3; }')
    environment = os.environ | dict(PATH=f'{tools.folder}:/usr/bin:/bin')
    pod = subprocess.Popen(['bash', checkout / 'scripts/launch_gke_xpk.sh', '--in-pod', '--smoke'], env=environment)
    while pod.poll() is None and not (tools.folder / 'python3.ready').exists():
        time.sleep(0.02)
    if told:
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=30) == code and (tools.folder / 'python3.told').exists() == told
    assert tools.calls() == ['python3 -m experiments.hope_pretrain --distributed=auto --smoke']


def test_pod_commands_of_the_readme_are_understood():
    pods = [shlex.split(line) for line in COMMANDS if 'launch_local' not in line]
    assert len(pods) == 5
    assert all('--train.watchdog-s' in line for line in COMMANDS if '--delete' not in line)
    for words in pods:
        start = next(index for index, word in enumerate(words) if word.startswith('scripts/'))
        name, *arguments = words[start:]
        assert commands_of(name.removeprefix('scripts/'), *arguments), words
        if '--' in arguments:
            args = parse(arguments[arguments.index('--') + 1 :])
            check_devices(
                args.train, {'launch_slurm.sbatch': 16, 'launch_tpu.sh': 64, 'launch_gke_xpk.sh': 512}[name.removeprefix('scripts/')]
            )


@pytest.mark.multiprocess
def test_local_command_of_the_readme_runs(tmp_path):
    (line,) = (line for line in COMMANDS if 'launch_local' in line)
    (tmp_path / 'text').mkdir()
    for index in range(40):
        (tmp_path / 'text' / f'{index}.txt').write_text('one two three four ' * 80)
    own, job = line.removeprefix('python ').split(' -- python ')
    python = sys.executable
    small = ['--model.preset=transformer-tiny', f'--data.corpus={tmp_path / "text"}', f'--train.output={tmp_path / "run"}']
    words = [python, *shlex.split(own), f'--logs={tmp_path / "logs"}', '--', python, *shlex.split(job), *small]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    assert '2 process(es), 4 cpu device(s)' in ended.stdout and 'bits per byte of the held-out text' in ended.stdout
    assert (tmp_path / 'run/checkpoints/00000004/manifest.json').exists() and (tmp_path / 'logs/attempt-1-process-1.log').exists()
