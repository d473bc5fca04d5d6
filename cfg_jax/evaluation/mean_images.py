"""The images that a model predicts from pure noise, beside the means of the data that they should be.

At small λ the best prediction of x is the mean of the data, or of the class: z tells nothing. A network that predicts
eps has its error there multiplied by sigma / alpha, 2.2e4 at λ = -20, which is why samplers clip x.
"""

import math

import numpy as np

from cfg_jax.data import spread
from cfg_jax.errors import UserError
from cfg_jax.evaluation import style
from cfg_jax.progress import Progress

_CHUNK = 512  # images read at once


def data_means(source, num_images):
    """Return {label: mean image} of a source's classes, and of all images under None: float64 [H, W, C] in [-1, 1].

    num_images: how many are read, evenly spread; 0: all. A class without any image among them has no entry.
    """
    chosen = spread(len(source), min(num_images or len(source), len(source)))
    sums = np.zeros((len(source.class_names), *source.image_shape))
    counts, progress = np.zeros(len(sums), np.int64), Progress(len(chosen))
    for start in range(0, len(chosen), _CHUNK):
        batch = source.batch(chosen[start : start + _CHUNK])
        np.add.at(sums, batch['label'], batch['image'] / 127.5 - 1.0)
        counts += np.bincount(batch['label'], minlength=len(counts))
        progress.show(start + len(batch['label']), 'means of the data')
    means = {label: sums[label] / counts[label] for label in np.flatnonzero(counts).tolist()}
    return {None: sums.sum(axis=0) / counts.sum(), **means}


def predicted_means(predict, labels, logsnrs, *, count, batch_size):
    """Return the mean predicted x over `count` noises, and that of the first: {(label, λ): (mean, first)}.

    predict(label, λ, image indices [B]) -> x [B, H, W, C], predicted from pure noise z ~ N(0, I), not clipped. Raises
    UserError if a prediction is not finite.
    """
    found, progress = {}, Progress(len(labels) * len(logsnrs) * count, compiles=True)
    starts, done = range(0, count, batch_size), 0
    with progress.watched('means of the model', unit='predictions'):
        for label in labels:
            for logsnr in logsnrs:
                indices = [np.resize(np.arange(start, min(start + batch_size, count)), batch_size) for start in starts]
                rows = [np.asarray(predict(label, logsnr, each), np.float64) for each in indices]
                x = np.concatenate(rows)[:count] if len(rows) * batch_size > count else np.concatenate(rows)
                if not np.isfinite(x).all():
                    raise UserError(
                        f'x predicted from noise at λ = {logsnr:g} for label {label} holds NaN or infinity: train the '
                        "model again, or use config.model.dtype='float32'."
                    )
                found[label, logsnr] = x.mean(axis=0), x[0]
                done += count
                progress.show(done, 'means of the model', unit='predictions')
    return found


def distance(image, other):
    """Return the root mean squared distance of two images, in units of [-1, 1]."""
    return math.sqrt(np.mean(np.square(image - other)))


def draw(rows, logsnrs, *, title):
    """Draw a row of images for each (name, data mean, predicted means, prediction from one noise): a `style.Picture`.

    Under each prediction stands its distance to the data's mean. logsnrs: λ of the predictions; the one from a single
    noise is at the last of them.
    """
    headers = ['data', *(f'λ = {logsnr:.3g}' for logsnr in logsnrs), f'one, λ = {logsnrs[-1]:.3g}']
    with style.figure((680, 40 + 86 * len(rows)), rows=len(rows), columns=len(headers), squeeze=False) as (
        figure,
        axes,
    ):
        for axis, header in zip(axes[0], headers):
            axis.set_title(header, fontsize=11, pad=4, loc='center')
        for row, (name, mean, predictions, first) in zip(axes, rows):
            row[0].set_ylabel(style.drawable(name), rotation=0, ha='right', va='center')
            for axis, image in zip(row, [mean, *predictions, first]):
                pixels = np.clip((image + 1.0) / 2.0, 0.0, 1.0)
                axis.imshow(pixels if image.shape[-1] == 3 else pixels[..., 0], cmap='gray', vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
            for axis, image in zip(row[1:], [*predictions, first]):
                far = distance(image, mean)
                axis.set_xlabel(f'{far:.2g}' if far < 10 else f'{far:.0f}', labelpad=1, fontsize=10)
        figure.suptitle(style.drawable(title))
        return style.picture(figure)
