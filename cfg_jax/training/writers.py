"""What a long job shows while it runs: progress lines, metrics.jsonl and TensorBoard files (without TensorFlow)."""

import json
from pathlib import Path

import numpy as np

from cfg_jax import files


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
