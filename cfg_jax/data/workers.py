"""A list of tasks, shared out among processes that say how far they are."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time

from cfg_jax.errors import UserError

_REPORT_SECONDS = 0.25
_ONE_THREAD = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')


def run(do, tasks, num_workers, report):
    """Calls do(task, report) for every task, in `num_workers` spawned processes, each taking the next when it is free.

    do: picklable. report(done, skipped): counts, which are added up in the process and reach the caller's own `report`
    a few times a second. A UserError of `do` is raised here; so is one where a process dies.
    """
    processes, waiting = {}, list(reversed(tasks))
    try:
        for _ in range(min(num_workers, len(tasks))):
            connection, process = _start(do)
            processes[connection] = process
            connection.send(waiting.pop())
        busy = set(processes)
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                message = connection.recv()
                if isinstance(message, str):
                    raise UserError(message)
                if message is not None:
                    report(*message)
                elif waiting:
                    connection.send(waiting.pop())
                else:
                    busy.remove(connection)
    except (EOFError, ConnectionError):
        time.sleep(0.1)  # until the system knows how it ended
        statuses = [process.exitcode for process in processes.values() if process.exitcode is not None]
        raise UserError(
            f'a process that prepares images died (exit status {statuses[0] if statuses else "unknown"}; -9 is often '
            'a lack of memory: try a smaller config.prepare.num_workers); the same command goes on from there.'
        ) from None
    finally:
        for process in processes.values():
            process.kill()


def _start(do):
    """(our end of its pipe, a process that waits for tasks), whose NumPy keeps to the core that it has."""
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, do), daemon=True)
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    return ours, process


def _work(connection, do):
    """A process's life: it ends with its parent, whose pipe breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task, counts = connection.recv(), _Counts(connection)
            try:
                do(task, counts.add)
            except UserError as error:
                connection.send(str(error))
                return
            counts.send()
            connection.send(None)


class _Counts:
    def __init__(self, connection):
        self._connection, self._done, self._skipped, self._last = connection, 0, 0, time.monotonic()

    def add(self, done, skipped):
        self._done, self._skipped = self._done + done, self._skipped + skipped
        if time.monotonic() - self._last > _REPORT_SECONDS:
            self.send()

    def send(self):
        self._connection.send((self._done, self._skipped))
        self._done, self._skipped, self._last = 0, 0, time.monotonic()
