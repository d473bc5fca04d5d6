"""The sampling job: images of chosen classes at one guidance weight, as a PNG grid and an .npz."""

import io
from pathlib import Path

import numpy as np

from cfg_jax import build, figures, sampling, sharding


def run(config, workdir):
    """Writes `workdir`/sample_w<w>_seed<seed>.png (a row per class) and .npz (arr_0 images, arr_1 labels)."""
    build.check(config)
    mesh = sharding.make_mesh()
    params, _, class_names = sampling.load(config, workdir, mesh)
    weight, seed = build.guidance_weight(config), config.sample.seed
    ids = sampling.parse_labels(config.sample.labels, class_names)
    labels = np.resize(
        np.array(ids, np.int32), config.sample.num_images
    )  # image i's class does not depend on their number
    batches = sampling.image_batches(config, mesh)(params, labels, weight, seed)
    images = sampling.collect(batches, len(labels), f'w={weight:g}')
    path = Path(workdir) / f'sample_w{weight:g}_seed{seed}'
    figures.save_png(f'{path}.png', figures.class_grid(images, labels, class_names))
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    figures.write_atomically(f'{path}.npz', buffer.getvalue())
    print(f'wrote {path}.png and {path}.npz', flush=True)
