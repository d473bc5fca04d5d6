"""Find out whether a process is one of several, and let it join the others.

The job is described by flags, by JAX's variables, or by what started the processes: SLURM, Open MPI, a TPU pod or a
Kubernetes job. What is not given by hand, such as the address of process 0, JAX finds out by itself.
"""

import os
import re
import socket
import sys
import threading
from importlib.util import find_spec

from cfg_jax.errors import UserError

HEARTBEAT_SECONDS = 60  # a process that has been silent for this long counts as dead, and the job ends
JOIN_SECONDS = 300  # the processes of a job may start this far apart
# Argument of jax.distributed.initialize -> the flag and the variable that set it by hand.
_BY_HAND = {
    'coordinator_address': ('--coordinator_address', 'JAX_COORDINATOR_ADDRESS'),
    'num_processes': ('--num_processes', 'JAX_NUM_PROCESSES'),
    'process_id': ('--process_id', 'JAX_PROCESS_ID'),
}
# JAX's name of a launcher -> the number of processes, this one's index, its index on the node, and those on the node.
_LAUNCHERS = {
    'ompi': tuple(f'OMPI_COMM_WORLD_{name}' for name in ('SIZE', 'RANK', 'LOCAL_RANK', 'LOCAL_SIZE')),
    # Not SLURM_NTASKS: a shell inside an allocation sees there how many processes it may start, but is only one itself.
    'slurm': ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_GTIDS'),
}


def join(*, join_seconds=JOIN_SECONDS, heartbeat_seconds=HEARTBEAT_SECONDS, for_one='', **by_hand):
    """Join the job that flags (`by_hand`, as in `job_arguments`) or the environment describe; True if there is one.

    for_one: names the work that only one process may do, if it is that. Raises UserError for such work in a job of
    several, before waiting for the others, and for values that contradict each other. If the others have not come after
    `join_seconds`, the process ends with one line and status 1, because a later start may find them.
    """
    arguments = job_arguments(os.environ, tpu_hosts=_hosts_of_tpu_vm(), **by_hand)
    if arguments is None:
        return False
    if for_one:
        raise UserError(
            f'{for_one} is for one process, and this is one of several ({_described(arguments)}); start it once, with '
            'JAX_NUM_PROCESSES=1.'
        )
    import jax

    # Signals are handled in `job`, for every kind of job and not only for training.
    jax.config.update('jax_enable_preemption_service', False)
    timer = threading.Timer(join_seconds, _give_up, [join_seconds, arguments])
    timer.daemon = True
    timer.start()
    try:
        # JAX's own timeout aborts with a stack trace, so it comes later than ours.
        timeouts = {'initialization_timeout': join_seconds + 60, 'heartbeat_timeout_seconds': heartbeat_seconds}
        jax.distributed.initialize(**arguments, **timeouts)
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # KeyError: a variable that JAX misses
        reason = ' '.join(str(error).split())
        raise UserError(f'cannot join the job ({_described(arguments)}): {reason[:300]}.') from error
    finally:
        timer.cancel()
    return True


def jax_job():
    """Return JAX's record of the job: process_id, num_processes, coordinator_address and client, its key-value store.

    It has no public name; Orbax uses it too.
    """
    from jax._src import distributed

    return distributed.global_state


def job_arguments(environ, *, coordinator_address=None, num_processes=None, process_id=None, tpu_hosts=1):
    """Return the arguments of jax.distributed.initialize; None for a process that works alone.

    The given arguments come before $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID, and these before
    what `environ` (a dict) shows of a launcher or cluster, which counts only if it started more than one process. JAX
    finds out what the result leaves open. tpu_hosts: the hosts of this machine's TPU slice; 1 without a TPU.
    Raises UserError for values that contradict each other or say too little.
    """
    by_hand = _by_hand(environ, coordinator_address, num_processes, process_id)
    if by_hand.get('num_processes') == 1:
        return None
    detected = None if len(by_hand) == 3 else _detected(environ, tpu_hosts, by_hand)
    if detected is None and len(by_hand) in (1, 2):
        missing = [' or '.join(names) for key, names in _BY_HAND.items() if key not in by_hand]
        given = [' or '.join(names) for key, names in _BY_HAND.items() if key in by_hand]
        raise UserError(f'{" and ".join(given)} is given without {" and ".join(missing)}; a job needs all three.')
    if detected is None and not by_hand:
        return None
    arguments = {**(detected or {}), **by_hand}
    count, index = arguments.get('num_processes'), arguments.get('process_id', 0)
    if count and index >= count:
        names = ' or '.join(_BY_HAND['process_id'])
        raise UserError(f'there is no process {index} among {count}; they count from 0 to {count - 1} ({names}).')
    if _BY_HAND.keys() <= arguments.keys():
        arguments['cluster_detection_method'] = 'deactivate'  # JAX would only restrict the devices
    return arguments


