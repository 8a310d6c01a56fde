"""Which processes a run has, read off faked environments: what is detected is joined or is an error, never left alone in silence."""

import os
import pathlib
import random
import re
import subprocess
import sys

import jax
import pytest

from nested_jax.training import distributed
from nested_jax.training.cluster import LOCAL, Cluster, ClusterError, ProcessConfig, find_cluster

SLURM = dict(SLURM_JOB_ID='4711', SLURM_STEP_NODELIST='node[001-004]', SLURM_NTASKS='8', SLURM_PROCID='3', SLURM_LOCALID='1')
OPEN_MPI = dict(
    OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_RANK='1', OMPI_COMM_WORLD_LOCAL_RANK='1', OMPI_MCA_orte_hnp_uri='1.0;tcp://10.0.0.1:1'
)
TPU = dict(TPU_WORKER_HOSTNAMES='t0,t1,t2,t3', TPU_WORKER_ID='2')
SLICES = dict(MEGASCALE_NUM_SLICES='2', MEGASCALE_SLICE_ID='1', MEGASCALE_COORDINATOR_ADDRESS='t0')
LAUNCHED = dict(zip(LOCAL, ('localhost:1234', '3', '2'), strict=True))
TOLD = dict(coordinator_address='localhost:1234', num_processes=3, process_id=2, cluster_detection_method='deactivate')


def find(environment, on_tpu=False, mode='auto', **config):
    return find_cluster(mode, ProcessConfig(**config), environment, on_tpu)


@pytest.mark.parametrize(
    'environment, found',
    [
        (SLURM, Cluster('SLURM', 8, dict(cluster_detection_method='slurm'))),
        (OPEN_MPI, Cluster('Open MPI', 4, dict(cluster_detection_method='ompi'))),
        (TPU, Cluster('Cloud TPU', 4, {})),
        (TPU | SLICES, Cluster('Cloud TPU', 8, {})),
        (dict(TPU_PROCESS_ADDRESSES='t0:8476,t1:8476', TPU_WORKER_ID='0'), Cluster('Cloud TPU', 2, {})),
        (LAUNCHED, Cluster('scripts/launch_local.py', 3, TOLD)),
        (SLURM | LAUNCHED, Cluster('scripts/launch_local.py', 3, TOLD)),  # a launcher inside a SLURM step has the last word
    ],
)
def test_what_the_environment_says(environment, found):
    assert find(environment) == found
    assert find(environment, mode='off') is None


def test_one_process():
    assert find({}) is None
    assert find(SLURM | dict(SLURM_NTASKS='1')) is None
    assert find(dict(SLURM_JOB_ID='4711')) is None  # a shell in somebody's job
    assert find(dict(TPU_WORKER_HOSTNAMES='localhost', TPU_WORKER_ID='0')) is None
    assert find(LAUNCHED | {LOCAL[1]: '1', LOCAL[2]: '0'}) is None


def test_a_tpu_without_variables_asks_its_metadata_server(libtpu):
    assert find({}, on_tpu=True) == Cluster('Cloud TPU', None, {})
    assert find(dict(TPU_SKIP_MDS_QUERY='1'), on_tpu=True) is None


@pytest.mark.parametrize('environment', [SLURM, OPEN_MPI, TPU, TPU | SLICES, LAUNCHED], ids=['slurm', 'mpi', 'tpu', 'slices', 'local'])
def test_half_an_environment_is_an_error(environment):
    sizes = {'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES', 'MEGASCALE_NUM_SLICES'}  # without which nothing is said
    for name in environment.keys() - sizes:
        with pytest.raises(ClusterError, match=f'{re.escape(name)} is not set.*--distributed=off'):
            find({key: value for key, value in environment.items() if key != name})


@pytest.mark.parametrize(
    'environment, message',
    [
        (SLURM | dict(SLURM_NTASKS='4(x2)'), r"SLURM_NTASKS is '4\(x2\)', allowed is an integer"),
        (LAUNCHED | {LOCAL[2]: '3'}, 'process 3 of 3, allowed is 0 to 2'),
    ],
)
def test_an_environment_that_makes_no_sense(environment, message):
    with pytest.raises(ClusterError, match=message):
        find(environment)


def test_explicit():
    assert find({}, mode='explicit', coordinator='localhost:1234', count=3, index=2) == Cluster('the command line', 3, TOLD)
    assert find(SLURM, mode='explicit', coordinator='localhost:1234', count=1, index=0) is None


