"""How the processes of a job stop at the same step, and end together with one line.

They exchange messages through the key-value store of JAX's coordination service. A thread of its own reads them, and
acts on signals too: the main thread may be compiling, or waiting for a disk or for another process's computation.
"""

import contextlib
import io
import json
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback

from cfg_jax import files
from cfg_jax.distributed import join

CRASHED, USER_ERROR, PREEMPTED, INTERRUPTED = 1, 2, 75, 130  # exit statuses
_STATUS = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}
_WORDS = {PREEMPTED: 'preempted', INTERRUPTED: 'stopped'}
_RESUME = 'rerun the same command to resume from what was saved'
_POLL_SECONDS = 0.5
_TWICE_SECONDS = 0.5  # one Ctrl-C may come twice: from the terminal, and from a program that passes it on
_STALL_SECONDS = 2.0  # after a signal, a batch may take so long; one that takes longer may never come
_ALL_STALL_SECONDS = 6.0  # the same with several processes, which lose the steps since the last checkpoint
_WRITE_STALL_SECONDS = 6.0  # after a signal, writing may stand still so long
_LEAVE_SECONDS = 3.0  # once everything is saved, closing files and ending threads may take so long
_GRACE_SECONDS = 3.0  # the other processes may find the same error by themselves, and leave before the first one
_KEYS = 'cfg_jax/job/'


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, and everything worth saving is saved. Its text is one line; status: the exit status."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status

    def _render_traceback_(self):
        """Return the lines that a notebook shows in place of a traceback."""
        return [str(self)]


