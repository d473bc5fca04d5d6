"""How a process finds and joins the other processes of its job: flags, JAX's variables, or the cluster's own."""

import os
import re
import socket
import sys
import threading
from importlib.util import find_spec

from cfg_jax.errors import UserError

HEARTBEAT_SECONDS = 60  # after so long without a sign of life a process counts as dead, and the job ends
JOIN_SECONDS = 300  # a job's processes may start so far apart
# What names a job by hand: argument of jax.distributed.initialize -> (flag, variable).
_BY_HAND = {
    'coordinator_address': ('--coordinator_address', 'JAX_COORDINATOR_ADDRESS'),
    'num_processes': ('--num_processes', 'JAX_NUM_PROCESSES'),
    'process_id': ('--process_id', 'JAX_PROCESS_ID'),
}


def join(*, join_seconds=JOIN_SECONDS, heartbeat_seconds=HEARTBEAT_SECONDS, for_one='', **given):
    """Joins the job that flags (`given`: as `job_arguments` takes them) or the environment name; True if there is one.

    for_one: what is to be done, where it is work for one process. Raises UserError for that in a job of several, before
    it waits for the others, and for values that contradict each other. Where the others have not come after
    `join_seconds`, the process ends with one line and status 1, for they may come to a later start.
    """
    arguments = job_arguments(os.environ, tpu_hosts=_hosts_of_tpu_vm(), **given)
    if arguments is None:
        return False
    if for_one:
        raise UserError(
            f'{for_one} is for one process, and this is one of several ({_shown(arguments)}); start it once, with '
            'JAX_NUM_PROCESSES=1.'
        )
    import jax

    # Signals are `cfg_jax.job`'s, which knows of all jobs and not only of training.
    jax.config.update('jax_enable_preemption_service', False)
    giving_up = threading.Timer(join_seconds, _give_up, [join_seconds, arguments])
    giving_up.daemon = True
    giving_up.start()
    try:
        # JAX's own timeout aborts with a stack trace, so it comes later than ours.
        timeouts = {'initialization_timeout': join_seconds + 60, 'heartbeat_timeout_seconds': heartbeat_seconds}
        jax.distributed.initialize(**arguments, **timeouts)
    except (RuntimeError, ValueError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'the job cannot be joined ({_shown(arguments)}): {reason[:300]}.') from error
    finally:
        giving_up.cancel()
    return True


def _give_up(seconds, arguments):
    """Ends the process, from the side: JAX waits in C++, and would abort with a stack trace."""
    why = 'not all of its processes have come'
    host, _, port = arguments.get('coordinator_address', '').rpartition(':')
    if host and arguments.get('process_id'):
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
        except OSError as error:
            why = f'nothing answers at {host}:{port} ({error.strerror or error})'
    print(f'error: waited {seconds} s for the job ({_shown(arguments)}): {why}.', file=sys.stderr, flush=True)
    os._exit(1)


def _shown(arguments):
    told = {key: arguments[key] for key in _BY_HAND if key in arguments}
    return ', '.join(f'{key} {value}' for key, value in told.items()) or 'as the cluster describes it'


def job_arguments(environ, *, coordinator_address=None, num_processes=None, process_id=None, tpu_hosts=1):
    """Which job to join, as arguments of jax.distributed.initialize; None where this process is alone.

    Given arguments come before $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID, and these before what
    the environment `environ` (a dict) shows of Open MPI, SLURM, a TPU pod or a Kubernetes job; of a cluster nothing is
    used unless it started more than one process. tpu_hosts: of the TPU slice, as its machine knows; 1 elsewhere.
    Where only the cluster can tell, JAX asks it: the arguments are empty then.
    Raises UserError for what cannot be.
    """
    hand = _by_hand(environ, coordinator_address, num_processes, process_id)
    if hand.get('num_processes') == 1:
        return None
    cluster = None if len(hand) == 3 else _cluster(environ, tpu_hosts, hand)
    if cluster is None:
        if hand and len(hand) < 3:
            missing = [' or '.join(names) for key, names in _BY_HAND.items() if key not in hand]
            given = [' or '.join(names) for key, names in _BY_HAND.items() if key in hand]
            raise UserError(f'{" and ".join(given)} is given without {" and ".join(missing)}; a job needs all three.')
        arguments = hand
    else:
        arguments = {**cluster, **hand}
    if not arguments and cluster is None:
        return None
    if {'num_processes', 'process_id'} <= arguments.keys():
        count, index = arguments['num_processes'], arguments['process_id']
        if not 0 <= index < count:
            raise UserError(
                f'process {index} of {count} processes cannot be; they count from 0 to {count - 1} '
                f'({" or ".join(_BY_HAND["process_id"])}).'
            )
    if len(arguments.keys() & _BY_HAND.keys()) == 3:
        arguments['cluster_detection_method'] = 'deactivate'  # it would restrict the devices
    return arguments


def _by_hand(environ, *given):
    """What flags and JAX's variables say, flags first: a dict with some of the three arguments."""
    told = {}
    for value, (key, (flag, variable)) in zip(given, _BY_HAND.items()):
        name = flag
        if value is None:
            value, name = environ.get(variable), variable
        if value is None or value == '':
            continue
        if key == 'coordinator_address':
            if not re.fullmatch(r'.+:[0-9]{1,5}', value) or not 0 < int(value.rpartition(':')[2]) < 65536:
                raise UserError(f'{name} is {value!r}; it must be host:port of process 0.')
            told[key] = value
        else:
            told[key] = _count(name, value, least=1 if key == 'num_processes' else 0)
    return told


