"""The sampling job: images of chosen classes at one guidance weight, as many as asked for; a PNG grid and an .npz."""

from pathlib import Path

from cfg_jax import build
from cfg_jax.checks import check_config
from cfg_jax.distributed import processes
from cfg_jax.evaluation import figures
from cfg_jax.sampling import generate, sample_sets
from cfg_jax.training import sharding

_IN_GRID = 400  # images in the picture, at most


def run(config, workdir):
    """Draws config.sample.num_images images in shards, goes on where it was stopped; names files after what they show.

    Writes `workdir`/sample_*.png (a row a class), sample_*.npz where config.sample.npz asks for it (arr_0 images, arr_1
    labels), and the shards with their manifest in `workdir`/sample_sets. Returns the `sample_sets.SampleSet`.
    """
    check_config(config)
    mesh = sharding.make_mesh()
    restored = generate.load(config, workdir, mesh)
    weight, classifier_weight = build.guidance_weight(config), config.guidance.classifier_weight
    ids = sample_sets.classes(config, restored.class_names)
    classifier = generate.load_classifier(config, mesh)
    drawing = generate.image_batches(config, classifier=classifier)
    digests = [sample_sets.params_digest(params) for params in (restored.tree, classifier[1])]
    count = config.sample.num_images
    images = sample_sets.open_set(config, classifier[0], workdir, digests, ids, count, weight, classifier_weight)

    def draw(units):
        return drawing(restored.tree, images.labels, weight, config.sample.seed, classifier_weight, units=units)

    images.draw(draw, f'w={weight:g}')
    if processes.is_first():
        chosen = '_' + '-'.join(map(str, dict.fromkeys(ids[:8]))) if config.sample.labels.strip() else ''
        path = Path(workdir) / f'sample_{images.name.replace("_seed", chosen + "_seed")}'
        few = images.first(_IN_GRID)
        figures.save_png(f'{path}.png', figures.class_grid(few, images.labels[: len(few)], restored.class_names))
        written = f'{path}.png'
        if config.sample.npz:
            images.write_npz(f'{path}.npz')
            written += f' and {path}.npz'
        print(f'wrote {written}; shards and manifest: {images.folder}', flush=True)
    return images
