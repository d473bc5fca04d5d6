"""The bound on the data's likelihood under a model, in bits per dimension, over a set of real images."""

import numpy as np

from cfg_jax.progress import Progress


def bits_per_dim(bound, source, *, num_images, batch_size, seed):
    """Return {'total', 'prior', 'num_images'}: means over the first images of a source, all if they are fewer.

    bound(images uint8 [B, H, W, C], labels [B], image indices [B], seed) -> `losses.bits_per_dim_terms`.
    """
    count = min(num_images, len(source))
    progress, parts = Progress(count), []
    for start in range(0, count, batch_size):
        indices = np.arange(start, min(start + batch_size, count))
        filled = np.resize(indices, batch_size)  # one shape, one compilation
        batch = source.batch(filled)
        terms = bound(batch['image'], batch['label'], filled.astype(np.uint32), np.uint32(seed))
        parts.append({key: np.asarray(terms[key])[: len(indices)] for key in ('total', 'prior')})
        progress.show(start + len(indices), 'bits per dim')
    means = {key: float(np.concatenate([part[key] for part in parts]).mean()) for key in ('total', 'prior')}
    return {**means, 'num_images': count}
