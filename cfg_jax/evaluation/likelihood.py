"""The bound on the data's likelihood under a model, in bits per dimension, over a set of real images."""

import math

import numpy as np

from cfg_jax.errors import UserError
from cfg_jax.progress import Progress

PARTS = ('total', 'prior', 'diffusion', 'reconstruction')
UNIFORM = 8.0  # bits per dimension of an 8-bit image if all 256 values are equally likely


def bits_per_dim(bound, source, *, num_images, batch_size, seed):
    """Return (means over the first images of a source, all if they are fewer, as a dict of numbers; each one's total).

    'total' and its parts 'prior', 'diffusion' and 'reconstruction', in bits per dimension; the 'standard_error' of the
    total, None for one image; 'num_images'. Raises UserError if any image's bound is not finite.

    bound(images uint8 [B, H, W, C], labels [B], image indices [B], seed) -> {part: [B]}.
    """
    count = min(num_images, len(source))
    batch_size = min(batch_size, count)
    progress, parts = Progress(count), []
    for start in range(0, count, batch_size):
        indices = np.arange(start, min(start + batch_size, count))
        filled = np.resize(indices, batch_size)  # one shape, one compilation
        batch = source.batch(filled)
        terms = bound(batch['image'], batch['label'], filled.astype(np.uint32), np.uint32(seed))
        parts.append({key: np.asarray(terms[key], np.float64)[: len(indices)] for key in PARTS})
        bad = indices[~np.isfinite(parts[-1]['total'])]
        if len(bad):
            raise UserError(
                f'the bound of image {bad[0]} is {parts[-1]["total"][bad[0] - start]}, not a finite number: the '
                "model's parameters or its predictions are not finite (--workdir)."
            )
        progress.show(start + len(indices), 'bits per dim')
    values = {key: np.concatenate([part[key] for part in parts]) for key in PARTS}
    error = values['total'].std(ddof=1) / math.sqrt(count) if count > 1 else None
    means = {key: float(each.mean()) for key, each in values.items()}
    return {**means, 'standard_error': error and float(error), 'num_images': count}, values['total']


def explanation(result, *, discrete):
    """Return the words that a mean bound above `UNIFORM` needs, '' below it."""
    if result['total'] <= UNIFORM:
        return ''
    cause = max(PARTS[1:], key=result.get)
    advice = (
        'these timesteps are too few or the model is not trained: raise config.sample.num_steps'
        if discrete
        else 'the model does not know this data yet, or not at small noise: train it longer'
    )
    return (
        f'; above {UNIFORM:g}, which 8-bit values cost if all are equally likely, so this bound says nothing about the '
        f'data: most of it is the {cause} part; {advice}'
    )