class Job:
    """This process's part in the job. A process that works alone is a job too, which reacts to signals only."""

    def __init__(self):
        self.index, self.count, self._client = 0, 1, None
        self._lock = threading.Lock()  # guards the next two
        self._step = None  # the last step done; None while there is nothing to save
        self._stop_at = None  # the step to stop at, once agreed on
        self._status, self._requested = PREEMPTED, None  # of the signal that stops the job; the time when it came
        self._waits = []  # what is being waited for: `_Wait`s
        self._ending, self._finished = threading.Lock(), threading.Event()
        self._hosted = False

    def watch(self):
        """Handle SIGTERM and Ctrl-C from now on: outside of `stepping` they end the job at once, with 75 and 130.

        Python would raise KeyboardInterrupt only after a compilation, and crash in it. A process that was started with
        SIGINT ignored, as a shell's background jobs are, goes on ignoring it.
        """
        self._signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in _STATUS:
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGTERM:
                signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def hosted(self):
        """Context manager: the job is part of a program that goes on after it, such as a notebook.

        Ctrl-C in `stepping` makes `reached` true; a second one, or one outside of `stepping`, raises KeyboardInterrupt.
        """

        def interrupted(*_):
            with self._lock:
                steps, again = self._step is not None, self.stopping
            if not steps or again:
                raise KeyboardInterrupt
            print('stopping after this step, to save it', flush=True)
            with self._lock:
                self._status, self._requested, self._stop_at = INTERRUPTED, time.monotonic(), self._step + 1

        in_main_thread = threading.current_thread() is threading.main_thread()
        former = signal.signal(signal.SIGINT, interrupted) if in_main_thread else None
        self._lock = threading.RLock()  # a signal's handler may come while the main thread holds it
        self._hosted = True
        try:
            yield
        finally:
            self._hosted, self._stop_at, self._requested, self._step = False, None, None, None
            if in_main_thread:
                signal.signal(signal.SIGINT, former)

    def joined(self):
        """Listen to the other processes too, once jax.distributed is initialised. Only process 0 keeps its stdout."""
        jax_job = join.jax_job()
        self.index, self.count = jax_job.process_id, jax_job.num_processes
        if self.index:
            sys.stdout, sys.stderr = _Silent(), _Prefixed(sys.stderr, f'[{self.index}] ')
        self._client = jax_job.client

    @contextlib.contextmanager
    def stepping(self, step):
        """Return a context in which a signal makes `reached` true, at the same step everywhere, instead of an end.

        A second Ctrl-C does end it. step: the last one done before.
        """
        with self._lock:
            self._step = step
        try:
            yield
        finally:
            with self._lock:
                self._step = None

    def reached(self, step):
        """Return True if `step`, which has just been done, is the one to save and to stop at."""
        with self._lock:
            self._step = step
            return self.stopping and step >= self._stop_at

    @property
    def stopping(self):
        """True once a step to stop at has been agreed on."""
        return self._stop_at is not None

    def unless_stopped(self, wait):
        """Return wait(), or None if the job is to stop and wait() does not return: then save what there is.

        wait() may hang for ever, so it runs in a thread of its own. With several processes none of them could save
        without this one's next step, so the job ends.
        """
        results = queue.SimpleQueue()

        def put():
            try:
                results.put((wait(), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=put, daemon=True).start()
        start, seconds = time.monotonic(), _STALL_SECONDS if self.count == 1 else _ALL_STALL_SECONDS
        while True:
            with contextlib.suppress(queue.Empty):
                result, error = results.get(timeout=_POLL_SECONDS)
                if error is not None:
                    raise error
                return result
            if self._requested and time.monotonic() - max(self._requested, start) > seconds:
                if self.count == 1:
                    return None
                self.end(self._status, f'{_WORDS[self._status]} while waiting for a batch: {_RESUME}')

    @contextlib.contextmanager
    def waiting(self, what, size=lambda: 0):
        """Return a context that a signal ends with the whole job, if it lasts and `size` stands still: a disk may hang.

        what: its name, 'writing a checkpoint'. size: a function that returns the bytes written so far.
        """
        wait = _Wait(what, size, time.monotonic())
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)
            wait.over = True

    def _check_waits(self):
        """End the job if a signal has come and something that is waited for stands still."""
        for wait in self._waits.copy():
            if wait.seconds_still(self._requested) > _WRITE_STALL_SECONDS:
                self.end(self._status, f'{_WORDS[self._status]} while {wait.what}: {_RESUME}')

    def stopped(self, step):
        """Return the `Stopped` of a job whose `step` is saved; the process now ends soon, whatever hangs in it."""
        line = f'{_WORDS[self._status]}: step {step} is saved; rerun the same command to resume from it'
        if self._hosted:
            return Stopped(self._status, line.replace('command', 'call'))

        def leave():
            time.sleep(_LEAVE_SECONDS + (2 * _GRACE_SECONDS if self.count > 1 else 0))
            if self._ending.acquire(blocking=False):
                _show(line)
            self._exit(self._status)

        threading.Thread(target=leave, daemon=True).start()
        return Stopped(self._status, line)

    def finish(self):
        """Wait until every process has finished its work, and leave the job."""
        if self.count > 1:
            self._send('ended', [0, ''])
            while len(self._received('ended')) < self.count:
                time.sleep(0.1)
            self._finished.set()
            self._thread.join()
            import jax

            jax.distributed.shutdown()

    def end(self, status, line, *, lost=False):
        """End this process with this status and line on stderr, and the others with the same; never returns.

        The first process prints its line, another one only a line that differs from the first one's. lost: this
        process fails only because another one did; it takes that one's status and line, if it left any.
        """
        self._ending.acquire()  # and never released: the process ends in one thread
        if self.count > 1:
            if lost:
                status, line = self._end_of_another() or (status, line)
            self._send('ended', [status, line])
            first = self._wait_to_leave()
            if self.index and first and (lost or first[1] == line):
                line = ''
        showing = threading.Thread(target=_show, args=(line,), daemon=True)
        showing.start()
        showing.join(1)  # what reads the output may have stopped reading
        if self.count == 1 and threading.current_thread() is threading.main_thread():
            sys.exit(status)
        self._exit(status)

    def _exit(self, status):
        """End the process from any thread: a normal exit would wait for the main thread or other processes in vain."""
        files.remove_unfinished()
        os._exit(status)

    def crash(self, error):
        """End the job because of an unexpected exception; raise it again in a process that works alone."""
        if self.count == 1:
            raise error
        name = type(error).__name__
        if name == 'JaxRuntimeError' and ('Gloo' in str(error) or 'UNAVAILABLE' in str(error)):
            self.end(CRASHED, 'error: another process of the job was lost; start all of them again.', lost=True)
        traceback.print_exception(error)
        self.end(CRASHED, f'error: {name}: {" ".join(str(error).split())[:300]}')

    def _wait_to_leave(self):
        """Give the others time to notice, and return the first process's end, or None.

        The first process keeps the store, so it leaves last.
        """
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            ended = self._received('ended')
            if 0 in ended and (self.index or len(ended) == self.count):
                break
            time.sleep(0.05)
        if not self.index:
            time.sleep(0.5)
        return self._received('ended').get(0)

    def _end_of_another(self):
        """Return (status, line) of another process that has failed, None if none has within the grace period."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            for index, (status, line) in sorted(self._received('ended').items()):
                if status and index != self.index:
                    if status in _WORDS or line.startswith('error: process '):
                        return status, line
                    return status, f'error: process {index}: {line.removeprefix("error: ")}'
            time.sleep(0.05)
        return None

    def _listen(self):
        """Watch for signals and for the other processes until the job is finished."""
        while not self._finished.is_set():
            ready, _, _ = select.select([self._signals], [], [], _POLL_SECONDS)
            for number in os.read(self._signals, 1024) if ready else ():
                if number in _STATUS:
                    self._signalled(_STATUS[number])
            if self.count > 1 and self._client is not None:
                self._check_the_others()
            if self._requested:
                self._check_waits()

    def _check_the_others(self):
        if any(status for status, _ in self._received('ended').values()):
            time.sleep(_GRACE_SECONDS - 1)  # this process may find the same error by itself
            self.end(CRASHED, '', lost=True)
        if not self.stopping and (asked := self._received('stop')):
            self._stop(max(asked.values()))

    def _signalled(self, status):
        """Stop because of a signal; at once if Ctrl-C comes after another signal, which was too slow for its user."""
        again = status == INTERRUPTED and self._requested and self._step is not None
        if again and time.monotonic() - self._requested > _TWICE_SECONDS:
            self.end(status, f'{_WORDS[status]} without saving: {_RESUME}')
        self._stop(status)

    def _stop(self, status):
        """Agree with the other processes to stop one step after the latest that any of them has done."""
        with self._lock:
            if self._step is None:
                self.end(status, f'{_WORDS[status]}: {_RESUME}')
            if self.stopping:
                return
            self._status, self._requested = status, time.monotonic()
            steps = {0: self._step}
            if self.count > 1:
                self._send('stop', status)
                self._send('step', self._step)
                while len(steps := self._received('step')) < self.count:
                    if any(status for status, _ in self._received('ended').values()):
                        return  # the job ends anyway
                    time.sleep(0.02)
            self._stop_at = max(steps.values()) + 1

    def _send(self, topic, value):
        with contextlib.suppress(Exception):  # without the first process there is no store, and JAX ends this process
            self._client.key_value_set(f'{_KEYS}{topic}/{self.index}', json.dumps(value), allow_overwrite=True)

    def _received(self, topic):
        """Return {process: the value it last sent}."""
        try:
            entries = self._client.key_value_dir_get(f'{_KEYS}{topic}/')
        except Exception:
            return {}
        return {int(key.rpartition('/')[2]): json.loads(value) for key, value in entries}


def _show(line):
    """Print the line that says why the job ends."""
    if line:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()


class _Wait:
    """Something that the job waits for."""

    def __init__(self, what, size, start):
        self.what, self._size, self._moved, self._measured = what, size, start, None
        self.over = False

    def seconds_still(self, requested):
        """Return the seconds since its size changed, since it began, or since the signal came, whichever is least."""
        if self._measured is None:
            self._measured = -1
            threading.Thread(target=self._measure, daemon=True).start()  # which may hang too
        return time.monotonic() - max(self._moved, requested)

    def _measure(self):
        while not self.over:
            with contextlib.suppress(OSError):  # a file that has just been renamed
                if (size := self._size()) != self._measured:
                    self._measured, self._moved = size, time.monotonic()
            time.sleep(_POLL_SECONDS)


class _Silent(io.TextIOBase):
    """A text stream that drops what is written."""

    def write(self, text):
        return len(text)


class _Prefixed:
    """A text stream that puts a prefix before every line."""

    def __init__(self, stream, prefix):
        self._stream, self._prefix, self._at_line_start = stream, prefix, True

    def write(self, text):
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._at_line_start else line)
            self._at_line_start = line.endswith('\n')
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


the_job = Job()
