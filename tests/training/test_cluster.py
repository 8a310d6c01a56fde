"""Other processes that `auto` cannot join: what says that they exist is refused, and one process alone is not."""

import importlib.util
import re
import warnings

import pytest

from nested_jax.training.cluster import Cluster, ClusterError, ProcessConfig, find_cluster, has_tpu

POD = dict(KUBERNETES_SERVICE_HOST='10.0.0.1', JOB_COMPLETION_INDEX='0')
SLURM = dict(SLURM_JOB_ID='4711', SLURM_STEP_NODELIST='node[001-004]', SLURM_NTASKS='8', SLURM_PROCID='3', SLURM_LOCALID='1')


def find(environment, on_tpu=False, mode='auto'):
    return find_cluster(mode, ProcessConfig(), environment, on_tpu)


@pytest.mark.parametrize(
    'environment, variable',
    [
        (dict(WORLD_SIZE='4', RANK='0', LOCAL_RANK='0', MASTER_ADDR='a', MASTER_PORT='1'), 'WORLD_SIZE'),
        (dict(PMI_SIZE='4', PMI_RANK='0'), 'PMI_SIZE'),
        (dict(MV2_COMM_WORLD_SIZE='2'), 'MV2_COMM_WORLD_SIZE'),
        (dict(FLUX_JOB_SIZE='2'), 'FLUX_JOB_SIZE'),
        (dict(SLURM_JOB_ID='1', SLURM_STEP_NUM_TASKS='8'), 'SLURM_STEP_NUM_TASKS'),
        (SLURM | dict(SLURM_NTASKS='1', SLURM_STEP_NUM_TASKS='8'), 'SLURM_STEP_NUM_TASKS'),
        (SLURM | dict(SLURM_NTASKS='1', WORLD_SIZE='8'), 'WORLD_SIZE'),  # torchrun, started as a single task
        (dict(MEGASCALE_NUM_SLICES='2'), 'MEGASCALE_NUM_SLICES'),
        (dict(MEGASCALE_SLICE_ID='1'), 'MEGASCALE_SLICE_ID'),
        (dict(TPU_WORKER_ID='3'), 'TPU_WORKER_ID'),
        (dict(JAX_COORDINATOR_ADDRESS='a:1'), 'JAX_COORDINATOR_ADDRESS'),
        (dict(JAX_COORDINATOR_ADDRESS='a:1', JAX_NUM_PROCESSES='2', JAX_PROCESS_ID='0'), 'JAX_NUM_PROCESSES'),
        (POD | dict(JOB_COMPLETION_INDEX='2'), 'JOB_COMPLETION_INDEX'),
        (POD | dict(JOB_COMPLETION_INDEX='2', TPU_WORKER_HOSTNAMES='localhost', TPU_WORKER_ID='0'), 'JOB_COMPLETION_INDEX'),
        (dict(WORLD_SIZE='many'), 'WORLD_SIZE'),
    ],
)
def test_processes_that_cannot_be_joined_are_not_left_alone_in_silence(environment, variable):
    message = f'{variable} is {environment[variable]!r}, as .* --distributed=explicit, .* --distributed=off'
    with pytest.raises(ClusterError, match=f'^{message}$'):
        find(environment)
    assert find(environment, mode='off') is None