def _by_hand(environ, *given):
    """Read flags and JAX's variables, flags first, into a dict with some of the three arguments."""
    found = {}
    for value, (key, (flag, variable)) in zip(given, _BY_HAND.items()):
        name = flag
        if value is None:
            value, name = environ.get(variable), variable
        if value is None or value == '':
            continue
        if key == 'coordinator_address':
            if not re.fullmatch(r'.+:[0-9]{1,5}', value) or not 0 < int(value.rpartition(':')[2]) < 65536:
                raise UserError(f'{name} is {value!r}; it must be host:port of process 0.')
            found[key] = value
        else:
            least = 1 if key == 'num_processes' else 0
            if not re.fullmatch('[0-9]+', str(value)) or int(value) < least:
                raise UserError(f'{name} is {value!r}; it must be a whole number, at least {least}.')
            found[key] = int(value)
    return found


def _detected(environ, tpu_hosts, by_hand):
    """Return what the environment says of a job of several processes, {} if only JAX can tell; None without one."""
    for launcher, names in _LAUNCHERS.items():
        count, index, local, here = (environ.get(name) for name in names)
        if not (count and index and local) or int(count) < 2:
            continue
        uri = environ.get('OMPI_MCA_orte_hnp_uri')  # which Open MPI 5 no longer sets
        if launcher == 'ompi' and not uri and 'coordinator_address' not in by_hand:
            raise UserError(
                f'mpirun started {count} processes, but Open MPI 5 does not say where the first of them is; set '
                f'{" or ".join(_BY_HAND["coordinator_address"])} to host:port of rank 0.'
            )
        # SLURM lists the processes on the node, Open MPI counts them.
        processes_here = len(here.split(',')) if launcher == 'slurm' and here else int(here or 1)
        arguments = {'num_processes': int(count), 'process_id': int(index), 'cluster_detection_method': launcher}
        return arguments | _own_gpus(environ, int(local), processes_here)
    hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES') or ''
    slices = int(environ.get('MEGASCALE_NUM_SLICES') or 1)
    if max(tpu_hosts, len(hosts.split(','))) * slices > 1:
        return {}
    if 'KUBERNETES_SERVICE_HOST' in environ and 'JOB_COMPLETION_INDEX' in environ:
        if not {'coordinator_address', 'num_processes'} <= by_hand.keys() and find_spec('kubernetes') is None:
            raise UserError(
                'this is a pod of an indexed Kubernetes job: set JAX_NUM_PROCESSES (1 if it works alone) and '
                'JAX_COORDINATOR_ADDRESS (host:port of pod 0), or pip install kubernetes so that JAX finds them.'
            )
        return {'process_id': int(environ['JOB_COMPLETION_INDEX'])}
    return None


def _own_gpus(environ, local, processes_here):
    """Return {'local_device_ids': this process's equal share of the GPUs that it sees}, an empty list for all of them.

    JAX by itself gives each process the GPU of its local index. This leaves seven of eight idle if a node has one
    process, and finds none if the launcher has assigned GPUs already.
    """
    if 'JAX_LOCAL_DEVICE_IDS' in environ:
        return {}  # JAX reads it
    visible = [name for name in environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    assigned = 'SLURM_GPUS_PER_TASK' in environ or (visible and len(visible) < processes_here)
    if processes_here < 2 or assigned:
        return {'local_device_ids': []}
    share = len(visible) // processes_here or 1
    return {'local_device_ids': list(range(local * share, (local + 1) * share))}


def _hosts_of_tpu_vm():
    """Return how many hosts the TPU slice of this Google Cloud machine has; 1 without a TPU."""
    from jax._src import cloud_tpu_init  # JAX detects TPU pods too, but has no public name for it

    if not cloud_tpu_init.running_in_cloud_tpu_vm or 'TPU_SKIP_MDS_QUERY' in os.environ:
        return 1
    from jax._src.clusters import GceTpuCluster

    try:
        return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1
    except OSError:
        return 1  # a TPU elsewhere, without Google Cloud's metadata


def _described(arguments):
    """Return the job as a phrase, from what JAX has found out so far, or else from the arguments."""
    job = jax_job()
    known = vars(job) if job.coordinator_address else arguments
    return ', '.join(f'{key} {known[key]}' for key in _BY_HAND if key in known) or 'as the cluster describes it'


def _give_up(seconds, arguments):
    """End the process from another thread: JAX waits in C++, and would abort with a stack trace."""
    job, why = jax_job(), 'not all of its processes have started'
    host, _, port = (job.coordinator_address or '').rpartition(':')
    if host and job.process_id:
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
        except OSError as error:
            why = f'nothing answers at {host}:{port} ({error.strerror or error})'
    print(f'error: waited {seconds} s for the job ({_described(arguments)}): {why}.', file=sys.stderr, flush=True)
    os._exit(1)
