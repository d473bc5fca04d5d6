"""Progress lines for long work: units done, rate, and time left."""

import contextlib
import threading
import time

_SHOWN_SECONDS = 20


def duration(seconds):
    """Return seconds as text: '45s', '12m05s', '3h07m' or '2d04h'."""
    seconds = int(seconds)
    for unit, size, below, below_size in (('d', 86400, 'h', 3600), ('h', 3600, 'm', 60), ('m', 60, 's', 1)):
        if seconds >= size:
            return f'{seconds // size}{unit}{seconds % size // below_size:02d}{below}'
    return f'{seconds}s'


class Progress:
    """Rate and time left of work that counts `total` units, `done` of them before this process started."""

    def __init__(self, total, done=0):
        self.total, self._last_done = total, done
        self._start = self._last_time = time.monotonic()

    def seconds(self):
        """Return the seconds since the last call of `rate`, or since the start."""
        return time.monotonic() - self._last_time

    def show(self, done, name, *, unit='images', every=10.0):
        """Print '<name>  <done>/<total> <unit>  <rate>  <time left>', at most once in `every` seconds.

        The last unit is always shown, unless all of the work took less than a second.
        """
        last = done == self.total and time.monotonic() - self._start > 1
        if self.seconds() < every and not last:
            return
        rate, left = self.rate(done)
        print(f'{name}  {done}/{self.total} {unit}  {rate:.1f} {unit}/s  {left} left', flush=True)

    def rate(self, done):
        """Return (units per second since the last call, time left at that rate as text)."""
        now = time.monotonic()
        rate = (done - self._last_done) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_done = now, done
        return rate, duration((self.total - done) / max(rate, 1e-9))


@contextlib.contextmanager
def shown(what):
    """Return a context that prints every 20 s for how long `what` has been running."""
    finished, start = threading.Event(), time.monotonic()

    def show():
        while not finished.wait(_SHOWN_SECONDS):
            print(f'{what} for {duration(time.monotonic() - start)}', flush=True)

    threading.Thread(target=show, daemon=True).start()
    try:
        yield
    finally:
        finished.set()
