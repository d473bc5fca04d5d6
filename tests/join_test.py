"""The job that a process joins in made-up environments, as JAX sees it, whose own detection does a part of the work."""

import os
import re
from types import SimpleNamespace

import pytest
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster, cluster

from cfg_jax.distributed import join
from cfg_jax.distributed.join import job_arguments
from cfg_jax.errors import UserError
from tests import processes_test, tiny

SLURM = {
    'SLURM_JOB_ID': '12345',
    'SLURM_STEP_NODELIST': 'node[007-009,012]',
    'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '2',
    'SLURM_LOCALID': '0',
    'SLURM_GTIDS': '2',
}
OPEN_MPI = {
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    'OMPI_COMM_WORLD_SIZE': '2',
    'OMPI_COMM_WORLD_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
}
HAND = {'JAX_COORDINATOR_ADDRESS': 'a:1234', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI.items() if 'orte' not in name}
KUBERNETES = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


ALL = None  # of the GPUs that a process sees


@pytest.fixture
def joined(monkeypatch):
    """Return the job that JAX joins in an environment: (address of process 0, processes, own index, own GPUs)."""
    gpus = []
    monkeypatch.setattr(distributed.State, 'initialize_preemption_sync_manager', lambda self: None)
    monkeypatch.setattr(distributed.config, 'update', lambda name, value: 'cuda' in name and gpus.append(value))

    def result(environ, **flags):
        for name in [name for name in os.environ if name.startswith(('SLURM', 'OMPI', 'JAX_', 'KUBE', 'TPU', 'MEGA'))]:
            monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        clients, services = [], []

        def client(address, index, **options):
            clients.append((address, index))
            return SimpleNamespace(connect=lambda: None)

        def service(address, count, **options):
            services.append((address, count))

        runtime = SimpleNamespace(get_distributed_runtime_client=client, get_distributed_runtime_service=service)
        monkeypatch.setattr(distributed, '_jax', runtime)
        gpus.clear()
        state = distributed.State()
        state.initialize(**job_arguments(dict(os.environ), **flags))
        assert clients == [(state.coordinator_address, state.process_id)] and bool(services) == (state.process_id == 0)
        return state.coordinator_address, state.num_processes, state.process_id, *(gpus or [ALL])

    return result


@pytest.mark.parametrize(
    ('environ', 'expected'),
    [
        (HAND, ('a:1234', 2, 1, ALL)),
        (SLURM, ('node007:61497', 4, 2, ALL)),
        (SLURM | {'SLURM_STEP_NODELIST': 'tpu-a,tpu-b'}, ('tpu-a:61497', 4, 2, ALL)),
        (SLURM | {'SLURM_STEP_NODELIST': 'a-b[001-015],c'}, ('a-b001:61497', 4, 2, ALL)),
        (SLURM | {'SLURM_STEP_NODELIST': 'single', 'SLURM_PROCID': '0'}, ('single:61497', 4, 0, ALL)),
        (SLURM | {'SLURM_NTASKS': '8'}, ('node007:61497', 4, 2, ALL)),
        (SLURM | {'JAX_COORDINATOR_PORT': '99'}, ('node007:99', 4, 2, ALL)),
        (SLURM | {'JAX_COORDINATOR_ADDRESS': 'b:7'}, ('b:7', 4, 2, ALL)),
        (OPEN_MPI, ('10.96.0.1:62624', 2, 1, '1')),
        (OPEN_MPI | SLURM, ('10.96.0.1:62624', 2, 1, '1')),
        (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp6://[fe80::1,2620::2]:43370'}, ('fe80::1:61441', 2, 1, '1')),
        (OPEN_MPI_5 | {'JAX_COORDINATOR_ADDRESS': 'a:1'}, ('a:1', 2, 1, '1')),
        (KUBERNETES | {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '3'}, ('a:1', 3, 1, ALL)),
    ],
)
def test_a_job_of_several_processes(joined, environ, expected):
    assert joined(environ) == expected


POD = {'TPU_WORKER_HOSTNAMES': 'localhost,b', 'TPU_WORKER_ID': '1', 'TPU_SKIP_MDS_QUERY': 'true'}  # as on GKE


@pytest.mark.parametrize(
    ('environ', 'expected'),
    [
        (POD | {'MEGASCALE_NUM_SLICES': '1', 'MEGASCALE_SLICE_ID': '0'}, ('localhost:8482', 2, 1, ALL)),
        (POD | {'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1'}, ('localhost:8482', 4, 3, ALL)),
    ],
)
def test_a_tpu_pod(joined, monkeypatch, environ, expected):
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, 'running_in_cloud_tpu_vm', True)
    monkeypatch.setattr(cloud_tpu_cluster, 'get_tpu_env_value_from_metadata', {}.get)
    assert joined(environ) == expected


