"""The mean images of a model beside those of its data."""

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import build, build_sampling, diffusion, files, samplers
from cfg_jax.data import spread
from cfg_jax.evaluation import mean_images, results, style
from cfg_jax.training import sharding

_LOGSNRS = (-8.0, -6.0, -4.0, -3.0)  # besides the model's least λ
_NOISES = 64
_ROWS = 10  # classes in the picture


def write_means(model, source, folder):
    """Write means.png, .svg and .csv: x predicted from pure noise by a `Trained` model beside the means of its data.

    The null label is compared with all images, if the network has learned it, and up to ten labels with their classes.
    A progressive student is asked at the noisiest of its own λ alone: it knows few.
    """
    config = model.config
    of_data = mean_images.data_means(source, config.eval.reference_images)
    labels = [label for label in spread(config.data.num_classes, _ROWS).tolist() if label in of_data]
    labels = [None] * build_sampling.has_unconditional(config) + labels * (config.model.labels != 'none')
    lowest = float(build_sampling.sampling_logsnrs(config)[0])
    logsnrs = [lowest, *(logsnr for logsnr in _LOGSNRS if logsnr > lowest and not config.distill.rounds)]
    batch_size = min(config.sample.batch_size, _NOISES)
    params, null = sharding.to_local(model.params, sharding.local_mesh()), build.null_label(config)

    @jax.jit
    def predicted_x(params, label, logsnr, indices):
        z = samplers.step_noise(samplers.image_keys(config.sample.seed, indices), 0, build.image_shape(config))
        every = jnp.full(batch_size, logsnr)
        return diffusion.predict_x(z, build.model(config, params)(z, every, jnp.full(batch_size, label)).eps, every)

    def predict(label, logsnr, indices):
        label = null if label is None else label
        return predicted_x(params, np.int32(label), np.float32(logsnr), indices.astype(np.uint32))

    found = mean_images.predicted_means(predict, labels, logsnrs, count=_NOISES, batch_size=batch_size)
    rows, table = [], []
    for label in labels:
        name = 'all' if label is None else model.class_names[label]
        means = [found[label, logsnr][0] for logsnr in logsnrs]
        rows.append((name, of_data[label], means, found[label, logsnrs[-1]][1]))
        table += [
            {'class': name, 'logsnr': logsnr, 'distance': mean_images.distance(mean, of_data[label])}
            for logsnr, mean in zip(logsnrs, means)
        ]
    title = f'x predicted from noise (mean of {_NOISES}), and its distance to the mean of the data'
    style.save(folder / 'means', mean_images.draw(rows, logsnrs, title=title))
    files.write(folder / 'means.csv', results.as_csv(table, ['class', 'logsnr', 'distance']).encode())
