"""The sources of images and labels, and the pipeline that carries them to a training step."""

import numpy as np


def spread(total, count):
    """Return `count` indices of `total` things, evenly spread: int64, increasing; all indices if `count` is larger."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
