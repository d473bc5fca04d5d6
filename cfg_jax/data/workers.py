"""Worker processes: they share out tasks, and they end with their parent."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from cfg_jax.errors import UserError

_REPORT_SECONDS = 0.25
_ENVIRONMENT = {
    **dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1'),  # NumPy: a core each
    'PYTHONWARNINGS': 'ignore:resource_tracker',  # after SIGKILL or SIGTERM it cleans up, and need not say so
}


def run(do, tasks, num_workers, report):
    """Call do(task, report) for every task, in `num_workers` spawned processes.

    do: picklable. report(done, skipped): counts. The workers' counts are added up, and reach the caller's own `report`
    a few times a second. An exception of `do` ends the other workers and is raised here. Raises UserError if a worker
    dies.
    """
    context, others = multiprocessing.get_context('spawn'), set(multiprocessing.active_children())
    with _environment():
        counts, reported = context.Array('q', 2), (0, 0)  # done, skipped
    pool = ProcessPoolExecutor(num_workers, context, _begin, (do, counts))
    try:
        with _environment():
            pending = {pool.submit(_work, task) for task in tasks}  # which starts the workers
        processes = set(multiprocessing.active_children()) - others
        while pending:
            finished, pending = wait(pending, _REPORT_SECONDS, FIRST_EXCEPTION)
            total = tuple(counts.get_obj())  # without the lock: a worker may have died with it
            report(total[0] - reported[0], total[1] - reported[1])
            reported = total
            for future in finished:
                future.result()
    except BrokenProcessPool:
        pool.shutdown()  # it has terminated the others, and knows now how each ended
        codes = [p.exitcode for p in processes if p.exitcode not in (None, 0, -signal.SIGTERM)]
        raise UserError(
            f'a process that prepares images died (exit status {codes[0] if codes else "unknown"}; -9 is often a lack '
            'of memory: try a smaller config.prepare.num_workers); rerun the same command to resume.'
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown()


@contextlib.contextmanager
def _environment():
    """Set `_ENVIRONMENT` for the processes that are started within."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin(do, counts):
    """Prepare a worker; what it needs for all tasks is sent once."""
    global _do, _counts
    _do, _counts = do, counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    end_with_parent()


def _work(task):
    _do(task, _count)


def _count(done, skipped):
    with _counts.get_lock():
        _counts[0] += done
        _counts[1] += skipped


def end_with_parent():
    """Make this worker exit once its parent is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()

    def end():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
