"""The evaluation job: the trade-off of fidelity and variety over guidance weights (CFG paper, figures 1 and 4)."""

import csv
import io
from pathlib import Path

import numpy as np

from cfg_jax import build, figures, metrics, sampling, sharding
from cfg_jax.errors import UserError

COLUMNS = (
    'guidance_weight',
    'fid',
    'inception_score',
    'precision',
    'recall',
    'accuracy',
    'spread',
    'num_samples',
    'num_steps',
    'sampler',
    'seed',
)


def measure(config, features, logits, labels, real_features):
    """All metrics of one set of generated images, as {column: value}."""
    precision, recall = metrics.precision_recall(features, real_features, k=config.eval.nearest_k)
    return {
        'fid': metrics.frechet_distance(features, real_features),
        'inception_score': metrics.inception_score(logits, num_splits=config.eval.num_splits)[0],
        'precision': precision,
        'recall': recall,
        'accuracy': metrics.class_accuracy(logits, labels),
        'spread': metrics.within_class_spread(features, labels),
    }


def as_csv(rows):
    """The rows as CSV text with the columns above."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def run(config, workdir):
    """Samples at every weight of config.eval.guidance_weights; writes tradeoff.csv and .png, samples_*.png."""
    build.check(config)
    if not config.eval.judge:
        raise UserError("config.eval.judge is not set; allowed: 'digits'.")
    folder, weights = Path(workdir) / config.eval.folder, sorted(config.eval.guidance_weights)
    mesh = sharding.make_mesh()
    params, step, class_names = sampling.load(config, workdir, mesh)
    source = build.source(config)
    judge, real_images, real_labels = build.judge(config, source)
    real_features, real_logits = judge(real_images)
    real_score = metrics.inception_score(real_logits, num_splits=config.eval.num_splits)[0]
    spread = metrics.within_class_spread(real_features, real_labels)
    print(f'data   IS {real_score:.2f}  spread {spread:.2f}  ({len(real_images):,} images)', flush=True)

    labels = np.resize(np.arange(config.data.num_classes, dtype=np.int32), config.eval.num_samples)
    batches = sampling.image_batches(config, mesh)
    rows, same_noise = [], []
    for weight in weights:
        images = sampling.collect(batches(params, labels, weight, config.sample.seed), len(labels), f'w={weight:g}')
        row = {'guidance_weight': float(weight), **measure(config, *judge(images), labels, real_features)}
        row |= {
            'num_samples': len(images),
            'num_steps': config.sample.num_steps,
            'sampler': config.sample.sampler,
            'seed': config.sample.seed,
        }
        rows.append(row)
        same_noise.append(images[: 2 * min(config.data.num_classes, 10)])
        shown = slice(0, 100)
        figures.save_png(
            folder / f'samples_w{weight:g}.png', figures.class_grid(images[shown], labels[shown], class_names)
        )
        figures.write_atomically(folder / 'tradeoff.csv', as_csv(rows).encode())
        print(
            f'w={weight:<4g} FID {row["fid"]:.3f}  IS {row["inception_score"]:.3f}  precision {row["precision"]:.3f}  '
            f'recall {row["recall"]:.3f}  accuracy {row["accuracy"]:.4f}  spread {row["spread"]:.3f}',
            flush=True,
        )
    names = [f'w = {weight:g}' for weight in weights]
    figures.save_png(folder / 'samples_over_w.png', figures.grid(same_noise, names))
    title = (
        f'{config.data.name or config.data.source}: {len(labels):,} samples a weight, {config.sample.num_steps} '
        f'{config.sample.sampler} steps, judge {config.eval.judge!r}, training step {step:,}'
    )
    figures.write_atomically(folder / 'tradeoff.png', figures.tradeoff(rows, title=title, real=real_score))
    print(f'wrote {folder}/tradeoff.csv, tradeoff.png, samples_over_w.png and samples_w*.png', flush=True)
    return rows
