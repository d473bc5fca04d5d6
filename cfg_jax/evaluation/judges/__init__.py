"""Judges: networks whose features and logits the metrics are computed from. One file each, found by its name.

A judge's file has `open_judge(data, num_classes, *, weights='', num_steps=...)`, which gives a `Judge`. data: a
`data.sources.Source` of real images and num_steps, for judges that are trained on them; weights: a file, for judges
that are not. A judge must share nothing with what guides: a classifier that guides would praise images that are
adversarial to it (CFG paper, section 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Outputs(NamedTuple):
    """What a judge says of N images, float32: features [N, D], logits [N, K], and spatial features [N, S] or None."""

    features: np.ndarray
    logits: np.ndarray
    spatial: np.ndarray | None = None


class Judge(NamedTuple):
    """A network that judges images.

    apply: uint8 images [N, H, W, C], any N -> `Outputs`. identity: text that is the same where the numbers are
    comparable: its name and a hash of its weights. classes_are_labels: logit i is that of label i of the data set, so
    that accuracy has a meaning.
    """

    name: str
    identity: str
    apply: Callable[[np.ndarray], Outputs]
    classes_are_labels: bool
