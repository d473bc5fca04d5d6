"""How close samples come to the training images in a judge's eyes, beside images that training has not seen.

A sample is compared with every training image that is kept: a copy of one that is not is missed. Mirrored copies are
found as far as the judge gives a mirrored image the same features.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from cfg_jax import metrics
from cfg_jax.errors import UserError
from cfg_jax.evaluation import grids, references
from cfg_jax.progress import shown

_NEIGHBOURS = 50  # nearest training images whose mean distance a nearest one is compared with (Carlini et al. 2023)
_SHOWN = 3  # of them in pictures
_ROWS = 8  # samples in each half of a picture
_NAMES = ('features', 'held_out_distances', 'held_out_ratios')


class Near(NamedTuple):
    """How close images come to training images.

    distances: [N], to the nearest one. ratios: [N], `metrics.nearest_ratios`. places: [N, 3], of the nearest ones in
    `Training.features`, or None.
    """

    distances: np.ndarray
    ratios: np.ndarray
    places: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A judge's float32 features [M, D] of training images, and how close held-out images come to them.

    indices: int [M], the images' places in the data set.
    """

    features: np.ndarray
    held_out: Near
    indices: np.ndarray

    def near(self, features):
        """Return the `Near` of images with these features [N, D]."""
        return near(features, self.features)

    def limit(self):
        """Return the ratio up to which a sample counts as memorised."""
        return float(np.quantile(self.held_out.ratios, metrics.MEMORISED_PERCENT / 100.0))

    def measure(self, found):
        """Return the columns of samples' `Near`, with errors."""
        pairs = {
            'memorised': metrics.memorised_share(found.ratios, self.held_out.ratios),
            'training_distance': metrics.distance_ratio(found.distances, self.held_out.distances),
        }
        return {f'{name}{end}': value for name, pair in pairs.items() for end, value in zip(('', '_error'), pair)}


def near(features, training):
    """Return the `Near` of images with `features` [N, D] to training images [M, D]."""
    with shown('the nearest training images are looked for'):
        distances, places = metrics.nearest_neighbours(features, training, k=min(_NEIGHBOURS, len(training)))
    return Near(distances[:, 0], metrics.nearest_ratios(distances), places[:, :_SHOWN])


def check(held_out, name):
    """Raise UserError if half of the held-out images, or more, are training images. name: config.eval.held_out."""
    if not np.median(held_out.distances) > 0:
        raise UserError(
            f'half of the images of {name!r}, or more, are training images too; give images that training has not seen '
            '(config.eval.held_out).'
        )


# ---------------------------------------------------------------- kept


def save(path, training):
    """Write the features and the held-out images' distances, whole or not at all."""
    arrays = training.features, training.held_out.distances, training.held_out.ratios
    references.save_arrays(path, dict(zip(_NAMES, arrays)))


def load(path, indices):
    """Return the `Training` in a file that `save` wrote for these images of the data set; raises UserError."""
    features, *held_out = references.load_arrays(path, _NAMES, field='config.eval.held_out')
    return Training(features, Near(*held_out), indices)


# ---------------------------------------------------------------- pictures


def chosen(ratios):
    """Return the numbers of a picture's samples: the least ratios in order and, of the others, some by chance."""
    order = np.argsort(ratios, kind='stable')
    by_chance = np.random.default_rng(0).permutation(order[_ROWS:])[:_ROWS]
    return [part for part in (order[:_ROWS], np.sort(by_chance)) if len(part)]


def draw(samples, neighbours, ratios, *, limit, title):
    """Draw rows of a sample, a gap and its nearest training images: the closest on the left, some of chance beside.

    samples: one or two lists of uint8 [H, W, C]; neighbours: of [3, H, W, C]; ratios: of floats, the names of rows.
    limit: the ratio up to which a sample counts as memorised. Returns uint8 [H, W, 3].
    """
    parts = []
    for heading, own, others, of_rows in zip(('closest', 'by chance'), samples, neighbours, ratios):
        rows = [[sample, np.full_like(sample, 255), *nearest] for sample, nearest in zip(own, others)]
        names = [f'{ratio:.2f} *' if ratio <= limit else f'{ratio:.2f}' for ratio in of_rows]
        parts.append(grids.grid(rows, names, title=f'{heading}: sample, then its {_SHOWN} nearest', least=64))
    legend = (
        f'distance to the nearest training image / mean of the {_NEIGHBOURS} nearest; *: memorised, up to {limit:.2f}'
    )
    return grids.beside(parts, title=(title, legend))
