"""Which job a process joins, from made-up environments; JAX's own cluster classes read the same from them."""

import os
import re

import pytest
from jax._src import clusters

from cfg_jax.distributed.join import job_arguments
from cfg_jax.errors import UserError
from tests import processes_test, tiny

SLURM = {
    'SLURM_JOB_ID': '12345',
    'SLURM_STEP_NODELIST': 'node[007-009,012]',
    'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_NTASKS': '4',
    'SLURM_STEP_TASKS_PER_NODE': '1(x4)',
    'SLURM_PROCID': '2',
    'SLURM_LOCALID': '0',
    'SLURM_NODEID': '2',
}
OPEN_MPI = {
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    'OMPI_COMM_WORLD_SIZE': '2',
    'OMPI_COMM_WORLD_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
}
HAND = {'JAX_COORDINATOR_ADDRESS': 'a:1234', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
KUBERNETES = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


def joined(address, count, index, **more):
    return {
        'coordinator_address': address,
        'num_processes': count,
        'process_id': index,
        'cluster_detection_method': 'deactivate',
        **more,
    }


@pytest.mark.parametrize(
    ('environ', 'expected'),
    [
        (HAND, joined('a:1234', 2, 1)),
        (SLURM, joined('node007:61497', 4, 2)),
        (SLURM | {'SLURM_STEP_NODELIST': 'tpu-a,tpu-b'}, joined('tpu-a:61497', 4, 2)),
        (SLURM | {'JAX_COORDINATOR_PORT': '99'}, joined('node007:99', 4, 2)),
        (SLURM | {'JAX_COORDINATOR_ADDRESS': 'b:7'}, joined('b:7', 4, 2)),
        (OPEN_MPI, joined('10.96.0.1:62624', 2, 1, local_device_ids=[1])),
        (OPEN_MPI | SLURM, joined('10.96.0.1:62624', 2, 1, local_device_ids=[1])),
        (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp6://[fe80::1,2620::2]:43370'},
         joined('fe80::1:61441', 2, 1, local_device_ids=[1])),
        ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, {}),
        ({'TPU_PROCESS_ADDRESSES': 'a:1,b:1', 'TPU_WORKER_ID': '1'}, {}),
        ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, {}),
        (KUBERNETES | {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '3'}, joined('a:1', 3, 1)),
    ],
)  # fmt: skip
def test_a_job_of_several_processes(environ, expected):
    assert job_arguments(environ) == expected


