"""Logs of a training run: metrics.jsonl and TensorBoard files (without TensorFlow)."""

import json
from pathlib import Path

import numpy as np

from cfg_jax import files


class MetricWriter:
    """Append scalars to `workdir`/metrics.jsonl and to TensorBoard event files, images to the latter.

    step: the step that the run resumes from; later lines of an earlier process are dropped, since they come again.
    """

    def __init__(self, workdir, step=0):
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        self._path = workdir / 'metrics.jsonl'
        self._drop_after(step)
        self._file = self._path.open('a')
        self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1)

    def scalars(self, step, values):
        """Append values, {name: float}; those that are not finite (a mean over nothing) are left out."""
        values = {name: float(value) for name, value in values.items() if np.isfinite(value)}
        self._file.write(json.dumps({'step': step, **values}) + '\n')
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step, name, image):
        """Append a picture, uint8 [H, W, C]."""
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
            except (ValueError, KeyError):  # a line that a kill cut short
                continue
        files.write(self._path, ''.join(kept).encode())


class SilentWriter:
    """A `MetricWriter` that writes nothing, for every process but the first."""

    def scalars(self, step, values):
        """Do nothing."""

    def image(self, step, name, image):
        """Do nothing."""

    def close(self):
        """Do nothing."""
