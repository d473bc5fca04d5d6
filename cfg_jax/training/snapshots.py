"""The snapshots of a run's averages, kept as checkpoints are, and an average of any length made of them (`phema`)."""

from pathlib import Path

import jax
import numpy as np

from cfg_jax import phema
from cfg_jax.errors import UserError
from cfg_jax.progress import Progress
from cfg_jax.training.checkpoints import Checkpoints


def open_to_write(workdir, identity, *, defaults):
    """Return the `Checkpoints` of a run's snapshots, all of which stay."""
    options = {'keep': None, 'saving': 'raise config.optim.ema_snapshot_every'}
    return Checkpoints(_folder(workdir), identity, defaults=defaults, **options)


def open_to_read(workdir, identity, *, defaults):
    """Return the `Checkpoints` of a workdir's snapshots; UserError if it has none."""
    if _folder(workdir).is_dir():
        snapshots = Checkpoints(_folder(workdir), identity, defaults=defaults, read_only=True)
        if snapshots.latest_step() is not None:
            return snapshots
        snapshots.close()
    raise UserError(
        f'no snapshots in {_folder(workdir)}, of which an EMA of a given length is made; train with '
        "config.optim.ema_lengths='(0.05,0.1)' and config.optim.ema_snapshot_every, or leave the EMA at True."
    )


def _folder(workdir):
    return Path(workdir) / 'ema_snapshots'


def weights_at(snapshots, length, step):
    """Return {step: {name: weight}} of the snapshots up to `step` in the average of `length`.

    Raises UserError if there is no snapshot of that step, or if they cannot give that length.
    """
    snapshots.require(step)
    lengths = snapshots.saved_config()['optim']['ema_lengths']
    steps = [each for each in snapshots.steps() if each <= step]
    found = phema.snapshot_weights(lengths, steps, length, step)
    return {each: dict(zip([f'{one:g}' for one in lengths], row)) for each, row in zip(steps, found)}


def reconstructed(snapshots, abstract_params, length, step=None):
    """Return the average of `length` at a step as `Restored`, the newest snapshot's step by default.

    Its tree holds float32 numpy arrays. abstract_params: shapes, dtypes and shardings in which snapshots are read.
    """
    weights = weights_at(snapshots, length, snapshots.latest_step() if step is None else step)
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_params)
    progress = Progress(len(weights))
    for number, (each, of_names) in enumerate(weights.items(), 1):
        restored = snapshots.restore_parts(dict.fromkeys(of_names, abstract_params), step=each)
        for name, weight in of_names.items():
            part = jax.device_get(restored.tree[name])
            total = jax.tree.map(lambda a, p, weight=weight: a + weight * p, total, part)
        progress.show(number, f'EMA of length {length:g}', unit='snapshots')
    return restored._replace(tree=jax.tree.map(np.float32, total))
