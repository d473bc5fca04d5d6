"""The evaluation job: the trade-off of fidelity and variety over guidance weights (CFG paper, figures 1 and 4)."""

import csv
import io
from pathlib import Path

import numpy as np

from cfg_jax import build, figures, metrics, sampling, sharding

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
    """The rows as CSV text: the columns above, and classifier_weight where a classifier guides."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def sweep(config):
    """[(guidance weight, classifier weight)] of the curve, and which of the two it is drawn over."""
    if config.eval.classifier_weights:
        weight = build.guidance_weight(config)
        return [(weight, each) for each in sorted(config.eval.classifier_weights)], 'classifier_weight'
    return [
        (each, config.guidance.classifier_weight) for each in sorted(config.eval.guidance_weights)
    ], 'guidance_weight'


def run(config, workdir):
    """Samples at every weight of the sweep; writes tradeoff.csv and .png, samples_*.png into config.eval.folder."""
    build.check(config)
    build.check_judge(config)
    folder = Path(workdir) / config.eval.folder
    mesh = sharding.make_mesh()
    params, step, _, class_names, _ = sampling.load(config, workdir, mesh)
    batches = sampling.image_batches(config, mesh)
    source = build.source(config)
    judge, real_images, real_labels = build.judge(config, source)
    real_features, real_logits = judge(real_images)
    # as many images a split as the samples have, for the score grows with that number
    real_splits = max(round(len(real_images) * config.eval.num_splits / config.eval.num_samples), 1)
    real_score = metrics.inception_score(real_logits, num_splits=real_splits)[0]
    spread = metrics.within_class_spread(real_features, real_labels)
    print(f'data   IS {real_score:.2f}  spread {spread:.2f}  ({len(real_images):,} images)', flush=True)

    labels = np.resize(np.arange(config.data.num_classes, dtype=np.int32), config.eval.num_samples)
    pairs, over = sweep(config)
    symbol = {'guidance_weight': 'w', 'classifier_weight': 'c'}[over]
    rows, same_noise = [], []
    for weight, classifier_weight in pairs:
        name = f'{symbol}={weight if over == "guidance_weight" else classifier_weight:g}'
        sampled = batches(params, labels, weight, config.sample.seed, classifier_weight)
        images = sampling.collect(sampled, len(labels), name)
        row = {'guidance_weight': float(weight), **measure(config, *judge(images), labels, real_features)}
        row |= {
            'num_samples': len(images),
            'num_steps': len(build.sampling_logsnrs(config)),
            'sampler': config.sample.sampler,
            'seed': config.sample.seed,
        }
        if config.guidance.classifier_workdir:
            row['classifier_weight'] = float(classifier_weight)
        rows.append(row)
        same_noise.append(images[: 2 * min(config.data.num_classes, 10)])
        grid = figures.class_grid(images[:100], labels[:100], class_names)
        figures.save_png(folder / f'samples_{name.replace("=", "")}.png', grid)
        figures.write_atomically(folder / 'tradeoff.csv', as_csv(rows).encode())
        print(
            f'{name:<6} FID {row["fid"]:.3f}  IS {row["inception_score"]:.3f}  precision {row["precision"]:.3f}  '
            f'recall {row["recall"]:.3f}  accuracy {row["accuracy"]:.4f}  spread {row["spread"]:.3f}',
            flush=True,
        )
    names = [f'{symbol} = {row[over]:g}' for row in rows]
    figures.save_png(folder / f'samples_over_{symbol}.png', figures.grid(same_noise, names))
    title = (
        f'{config.data.name or config.data.source}: {len(labels):,} samples a weight, {row["num_steps"]} '
        f'{config.sample.sampler} steps, judge {config.eval.judge!r}, training step {step:,}'
    )
    figures.write_atomically(folder / 'tradeoff.png', figures.tradeoff(rows, title=title, over=over, real=real_score))
    print(f'wrote {folder}/tradeoff.csv, tradeoff.png, samples_over_{symbol}.png and samples_{symbol}*.png', flush=True)
    return rows
