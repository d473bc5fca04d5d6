"""Waiting for each other and sharing values, for the processes of one job. A job of one process pays nothing for it.

They wait in the store of JAX's coordination service, not in a collective: a CPU's first collective gives up after 30
seconds, and a GPU's keeps the device busy. If process 0 dies, the service ends the others.
"""

import itertools
import json
import time
import uuid

import jax

from cfg_jax.distributed.join import jax_job
from cfg_jax.errors import UserError

_PROBE = '.seen_by_all_'  # begins the name of a file that all processes look for
_PROBE_SECONDS = 90  # network file systems remember for up to a minute that a file was missing
_WEEK_MS = 7 * 24 * 3600 * 1000
_call_number = itertools.count()  # all processes make these calls in the same order


def is_first():
    """Return True in process 0, which writes what all of them share."""
    return jax.process_index() == 0


def wait_for_all(what):
    """Wait until every process has made this call. what: a name for it, the same in all of them."""
    if jax.process_count() > 1:
        jax_job().client.wait_at_barrier(f'cfg_jax/{what}/{next(_call_number)}', _WEEK_MS)


def of_first(value):
    """Return process 0's value, which JSON can hold, in every process."""
    if jax.process_count() == 1:
        return value
    key = f'cfg_jax/of_first/{next(_call_number)}'
    if is_first():
        jax_job().client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(jax_job().client.blocking_key_value_get(key, _WEEK_MS))


def of_all(value):
    """Return the values of all processes, which JSON can hold, as a list in the order of processes."""
    if jax.process_count() == 1:
        return [value]
    key, store = f'cfg_jax/of_all/{next(_call_number)}', jax_job().client
    store.key_value_set(f'{key}/{jax.process_index()}', json.dumps(value))
    return [json.loads(store.blocking_key_value_get(f'{key}/{i}', _WEEK_MS)) for i in range(jax.process_count())]


def first_alone(work):
    """Return work() in process 0 and None in the others, which wait for it. If it raises UserError, all do."""
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    if is_first():
        try:
            result = work()
        except UserError as error:
            failure = error
    failed = of_first(failure is not None)
    if failure:
        raise failure
    if failed:
        raise UserError('process 0 has failed; its own error says why.')
    return result


def check_shared(folder):
    """Raise UserError unless all processes see what process 0 writes into the folder, if it has such a folder."""
    if jax.process_count() == 1:
        return
    name = None
    if is_first() and folder.is_dir():
        for old in folder.glob(f'{_PROBE}*'):  # left by a job that was killed here
            old.unlink(missing_ok=True)
        name = f'{_PROBE}{uuid.uuid4().hex}'
        (folder / name).touch()
    name = of_first(name)
    if name is None:
        return
    deadline = time.monotonic() + _PROBE_SECONDS
    while not (folder / name).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = of_all((folder / name).exists())
    if is_first():
        (folder / name).unlink(missing_ok=True)
    if not all(seen):
        raise UserError(
            f'process {seen.index(False)} does not see the files that process 0 writes into {of_first(str(folder))}; '
            'all processes need the same folder, on a disk that they share (--workdir).'
        )
