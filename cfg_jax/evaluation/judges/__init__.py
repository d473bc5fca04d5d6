"""Judges: networks whose features and logits the metrics are computed from. One file each, named by config.eval.judge.

A judge's file defines `open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None, cache=None)`, which
returns a `Judge`. It is trained on `data` (a `data.sources.Source` of real images) for num_steps, and kept in the
folder `cache` (None: not kept), or it reads the file `weights`; it computes on mesh (one axis; None: the first local
device). It takes all of these arguments, and ignores those it does not need.

A judge must share nothing with the guidance: a classifier that guides would favour images that are adversarial to it
(CFG paper, section 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def names(text):
    """Return the names of the judges in config.eval.judge, such as 'trained,lite0'."""
    return tuple(name.strip() for name in text.split(',')) if text.strip() else ()


class Outputs(NamedTuple):
    """A judge's outputs for N images, float32: features [N, D]; logits [N, K] and spatial features [N, S], or None."""

    features: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


class Judge(NamedTuple):
    """A network that judges images.

    apply: maps uint8 images [N, H, W, C], any N, to `Outputs`. identity: the judge's name and a hash of its weights;
    scores are comparable if their judges' identities are equal. classes_are_labels: True if logit i belongs to label i
    of the data set, so that accuracy can be computed. field: the config field that its weights come from, for errors.
    chunk: images to give it at once, so few that progress can be shown. confusion: `metrics.confusion_matrix` of real
    images that it was not trained on, or None.
    """

    name: str
    identity: str
    apply: Callable[[np.ndarray], Outputs]
    classes_are_labels: bool
    field: str = 'config.eval.judge'
    chunk: int = 512
    confusion: np.ndarray | None = None