@pytest.mark.parametrize(
    'environment',
    [
        dict(WORLD_SIZE='1', RANK='0', LOCAL_RANK='0', MASTER_ADDR='a', MASTER_PORT='1'),
        dict(PMI_SIZE='1', PMI_RANK='0', MPI_LOCALNRANKS='1'),
        dict(SLURM_JOB_ID='1', SLURM_STEP_NUM_TASKS='1'),
        dict(SLURM_JOB_ID='1', SLURM_ARRAY_TASK_ID='3', SLURM_ARRAY_TASK_COUNT='9'),  # runs of their own, by intention
        dict(MEGASCALE_NUM_SLICES='1', MEGASCALE_SLICE_ID='0'),
        dict(JAX_COORDINATOR_ADDRESS='a:1', JAX_NUM_PROCESSES='1', JAX_PROCESS_ID='0'),
        dict(WORLD_SIZE='', JAX_COORDINATOR_ADDRESS=''),
        dict(KUBERNETES_SERVICE_HOST='10.0.0.1'),  # a notebook
        POD | dict(TPU_WORKER_HOSTNAMES='localhost', TPU_WORKER_ID='0'),  # xpk, a slice of one host
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_one_process_goes_on_alone(environment):
    assert find(environment) is None


@pytest.mark.parametrize('environment, variable', [(POD, 'JOB_COMPLETION_INDEX'), (dict(JOBSET_NAME='runs'), 'JOBSET_NAME')])
def test_a_pod_that_may_be_the_only_one_goes_on_and_says_so(environment, variable):
    with pytest.warns(UserWarning, match=f'{variable} is set, so this pod may be one of several.* going on alone'):
        assert find(environment) is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find(environment, mode='off') is None


def test_pods_that_jax_can_find_are_joined(tmp_path, monkeypatch):
    (tmp_path / 'kubernetes').mkdir()
    (tmp_path / 'kubernetes' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    for index in ('0', '2'):
        assert find(POD | dict(JOB_COMPLETION_INDEX=index)) == Cluster('Kubernetes', None, {})
    assert find(dict(KUBERNETES_SERVICE_HOST='10.0.0.1')) is None
    assert find(POD | dict(TPU_WORKER_HOSTNAMES='localhost')) is None
    assert find(POD | SLURM) == Cluster('SLURM', 8, dict(cluster_detection_method='slurm'))


def test_a_tpu_with_its_metadata_server_knows_its_slices(libtpu):
    assert find(dict(MEGASCALE_NUM_SLICES='2'), on_tpu=True) == Cluster('Cloud TPU', None, {})
    with pytest.raises(ClusterError, match='MEGASCALE_NUM_SLICES'):
        find(dict(MEGASCALE_NUM_SLICES='2', TPU_SKIP_MDS_QUERY='1'), on_tpu=True)


def test_a_tpu_without_its_library_is_not_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ClusterError, match=r'libtpu.*jax\[tpu\].*--distributed=off'):
        find({}, on_tpu=True)
    assert find({}, on_tpu=True, mode='off') is None and find(SLURM, on_tpu=True).name == 'SLURM'


@pytest.mark.parametrize(
    ('vendor', 'device', 'found'), [('0x1ae0', '0x0063', True), ('0x1ae0', '0x0042', False), ('0x10de', '0x0063', False)]
)
def test_chips_are_known_by_their_numbers(tmp_path, vendor, device, found):
    """A network card of Google's and another maker's device are none."""
    bus = tmp_path / 'sys/bus/pci/devices'
    (bus / '0000:00:05.0').mkdir(parents=True)
    (bus / 'without').mkdir()
    for name, text in {'vendor': vendor, 'device': device}.items():
        (bus / '0000:00:05.0' / name).write_text(text + '\n')
    assert has_tpu(tmp_path) == found and not has_tpu(tmp_path / 'nowhere')


def test_chips_of_a_number_that_is_not_known_are_told_by_their_library(tmp_path, libtpu, monkeypatch):
    (tmp_path / 'dev/vfio').mkdir(parents=True)
    assert not has_tpu(tmp_path)
    (tmp_path / 'dev/vfio/3').touch()
    assert has_tpu(tmp_path)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert not has_tpu(tmp_path)


def test_one_tpu_host_of_several_tasks_is_not_alone():
    assert find(SLURM | dict(TPU_WORKER_HOSTNAMES='localhost')) == Cluster('SLURM', 8, dict(cluster_detection_method='slurm'))


def test_half_an_environment_names_both_ways_out():
    half = {key: value for key, value in SLURM.items() if key != 'SLURM_LOCALID'}
    with pytest.raises(ClusterError, match=re.escape('SLURM_LOCALID is not set') + '.*--distributed=explicit.*--distributed=off'):
        find(half)
