"""What the processes of one job do by turns or together. In a job of one process it costs nothing."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from cfg_jax.errors import UserError


def is_first():
    """Whether this is the process that writes what all of them share."""
    return jax.process_index() == 0


def wait_for_all(what):
    """Returns once every process has come here. what: a name for the place, the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def of_first(array):
    """Process 0's numpy array, in every process; the others' has its shape and dtype."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


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
    failed = of_first(np.bool_(failure is not None))
    if failure:
        raise failure
    if failed:
        raise UserError('process 0 cannot go on, and says why.')
    return result
