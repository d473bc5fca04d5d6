"""What a long job shows while it runs: progress lines, metrics.jsonl and TensorBoard files (without TensorFlow)."""

import json
import time
from pathlib import Path

import numpy as np

from cfg_jax import files


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


class MetricWriter:
    """Appends scalars to `workdir`/metrics.jsonl and to TensorBoard event files, images to the latter.

    step: the step that a run resumes from; what an earlier process wrote beyond it is dropped, for it comes again.
    """

    def __init__(self, workdir, step=0):
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        self._path = workdir / 'metrics.jsonl'
        self._drop_after(step)
        self._file = self._path.open('a')
        self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1)

    def scalars(self, step, values):
        """values: {name: float}; those that are not finite (nothing was counted) are left out."""
        values = {name: float(value) for name, value in values.items() if np.isfinite(value)}
        self._file.write(json.dumps({'step': step, **values}) + '\n')
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step, name, image):
        """image: uint8 [H, W, C]."""
        self._board.add_image(name, image, step, dataformats='HWC')
        self._board.flush()

    def close(self):
        self._file.close()
        self._board.close()

    def _drop_after(self, step):
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)['step'] <= step:
                    kept.append(line + '\n')
            except (ValueError, KeyError):  # the line that a kill cut short
                continue
        files.write(self._path, ''.join(kept).encode())


class SilentWriter:
    """A `MetricWriter` that writes nothing, for every process but the first."""

    def scalars(self, step, values):
        """Nothing."""

    def image(self, step, name, image):
        """Nothing."""

    def close(self):
        """Nothing."""
