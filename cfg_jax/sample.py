"""The sampling job: images of chosen classes at one guidance weight, as a PNG grid and an .npz."""

import io
from pathlib import Path

import numpy as np

from cfg_jax import build, figures, sampling, sharding
from cfg_jax.checks import check_config


def run(config, workdir):
    """Writes a grid with a row per class and an .npz (arr_0 images, arr_1 labels), named after what they show."""
    check_config(config)
    mesh = sharding.make_mesh()
    restored = sampling.load(config, workdir, mesh)
    class_names = restored.class_names
    weight, seed = build.guidance_weight(config), config.sample.seed
    ids = sampling.parse_labels(config.sample.labels, class_names)
    if not config.sample.labels.strip():
        ids = sampling.spread_classes(len(ids), config.sample.num_images)
    labels = np.resize(
        np.array(ids, np.int32), config.sample.num_images
    )  # image i's class does not depend on their number
    batches = sampling.image_batches(config, mesh)(restored.tree, labels, weight, seed)
    images = sampling.collect(batches, len(labels), f'w={weight:g}')
    what = f'{config.sample.sampler}{len(build.sampling_logsnrs(config))}_w{weight:g}'
    if config.guidance.classifier_workdir:
        what += f'_classifier{config.guidance.classifier_weight:g}'
    if config.sample.labels.strip():
        what += '_' + '-'.join(map(str, ids[:8]))
    path = Path(workdir) / f'sample_{what}_seed{seed}'
    figures.save_png(f'{path}.png', figures.class_grid(images, labels, class_names))
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    figures.write_atomically(f'{path}.npz', buffer.getvalue())
    print(f'wrote {path}.png and {path}.npz', flush=True)