@pytest.mark.parametrize(
    'environ',
    [
        {},
        HAND | {'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'},
        SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},  # a shell within an allocation of four tasks
        {name: value for name, value in SLURM.items() if 'STEP' not in name},  # sbatch's own script
        OPEN_MPI | {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
        {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
        {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},  # a pod that is no part of a job
        KUBERNETES | {'JAX_NUM_PROCESSES': '1'},
    ],
)
def test_a_process_by_itself(environ):
    assert job_arguments(environ) is None


def test_a_tpu_machine_without_variables():
    assert job_arguments({}, tpu_hosts=4) == {}


def test_flags_come_before_variables():
    flags = {'coordinator_address': 'b:1', 'num_processes': 3, 'process_id': 2}
    assert job_arguments(HAND, **flags) == joined('b:1', 3, 2)
    assert job_arguments(HAND, num_processes=3) == joined('a:1234', 3, 1)


def test_the_gpus_of_a_node_are_shared_out():
    """Four tasks on each of two nodes."""
    each = SLURM | {'SLURM_STEP_NUM_TASKS': '8', 'SLURM_STEP_TASKS_PER_NODE': '4(x2)'}
    each |= {'SLURM_NODEID': '1', 'SLURM_LOCALID': '3'}
    assert job_arguments(each)['local_device_ids'] == [3]
    assert job_arguments(each | {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'})['local_device_ids'] == [6, 7]
    for bound in ({'CUDA_VISIBLE_DEVICES': '0'}, {'SLURM_GPUS_PER_TASK': '2'}, {'JAX_LOCAL_DEVICE_IDS': '1'}):
        assert 'local_device_ids' not in job_arguments(each | bound)
    alone = SLURM | {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_STEP_TASKS_PER_NODE': '4,1(x3)', 'SLURM_NODEID': '1'}
    assert 'local_device_ids' not in job_arguments(alone)


@pytest.mark.parametrize(
    ('environ', 'message'),
    [
        (
            HAND | {'JAX_PROCESS_ID': '2'},
            r'process 2 of 2 processes cannot be; they count from 0 to 1 .*JAX_PROCESS_ID',
        ),
        (HAND | {'JAX_PROCESS_ID': '-1'}, r"JAX_PROCESS_ID is '-1'; it must be a whole number from 0 on"),
        (HAND | {'JAX_NUM_PROCESSES': 'two'}, r"JAX_NUM_PROCESSES is 'two'"),
        (HAND | {'JAX_NUM_PROCESSES': '0'}, r'a whole number from 1 on'),
        (HAND | {'JAX_COORDINATOR_ADDRESS': 'a'}, r"JAX_COORDINATOR_ADDRESS is 'a'; it must be host:port"),
        (HAND | {'JAX_COORDINATOR_ADDRESS': 'a:70000'}, r'must be host:port'),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, r'without --num_processes or JAX_NUM_PROCESSES and --process_id'),
        (SLURM | {'SLURM_PROCID': '4'}, r'process 4 of 4 processes cannot be'),
        (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': ''}, r'mpirun started 2 processes .*--coordinator_address'),
        (KUBERNETES, r'a pod of an indexed Kubernetes job: set JAX_NUM_PROCESSES'),
    ],
)
def test_what_cannot_be(environ, message):
    with pytest.raises(UserError, match=message):
        job_arguments(environ)


@pytest.mark.parametrize(
    ('cluster', 'environ'),
    [
        (clusters.SlurmCluster, SLURM),
        (clusters.SlurmCluster, SLURM | {'SLURM_STEP_NODELIST': 'node001,host2'}),
        (clusters.SlurmCluster, SLURM | {'SLURM_STEP_NODELIST': 'a-b[001-015],c'}),
        (clusters.SlurmCluster, SLURM | {'SLURM_STEP_NODELIST': 'single'}),
        (clusters.OmpiCluster, OPEN_MPI),
        (clusters.OmpiCluster, OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '1314521088.0;tcp6://[fe80::b9b,2620::2]:43370'}),
    ],
)
def test_jax_reads_the_same(monkeypatch, cluster, environ):
    for name in [name for name in os.environ if name.startswith(('SLURM', 'OMPI', 'JAX_COORD'))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cluster.is_env_present()
    ours = job_arguments(environ)
    address = cluster.get_coordinator_address(timeout_secs=1, override_coordinator_port=None)
    told = address, cluster.get_process_count(), cluster.get_process_id()
    assert (ours['coordinator_address'], ours['num_processes'], ours['process_id']) == told


@pytest.mark.parametrize(
    ('index', 'message'),
    [
        (1, r'nothing answers at localhost:[0-9]+'),
        pytest.param(0, r'not all of its processes have come', marks=pytest.mark.slow),
    ],
)
def test_others_that_do_not_come(tmp_path, index, message):
    """One line after the time that was given, and a status with which a launcher tries again."""
    flags = [f'--coordinator_address=localhost:{processes_test.free_port()}', '--num_processes=2', '--join_seconds=2']
    done = tiny.main(*tiny.flags(), *flags, f'--process_id={index}', f'--workdir={tmp_path}', timeout=60)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'waited 2 s for the job' in lines[0], done.stderr
    assert re.search(message, lines[0])
    assert 'Traceback' not in done.stderr and 'stack trace' not in done.stderr


def test_work_for_one_process_does_not_wait_for_others(tmp_path):
    flags = ['--coordinator_address=localhost:1', '--num_processes=2', '--process_id=1', '--mode=plan']
    done = tiny.main(*tiny.flags(), *flags, f'--workdir={tmp_path}', timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: --mode=plan is for one process, and this is one of several')
