"""Checks of a run under way: its numbers are finite, and its data are those that its checkpoints were trained on."""

import numpy as np

from cfg_jax.errors import UserError
from cfg_jax.files import composed


def check_finite(step, metrics, checkpoints, *, quarter_edges):
    """Raise UserError if the loss, the gradient or the parameters of a step are not finite.

    The text names the step, the quarters of λ (edges: [5], increasing) and the last good checkpoint. A checkpoint
    whose parameters gave such a loss is moved aside.
    """
    if all(np.isfinite(metrics[key]) for key in ('loss', 'grad_norm', 'param_norm')):
        return
    bad_quarters = [
        f'{low:.3g} to {high:.3g}'
        for low, high, value in zip(quarter_edges[:-1], quarter_edges[1:], metrics['quarter_sums'])
        if not np.isfinite(value)
    ]
    if bad_quarters:
        problem = f'loss is not finite at λ in {" and ".join(bad_quarters)}'
        if checkpoints.latest_step() == step - 1:
            checkpoints.condemn(step - 1)  # its parameters gave this loss
    else:
        problem = 'gradient or the update is not finite'
    last = checkpoints.latest_step()
    kept = 'there is no checkpoint yet' if last is None else f'the last good checkpoint is {checkpoints.path(last)}'
    raise UserError(
        f'step {step}: the {problem}; {kept}. Rerun with a lower config.optim.learning_rate, with a '
        "config.optim.clip_norm that is lower or not 0 (off), or with config.model.dtype='float32'."
    )


def check_same_classes(class_names, saved_names, workdir):
    """Raise UserError unless the data's classes equal those saved in the checkpoints, in the same order."""
    if saved_names == tuple(map(str, range(len(saved_names)))):
        return  # an imported checkpoint, whose classes have no names
    for label, (name, saved) in enumerate(zip(class_names, saved_names)):
        if composed(name) != composed(saved):
            raise UserError(
                f'label {label} is {name!r} in the data but {saved!r} in the checkpoints of {workdir}; use the data '
                'that they were trained on, or another --workdir (config.data.data_dir).'
            )
