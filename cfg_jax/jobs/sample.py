"""The sampling job: images of chosen classes at one guidance weight; a PNG grid and an .npz."""

from pathlib import Path

from cfg_jax import build_sampling, trained
from cfg_jax.checks import check_config
from cfg_jax.distributed import processes
from cfg_jax.evaluation import grids

_IN_GRID = 400  # images in the picture, at most


def run(config, workdir):
    """Draw config.sample.num_images images in shards, resuming after a stop. Return the `sample_sets.SampleSet`.

    Writes `workdir`/sample_*.png (one row per class), sample_*.npz if config.sample.npz is set (arr_0 images, arr_1
    labels), and the shards with their manifest below `workdir`/sample_sets. Files are named after what they show.
    """
    check_config(config)
    build_sampling.check_weight(config, build_sampling.guidance_weight(config))
    model = trained.load(config, workdir)
    wanted = trained.wanted(config, model.class_names)
    images = trained.open_set(model, workdir, wanted)
    batches = trained.image_batches(config, model.classifier, model.weak, batch_size=images.batch_size)

    def draw(units):
        weights = {'weight': wanted.weight, 'classifier_weight': wanted.classifier_weight}
        return batches(model.params, images.labels, seed=config.sample.seed, units=units, **weights)

    images.draw(draw, f'w={wanted.weight:g}')
    if processes.is_first():
        chosen = '_' + '-'.join(map(str, dict.fromkeys(wanted.ids[:8]))) if config.sample.labels.strip() else ''
        path = Path(workdir) / f'sample_{images.name.replace("_seed", chosen + "_seed")}'
        shown = images.first(_IN_GRID)
        title = trained.drawn_with(config, wanted.weight, wanted.classifier_weight)
        picture = grids.class_grid(shown, images.labels[: len(shown)], model.class_names, title=title)
        grids.save_png(f'{path}.png', picture)
        written = f'{path}.png'
        if config.sample.npz:
            images.write_npz(f'{path}.npz')
            written += f' and {path}.npz'
        print(f'wrote {written}; shards and manifest: {images.folder}', flush=True)
    return images