@pytest.mark.parametrize(
    'mode, config, message',
    [
        ('on', {}, "distributed is 'on', allowed is one of auto, off, explicit"),
        ('explicit', dict(coordinator='a:1', count=2), 'processes.index is None, allowed is a value'),
        ('auto', dict(count=2), 'processes.count is 2, allowed is None, unless distributed=explicit'),
        ('explicit', dict(coordinator='a', count=2, index=0), "processes.coordinator is 'a', allowed is host:port"),
        ('explicit', dict(coordinator='a:1', count=2, index=2), 'processes.index is 2, allowed is from 0 to below count=2'),
        ('auto', dict(heartbeat_s=0), 'processes.heartbeat_s is 0, allowed is an integer of at least 1'),
    ],
)
def test_bad_input(mode, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find({}, mode=mode, **config)


def test_what_is_joined_is_what_was_found(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **arguments: calls.append(arguments))
    limits = dict(initialization_timeout=7, heartbeat_timeout_seconds=8, shutdown_timeout_seconds=9)
    config = ProcessConfig(start_s=7, heartbeat_s=8, shutdown_s=9)
    with pytest.raises(ClusterError, match='SLURM says that there are 8 processes, but 1 joined'):
        distributed.join('auto', config, SLURM)
    assert calls == [dict(cluster_detection_method='slurm', **limits)]
    assert capsys.readouterr().err == 'joining the 8 processes that SLURM says there are, for 7 s at most\n'
    distributed.join('off', config, SLURM)
    distributed.join('auto', config, {})
    assert len(calls) == 1 and not capsys.readouterr().err


def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch):
    def initialize(**_):
        raise RuntimeError('DEADLINE_EXCEEDED:\n  nobody there')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(ClusterError) as error:
        distributed.join('auto', None, SLURM)
    assert str(error.value) == 'cannot join the 8 processes that SLURM says there are: DEADLINE_EXCEEDED: nobody there'


def test_joining_after_a_device_was_used_is_an_error():
    jax.devices()
    with pytest.raises(ClusterError, match='must be called before'):
        distributed.join('auto', None, LAUNCHED)


def test_one_process_agrees_with_itself():
    assert distributed.is_first() and distributed.gather(-(2**40)) == [-(2**40)]
    assert distributed.total(3) == distributed.first_says(3) == distributed.first_then_others(lambda: 3) == 3
    assert distributed.first_to_fail(False) is None and distributed.first_to_fail(True) == 0
    with pytest.raises(KeyError, match='why'):
        distributed.first_then_others(lambda: {}['why'])
    distributed.check_same('text', 5)
    distributed.leave()


@pytest.mark.parametrize('ending, code', [('return 3', 3), ('return 0', 0), ("raise KeyError('x')", 1)])
def test_a_process_alone_ends_as_usual(ending, code):
    program = f'from nested_jax.training.cluster import run_to_exit\ndef main():\n    {ending}\nrun_to_exit(main)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == code and ('KeyError' in done.stderr) == (code == 1)


JOIN = """
import sys
import jax
from nested_jax.training import distributed
distributed.join()
print(jax.process_index(), jax.process_count(), len(jax.devices()), distributed.gather(10 + jax.process_index()), distributed.first_says(5))
distributed.leave()
"""


SLURM_STEP = dict(SLURM_STEP_NODELIST='localhost', SLURM_NTASKS='2')
# JAX takes the machine for a TPU worker, and asks no metadata server, which is not there.
TPU_WORKER = dict(
    JAX_FORCE_TPU_INIT='1', TPU_WORKER_HOSTNAMES='localhost,localhost',
    MEGASCALE_COORDINATOR_ADDRESS='localhost', MEGASCALE_NUM_SLICES='1', MEGASCALE_SLICE_ID='0',
)  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    'name, own, variables',
    [
        ('SLURM', ['SLURM_PROCID', 'SLURM_LOCALID'], SLURM_STEP),
        pytest.param('Cloud TPU', ['TPU_WORKER_ID'], TPU_WORKER, marks=pytest.mark.exhaustive),
    ],
)
def test_processes_of_a_faked_cluster_find_one_another(name, own, variables):
    """Through JAX's own reading of the variables: the host and, under SLURM, the port are in them."""
    port = random.randrange(4096)  # JAX's for SLURM: the job's number, in the last 4096
    places = dict(SLURM_JOB_ID=str(port)) if name == 'SLURM' else dict(JAX_COORDINATOR_PORT=str(61440 + port))
    shared = os.environ | variables | places | dict(JAX_NUM_CPU_DEVICES='2', JAX_PLATFORMS='cpu')
    options = dict(cwd=pathlib.Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([sys.executable, '-c', JOIN], env=shared | dict.fromkeys(own, str(index)), **options) for index in range(2)]
    try:
        for index, process in enumerate(started):
            said, complained = process.communicate(timeout=60)
            assert process.returncode == 0, complained
            assert said.splitlines()[-1] == f'{index} 2 4 [10, 11] 5'
            assert f'joining the 2 processes that {name} says there are' in complained
    finally:
        for process in started:
            process.kill()