@pytest.mark.parametrize(
    ('environ', 'tpu_hosts'),
    [
        ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, 1),
        ({'TPU_PROCESS_ADDRESSES': 'a:1,b:1', 'TPU_WORKER_ID': '1'}, 1),
        ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, 1),
        ({}, 4),  # a machine whose metadata alone say so
    ],
)
def test_only_jax_knows_a_tpu_pod(environ, tpu_hosts):
    """If JAX does not, it fails: the hosts of a pod do not each work alone."""
    assert job_arguments(environ, tpu_hosts=tpu_hosts) == {}


def test_only_jax_knows_a_kubernetes_job(monkeypatch):
    monkeypatch.setattr(join, 'find_spec', lambda name: name == 'kubernetes')
    assert job_arguments(KUBERNETES) == {'process_id': 1}


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


def test_flags_come_before_variables(joined):
    flags = {'coordinator_address': 'b:1', 'num_processes': 3, 'process_id': 2}
    assert joined(HAND, **flags) == ('b:1', 3, 2, ALL)
    assert joined(HAND, num_processes=3) == ('a:1234', 3, 1, ALL)
    assert joined(SLURM, **flags) == ('b:1', 3, 2, ALL)


@pytest.mark.parametrize(
    ('more', 'gpus'),
    [
        ({}, '3'),
        ({'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, '6,7'),
        ({'JAX_COORDINATOR_ADDRESS': 'b:7'}, '3'),
        # assigned by the launcher, or by hand
        ({'CUDA_VISIBLE_DEVICES': '0'}, ALL),
        ({'SLURM_GPUS_PER_TASK': '2'}, ALL),
        ({'JAX_LOCAL_DEVICE_IDS': '1'}, '1'),
        # one task on this node, several on others
        ({'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_GTIDS': '7', 'SLURM_LOCALID': '0'}, ALL),
    ],
)
def test_the_gpus_of_a_node_are_shared_out(joined, more, gpus):
    """Four tasks on each of two nodes."""
    each = SLURM | {'SLURM_STEP_NUM_TASKS': '8', 'SLURM_GTIDS': '4,5,6,7', 'SLURM_PROCID': '7', 'SLURM_LOCALID': '3'}
    assert joined(each | more)[2:] == (7, gpus)


def test_every_task_of_a_node_gets_gpus_of_its_own(joined):
    several = OPEN_MPI | {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}
    ranks = [several | {f'OMPI_COMM_WORLD_{name}RANK': str(rank) for name in ('', 'LOCAL_')} for rank in range(2)]
    assert [joined(rank)[2:] for rank in ranks] == [(0, '0,1'), (1, '2,3')]


@pytest.mark.parametrize(
    ('environ', 'message'),
    [
        (
            HAND | {'JAX_PROCESS_ID': '2'},
            r'there is no process 2 among 2; they count from 0 to 1 .*JAX_PROCESS_ID',
        ),
        (HAND | {'JAX_PROCESS_ID': '-1'}, r"JAX_PROCESS_ID is '-1'; it must be a whole number, at least 0"),
        (HAND | {'JAX_NUM_PROCESSES': 'two'}, r"JAX_NUM_PROCESSES is 'two'"),
        (HAND | {'JAX_NUM_PROCESSES': '0'}, r'a whole number, at least 1'),
        (HAND | {'JAX_COORDINATOR_ADDRESS': 'a'}, r"JAX_COORDINATOR_ADDRESS is 'a'; it must be host:port"),
        (HAND | {'JAX_COORDINATOR_ADDRESS': 'a:70000'}, r'must be host:port'),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, r'without --num_processes or JAX_NUM_PROCESSES and --process_id'),
        (SLURM | {'SLURM_PROCID': '4'}, r'there is no process 4 among 4'),
        (OPEN_MPI_5, r'mpirun started 2 processes.*--coordinator_address'),
        (KUBERNETES, r'a pod of an indexed Kubernetes job: set JAX_NUM_PROCESSES'),
    ],
)
def test_what_cannot_be(environ, message):
    with pytest.raises(UserError, match=message):
        job_arguments(environ)


@pytest.mark.parametrize(
    ('index', 'message'),
    [
        (1, r'nothing answers at localhost:[0-9]+'),
        pytest.param(0, r'not all of its processes have started', marks=pytest.mark.slow),
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


def test_a_launcher_without_the_variables_that_jax_needs(tmp_path):
    half = {name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NODELIST'}
    done = tiny.main(*tiny.flags(), f'--workdir={tmp_path}', env={**tiny.environment(), **half}, timeout=60)
    assert done.returncode == 2
    assert re.match(r"error: cannot join the job .*process_id 2.*'SLURM_STEP_NODELIST'", done.stderr.splitlines()[-1])


def test_work_for_one_process_does_not_wait_for_others(tmp_path):
    flags = ['--coordinator_address=localhost:1', '--num_processes=2', '--process_id=1', '--mode=plan']
    done = tiny.main(*tiny.flags(), *flags, f'--workdir={tmp_path}', timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: --mode=plan is for one process, and this is one of several')
