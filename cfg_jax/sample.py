"""The sampling job: images of chosen classes at one guidance weight, as a PNG grid and an .npz."""

import io
from pathlib import Path

import jax
import numpy as np

from cfg_jax import build, figures, sharding
from cfg_jax.checkpoints import Checkpoints
from cfg_jax.errors import UserError
from cfg_jax.writers import Progress


def load(config, workdir, mesh):
    """The newest checkpoint's EMA parameters, on every device, as `checkpoints.Restored`. UserError if there is none."""
    directory = Path(workdir) / 'checkpoints'
    if not directory.is_dir():
        raise UserError(f'no checkpoint in {directory}; train first (--mode=train) or point --workdir at a trained one.')
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    whole = sharding.replicated(mesh)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)
    plain = config.to_dict()
    checkpoints = Checkpoints(directory, {section: plain[section] for section in build.MODEL_SECTIONS})
    restored = checkpoints.restore_ema(abstract)
    checkpoints.close()
    if restored is None:
        raise UserError(f'no checkpoint in {directory}; train first (--mode=train) or point --workdir at a trained one.')
    print(f'sampling from {checkpoints.path(restored.step)}', flush=True)
    return restored


def collect(batches, total, name, *, quiet=False):
    """All images of an iterator over batches, uint8 [N, H, W, C], with a progress line every ten seconds or so."""
    progress, images, done = Progress(total), [], 0
    for batch in batches:
        images.append(batch)
        done += len(batch)
        if not quiet and (done == total or progress.seconds() > 10):
            rate, left = progress.rate(done)
            print(f'{name}  {done}/{total} images  {rate:.1f} images/s  {left} left', flush=True)
    return np.concatenate(images)


def run(config, workdir):
    """Writes `workdir`/sample_w<w>_seed<seed>.png (a row per class) and .npz (arr_0 images, arr_1 labels)."""
    build.check(config)
    mesh = sharding.make_mesh()
    params, _, class_names = load(config, workdir, mesh)
    weight, seed = build.guidance_weight(config), config.sample.seed
    ids = build.parse_labels(config.sample.labels, class_names)
    labels = np.resize(np.array(ids, np.int32), config.sample.num_images)  # image i's class does not depend on their number
    batches = build.image_batches(config, mesh)(params, labels, weight, seed)
    images = collect(batches, len(labels), f'w={weight:g}')
    path = Path(workdir) / f'sample_w{weight:g}_seed{seed}'
    figures.save_png(f'{path}.png', figures.class_grid(images, labels, class_names))
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    figures.write_atomically(f'{path}.npz', buffer.getvalue())
    print(f'wrote {path}.png and {path}.npz', flush=True)
