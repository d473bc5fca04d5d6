"""What the processes of a job owe each other: to stop at the same step, and to end together with one line.

They talk through the key-value store of JAX's coordination service, from a thread of their own, so that a process
that waits for another one's computation still hears.
"""

import contextlib
import io
import json
import os
import select
import signal
import sys
import threading
import time
import traceback

CRASHED, USER_ERROR, PREEMPTED, INTERRUPTED = 1, 2, 75, 130  # exit statuses
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for the other processes to find the same error themselves, and to leave before the first one
_AT_ONCE = 'preempted: the same command goes on from the last that was saved'
_KEYS = 'cfg_jax/job/'


class Preempted(Exception):
    """SIGTERM came, and what there was to save is saved. Its text is one line."""


class Job:
    """This process's side of it. One process alone is a job too, which hears signals only."""

    def __init__(self):
        self.index, self.count, self._client = 0, 1, None
        self._lock = threading.Lock()  # of the two steps
        self._step = self._stop_at = None  # _step: the last one done, None where there is nothing to save
        self._ending, self._finished = threading.Lock(), threading.Event()

    def watch(self):
        """From now on SIGTERM is heard: outside of `stepping` it ends the job at once, with status 75."""
        self._signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def joined(self):
        """Once jax.distributed is initialised: the others are heard too, and only the first process has a stdout."""
        from jax._src import distributed  # the store has no public name; Orbax takes it from here too

        state = distributed.global_state
        self.index, self.count = state.process_id, state.num_processes
        if self.index:
            sys.stdout, sys.stderr = _Silent(), _Prefixed(sys.stderr, f'[{self.index}] ')
        self._client = state.client

    @contextlib.contextmanager
    def stepping(self, step):
        """Within, SIGTERM makes `reached` true at a step, the same in all processes. step: the last one done."""
        with self._lock:
            self._step = step
        try:
            yield
        finally:
            with self._lock:
                self._step = None

    def reached(self, step):
        """Whether this step, which is done, is the one to save and to stop at."""
        with self._lock:
            self._step = step
            return self.stopping and step >= self._stop_at

    @property
    def stopping(self):
        """Whether a step to stop at has been agreed on."""
        return self._stop_at is not None

    def finish(self):
        """Returns once every process has come here, having done its work."""
        if self.count > 1:
            self._tell('ended', [0, ''])
            while len(self._told('ended')) < self.count:
                time.sleep(0.1)
            self._finished.set()
            self._thread.join()
            import jax

            jax.distributed.shutdown()

    def end(self, status, line, *, lost=False):
        """Ends this process with this status and line on stderr, and the others with the same; never returns.

        The first process shows a line; another one only what is its own. lost: this is but the consequence of another
        process's end, so that what that one has said comes first.
        """
        self._ending.acquire()  # for good: the process ends in one thread
        if self.count > 1:
            if lost:
                status, line = self._end_of_another() or (status, line)
            self._tell('ended', [status, line])
            first = self._wait_to_leave()
            if self.index and first and (lost or first[1] == line):
                line = ''
        if line:
            print(line, file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        if self.count == 1 and threading.current_thread() is threading.main_thread():
            sys.exit(status)
        os._exit(status)  # what waits for other processes at a normal exit would wait in vain

    def crash(self, error):
        """`end` for an exception that nobody expected."""
        if self.count == 1:
            raise error
        name = type(error).__name__
        if name == 'JaxRuntimeError' and ('Gloo' in str(error) or 'UNAVAILABLE' in str(error)):
            self.end(CRASHED, 'error: another process of the job was lost; start all of them again.', lost=True)
        traceback.print_exception(error)
        self.end(CRASHED, f'error: {name}: {" ".join(str(error).split())[:300]}')

    def _wait_to_leave(self):
        """Lets the others hear of the end; the first process, whose store it is, leaves last. Its end, or None."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            ended = self._told('ended')
            if 0 in ended and (self.index or len(ended) == self.count):
                break
            time.sleep(0.05)
        if not self.index:
            time.sleep(0.5)
        return self._told('ended').get(0)

    def _end_of_another(self):
        """(status, line) of a process that has ended badly, after waiting for one a while; None if there is none."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            for index, (status, line) in sorted(self._told('ended').items()):
                if status and index != self.index:
                    if status == PREEMPTED or line.startswith('error: process '):
                        return status, line
                    return status, f'error: process {index}: {line.removeprefix("error: ")}'
            time.sleep(0.05)
        return None

    def _listen(self):
        while not self._finished.is_set():
            ready, _, _ = select.select([self._signals], [], [], _POLL_SECONDS)
            if ready and signal.SIGTERM in os.read(self._signals, 1024):
                self._stop()
            if self.count > 1 and self._client is not None:
                self._hear()

    def _hear(self):
        if any(status for status, _ in self._told('ended').values()):
            time.sleep(_GRACE_SECONDS - 1)  # this process may find the same error by itself
            self.end(CRASHED, '', lost=True)
        if not self.stopping and self._told('stop'):
            self._stop()

    def _stop(self):
        """Agrees with the other processes on the step after the last that any of them has done."""
        with self._lock:
            if self._step is None:
                self.end(PREEMPTED, _AT_ONCE)
            if self.stopping:
                return
            steps = {0: self._step}
            if self.count > 1:
                self._tell('stop', True)
                self._tell('step', self._step)
                while len(steps := self._told('step')) < self.count:
                    if any(status for status, _ in self._told('ended').values()):
                        return  # the job ends anyway
                    time.sleep(0.02)
            self._stop_at = max(steps.values()) + 1

    def _tell(self, what, value):
        with contextlib.suppress(Exception):  # without the first process there is no store, and JAX ends this one
            self._client.key_value_set(f'{_KEYS}{what}/{self.index}', json.dumps(value), allow_overwrite=True)

    def _told(self, what):
        """{process: what it told}."""
        try:
            entries = self._client.key_value_dir_get(f'{_KEYS}{what}/')
        except Exception:
            return {}
        return {int(key.rpartition('/')[2]): json.loads(value) for key, value in entries}


class _Silent(io.TextIOBase):
    """A text stream that keeps nothing."""

    def write(self, text):
        return len(text)


class _Prefixed:
    """A text stream whose lines begin with the process's number."""

    def __init__(self, stream, prefix):
        self._stream, self._prefix, self._fresh = stream, prefix, True

    def write(self, text):
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._fresh else line)
            self._fresh = line.endswith('\n')
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


the_job = Job()