def _count(name, value, least=0):
    """The variable's or flag's text as a whole number."""
    if not re.fullmatch('[0-9]+', str(value)) or int(value) < least:
        raise UserError(f'{name} is {value!r}; it must be a whole number from {least} on.')
    return int(value)


def _cluster(environ, tpu_hosts, hand):
    """The same arguments from a cluster's own variables; None outside of one, or where it started one process."""
    for kind in (_open_mpi, _slurm, _tpu_pod, _kubernetes):
        arguments = kind(environ, tpu_hosts, hand)
        if arguments is not None:
            return arguments
    return None


def _open_mpi(environ, tpu_hosts, hand):
    count = _count('OMPI_COMM_WORLD_SIZE', environ.get('OMPI_COMM_WORLD_SIZE', '1'))
    if count < 2:
        return None
    index, local = (
        _count(name, environ.get(name, '')) for name in ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK')
    )
    arguments = {'num_processes': count, 'process_id': index}
    here = _count('OMPI_COMM_WORLD_LOCAL_SIZE', environ.get('OMPI_COMM_WORLD_LOCAL_SIZE', '1'), least=1)
    arguments |= _own_devices(environ, local, here)
    # '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911' up to Open MPI 4; 5 does not tell where rank 0 is.
    uri = environ.get('OMPI_MCA_orte_hnp_uri', '')
    found = re.match(r'([0-9]+)\..*?(?:tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]])', uri)
    if found:
        job, host = int(found[1]) // 2**12, found[2] or found[3]
        arguments['coordinator_address'] = f'{host}:{_port(environ, job)}'
    elif 'coordinator_address' not in hand:
        raise UserError(
            f'mpirun started {count} processes and does not tell where the first of them is; set '
            f'{" or ".join(_BY_HAND["coordinator_address"])} to host:port of rank 0.'
        )
    return arguments


def _slurm(environ, tpu_hosts, hand):
    # $SLURM_NTASKS is the allocation's, which an interactive shell sees too; the step's is how many were started.
    told = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
    if not all(environ.get(name) for name in told):
        return None
    count = _count('SLURM_STEP_NUM_TASKS', environ['SLURM_STEP_NUM_TASKS'])
    if count < 2:
        return None
    # 'node001', 'node001,host2', 'node[001-015],host2' or 'node[001,007-015],host2'
    host = ''.join(re.match(r'([^,\[]+)\[?([^,\-\]]*)', environ['SLURM_STEP_NODELIST']).groups())
    port = _port(environ, _count('SLURM_JOB_ID', environ['SLURM_JOB_ID']))
    local = _count('SLURM_LOCALID', environ['SLURM_LOCALID'])
    return {
        'coordinator_address': f'{host}:{port}',
        'num_processes': count,
        'process_id': _count('SLURM_PROCID', environ['SLURM_PROCID']),
        **_own_devices(environ, local, _tasks_here(environ)),
    }


def _tasks_here(environ):
    """Tasks of the step on this node, from '2(x3),1' and the node's number."""
    each = []
    for part in environ.get('SLURM_STEP_TASKS_PER_NODE', '1').split(','):
        tasks, nodes = re.fullmatch(r'([0-9]+)(?:\(x([0-9]+)\))?', part).groups()
        each += [int(tasks)] * int(nodes or 1)
    node = _count('SLURM_NODEID', environ.get('SLURM_NODEID', '0'))
    return each[node] if node < len(each) else 1


def _own_devices(environ, local, here):
    """Which GPUs of the node are this process's, of `here` processes on it: an equal share of those that it sees.

    All that it sees where it is alone on the node, or where the launcher has dealt them out already.
    """
    seen = [name for name in environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    bound = 'SLURM_GPUS_PER_TASK' in environ or (seen and len(seen) < here)
    if here < 2 or bound or 'JAX_LOCAL_DEVICE_IDS' in environ:
        return {}
    share = len(seen) // here or 1
    return {'local_device_ids': list(range(local * share, (local + 1) * share))}


def _port(environ, job):
    """$JAX_COORDINATOR_PORT, or one that two jobs of a machine seldom share; the same as JAX takes."""
    return environ.get('JAX_COORDINATOR_PORT') or job % 2**12 + (65535 - 2**12 + 1)


def _tpu_pod(environ, tpu_hosts, hand):
    hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES') or ''
    slices = _count('MEGASCALE_NUM_SLICES', environ.get('MEGASCALE_NUM_SLICES') or '1')
    several = max(tpu_hosts, len(hosts.split(','))) * slices > 1
    return {} if several else None  # JAX asks the machine for the rest


def _kubernetes(environ, tpu_hosts, hand):
    if 'KUBERNETES_SERVICE_HOST' not in environ or 'JOB_COMPLETION_INDEX' not in environ:
        return None
    index = {'process_id': _count('JOB_COMPLETION_INDEX', environ['JOB_COMPLETION_INDEX'])}
    if {'coordinator_address', 'num_processes'} <= hand.keys():
        return index
    if find_spec('kubernetes') is None:
        raise UserError(
            'this is a pod of an indexed Kubernetes job: set JAX_NUM_PROCESSES (1 if it works alone) and '
            'JAX_COORDINATOR_ADDRESS (host:port of pod 0), or pip install kubernetes to have them found.'
        )
    return index


def _hosts_of_tpu_vm():
    """How many hosts the TPU slice of this Google Cloud machine has; 1 where there is no TPU."""
    from jax._src import cloud_tpu_init  # JAX detects TPU pods itself, but has no public name for it

    if not cloud_tpu_init.running_in_cloud_tpu_vm or 'TPU_SKIP_MDS_QUERY' in os.environ:
        return 1
    from jax._src.clusters import GceTpuCluster

    try:
        return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1
    except OSError:
        return 1  # a TPU elsewhere, without Google Cloud's metadata
