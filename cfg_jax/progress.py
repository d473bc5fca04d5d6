"""Progress lines for long work: units done, rate, and time left."""

import contextlib
import threading
import time

_FIRST_SECONDS, _SHOWN_SECONDS = 5, 20  # of silence, before the first line that says what is being done, and the next


def duration(seconds):
    """Return seconds as text: '45s', '12m05s', '3h07m' or '2d04h'."""
    seconds = int(seconds)
    for unit, size, below, below_size in (('d', 86400, 'h', 3600), ('h', 3600, 'm', 60), ('m', 60, 's', 1)):
        if seconds >= size:
            return f'{seconds // size}{unit}{seconds % size // below_size:02d}{below}'
    return f'{seconds}s'


def rounded(rate):
    """Return a rate as text, which is never 0 for work that advances: '1234', '56', '7.8', '0.12'."""
    return f'{rate:.2g}' if rate < 1 else f'{rate:.1f}' if rate < 10 else f'{rate:.0f}'


class Progress:
    """Rate and time left of work that counts `total` units, `done` of them before this process started.

    compiles: the first call of `show` comes after the work that compiles, which the rate does not count.
    """

    def __init__(self, total, done=0, *, compiles=False):
        self.total, self._compiles = total, compiles
        self._done = self._last_done = done
        self._start = self._last_time = self._line_time = time.monotonic()

    def restart(self, done):
        """Count the rate from now on, since what came before was compiling."""
        self._last_time, self._last_done = time.monotonic(), done

    def seconds(self):
        """Return the seconds since the last call of `rate`, or since the start."""
        return time.monotonic() - self._last_time

    def show(self, done, name, *, unit='images', every=10.0):
        """Print '<name>  <done>/<total> <unit>  <rate>  <time left>', at most once in `every` seconds.

        The last unit is always shown, unless all of the work took less than a second.
        """
        self._done, first, self._compiles = done, self._compiles, False
        taken = time.monotonic() - self._start
        if first and done < self.total:
            self.restart(done)
            return
        if self.seconds() < every and not (done == self.total and taken > 1):
            return
        if first:
            speed = f'in {duration(taken)}'
        else:
            rate, left = self.rate(done)
            speed = f'{rounded(rate)} {unit}/s  {left} left'
        self._line_time = time.monotonic()
        print(f'{name}  {done}/{self.total} {unit}  {speed}', flush=True)

    def rate(self, done):
        """Return (units per second since the last call, time left at that rate as text)."""
        now = time.monotonic()
        rate = (done - self._last_done) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_done = now, done
        return rate, duration((self.total - done) / max(rate, 1e-9))

    def watched(self, name, *, unit='images'):
        """Return a context that says how long the work has taken whenever `show` has been silent for 20 s."""

        def line(seconds):
            if time.monotonic() - self._line_time < min(seconds, _SHOWN_SECONDS):
                return ''
            doing = '' if self._done else ', the first of them with compiling'
            return f'{name}  {self._done}/{self.total} {unit} after {duration(seconds)}{doing}'

        return _repeated(line)


def shown(what):
    """Return a context that prints for how long `what` has been running, after 5 s and then every 20 s."""
    return _repeated(lambda seconds: f'{what} for {duration(seconds)}')


@contextlib.contextmanager
def _repeated(line):
    """Return a context that prints line(seconds since the start) now and then, unless it is empty."""
    finished, start = threading.Event(), time.monotonic()

    def show():
        wait = _FIRST_SECONDS
        while not finished.wait(wait):
            wait = _SHOWN_SECONDS
            if text := line(time.monotonic() - start):
                print(text, flush=True)

    threading.Thread(target=show, daemon=True).start()
    try:
        yield
    finally:
        finished.set()
