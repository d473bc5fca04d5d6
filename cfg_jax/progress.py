"""Progress lines of long work: how far it is, at what rate, and the time left."""

import contextlib
import threading
import time

_SHOWN_SECONDS = 20


def duration(seconds):
    """'45s', '12m05s', '3h07m' or '2d04h'."""
    seconds = int(seconds)
    for unit, size, below, below_size in (('d', 86400, 'h', 3600), ('h', 3600, 'm', 60), ('m', 60, 's', 1)):
        if seconds >= size:
            return f'{seconds // size}{unit}{seconds % size // below_size:02d}{below}'
    return f'{seconds}s'


class Progress:
    """Rate and time left of a job that counts `total` units, of which `done` were done before this process."""

    def __init__(self, total, done=0):
        self.total, self._last_done = total, done
        self._start = self._last_time = time.monotonic()

    def seconds(self):
        """Since the last call of `rate`, or the start."""
        return time.monotonic() - self._last_time

    def show(self, done, name, *, unit='images', every=10.0):
        """Prints '<name>  <done>/<total> <unit>  <rate>  <time left>' every so many seconds.

        And once all are done, of what took more than a second.
        """
        last = done == self.total and time.monotonic() - self._start > 1
        if self.seconds() < every and not last:
            return
        rate, left = self.rate(done)
        print(f'{name}  {done}/{self.total} {unit}  {rate:.1f} {unit}/s  {left} left', flush=True)

    def rate(self, done):
        """(units a second since the last call, the time left at that rate as text)."""
        now = time.monotonic()
        rate = (done - self._last_done) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_done = now, done
        return rate, duration((self.total - done) / max(rate, 1e-9))


@contextlib.contextmanager
def shown(what):
    """Context manager: print every 20 s for how long `what` has been running."""
    finished, start = threading.Event(), time.monotonic()

    def show():
        while not finished.wait(_SHOWN_SECONDS):
            print(f'{what} for {duration(time.monotonic() - start)}', flush=True)

    threading.Thread(target=show, daemon=True).start()
    try:
        yield
    finally:
        finished.set()
