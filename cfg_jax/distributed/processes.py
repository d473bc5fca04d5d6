"""What the processes of one job do by turns or together. In a job of one process it costs nothing.

They wait for each other in the store of JAX's coordination service, not in a collective: the first of CPUs gives up
after 30 seconds, and those of GPUs keep the device busy. Where process 0 dies, the service ends the others.
"""

import itertools
import json
import time
import uuid

import jax

from cfg_jax.errors import UserError

_SHARED = '.seen_by_all_'
_SEEN_SECONDS = 90  # network file systems remember for up to a minute that a file was not there
_A_WEEK = 7 * 24 * 3600 * 1000  # in milliseconds
_numbers = itertools.count()  # of the calls, which all processes make in the same order


def is_first():
    """Whether this is the process that writes what all of them share."""
    return jax.process_index() == 0


def wait_for_all(what):
    """Returns once every process has come here. what: a name for the place, the same in all of them."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(f'cfg_jax/{what}/{next(_numbers)}', _A_WEEK)


def of_first(value):
    """Process 0's plain value (of JSON), in every process, once process 0 has come here."""
    if jax.process_count() == 1:
        return value
    key = f'cfg_jax/of_first/{next(_numbers)}'
    if is_first():
        _store().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_store().blocking_key_value_get(key, _A_WEEK))


def of_all(value):
    """The plain value of every process, a list by process, in all of them, once all have come here."""
    if jax.process_count() == 1:
        return [value]
    key = f'cfg_jax/of_all/{next(_numbers)}'
    _store().key_value_set(f'{key}/{jax.process_index()}', json.dumps(value))
    return [json.loads(_store().blocking_key_value_get(f'{key}/{i}', _A_WEEK)) for i in range(jax.process_count())]


def first_alone(work):
    """`work()` of process 0, while the others wait and get None. Its UserError ends them all."""
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
        raise UserError('process 0 cannot go on, and says why.')
    return result


def check_shared(folder):
    """Raises UserError unless all processes see what the first one writes into the folder, where it has one."""
    if jax.process_count() == 1:
        return
    name = None
    if is_first() and folder.is_dir():
        for old in folder.glob(f'{_SHARED}*'):  # of a job that was killed here
            old.unlink(missing_ok=True)
        name = f'{_SHARED}{uuid.uuid4().hex}'
        (folder / name).touch()
    name = of_first(name)
    if name is None:
        return
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (folder / name).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = of_all((folder / name).exists())
    if is_first():
        (folder / name).unlink(missing_ok=True)
    if not all(seen):
        raise UserError(
            f'process {seen.index(False)} does not see what process 0 writes into {of_first(str(folder))}; all need '
            'the same folder, on a disk that they share (--workdir).'
        )


def _store():
    from jax._src import distributed  # it has no public name; Orbax takes it from here too

    return distributed.global_state.client
