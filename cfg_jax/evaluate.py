"""The evaluation job: the trade-off of fidelity and variety over guidance weights (CFG paper, figures 1 and 4)."""

import csv
import io
import json
import time
from pathlib import Path

import numpy as np

from cfg_jax import build, figures, metrics, sampling, sharding
from cfg_jax.checks import check_config, check_judge
from cfg_jax.errors import UserError
from cfg_jax.writers import Progress

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
# costs.csv: what one image of each row costs
COSTS = (
    'guidance_weight',
    'classifier_weight',
    'network_evaluations',
    'classifier_gradients',
    'seconds_per_image',
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


def as_csv(rows, columns):
    """The rows as CSV text with these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n', extrasaction='ignore')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def read_csv(path):
    """A file of `as_csv` as rows of numbers, where they are numbers."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise UserError(f'{path} cannot be read (config.eval.compare_with): {error.strerror}.') from None
    numbers = set(COLUMNS + COSTS) - {'sampler'}
    return [{key: float(value) if key in numbers else value for key, value in row.items()} for row in rows]


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
    check_config(config)
    folder = Path(workdir) / config.eval.folder
    mesh = sharding.make_mesh()
    if config.eval.bits_per_dim:
        return run_bits_per_dim(config, workdir, folder, mesh)
    check_judge(config)
    other = config.eval.compare_with and read_curve(Path(workdir) / config.eval.compare_with)
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
    symbol = figures.SYMBOLS[over]
    rows, same_noise = [], []
    # one batch compiles the sampler, so that the first weight's time is like the others'
    next(batches(params, labels[:1], 0.0, config.sample.seed))
    costs = build.count_evaluations(config)
    for weight, classifier_weight in pairs:
        name = f'{symbol}={weight if over == "guidance_weight" else classifier_weight:g}'
        sampled = batches(params, labels, weight, config.sample.seed, classifier_weight)
        start = time.monotonic()
        images = sampling.collect(sampled, len(labels), name)
        seconds = (time.monotonic() - start) / len(images)
        row = {'guidance_weight': float(weight), **measure(config, *judge(images), labels, real_features)}
        row |= {
            'num_samples': len(images),
            'num_steps': len(build.sampling_logsnrs(config)),
            'sampler': config.sample.sampler,
            'seed': config.sample.seed,
        }
        row |= {'classifier_weight': float(classifier_weight), 'seconds_per_image': seconds, **costs}
        rows.append(row)
        same_noise.append(images[: 2 * min(config.data.num_classes, 10)])
        grid = figures.class_grid(images[:100], labels[:100], class_names)
        figures.save_png(folder / f'samples_{name.replace("=", "")}.png', grid)
        figures.write_atomically(folder / 'tradeoff.csv', as_csv(rows, COLUMNS).encode())
        figures.write_atomically(folder / 'costs.csv', as_csv(rows, COSTS).encode())
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
    if other:
        pairs = (config.eval.compare_with, other), (config.eval.folder or '.', rows)
        curves = {curve_name(folder, rows): rows for folder, rows in pairs}
        figures.write_atomically(folder / 'comparison.png', figures.comparison(curves, title=title))
        print(f'wrote {folder}/comparison.png', flush=True)
    print(
        f'wrote {folder}/tradeoff.csv, costs.csv, tradeoff.png, samples_over_{symbol}.png and samples_{symbol}*.png',
        flush=True,
    )
    return rows


def curve_name(folder, rows):
    """What a curve of a folder of the workdir is called in a plot with others."""
    kind = 'classifier guidance' if rows[0]['classifier_gradients'] else 'classifier-free'
    return kind if folder == '.' else f'{kind} ({folder})'


def read_curve(folder):
    """The rows that an evaluation wrote into a folder, with their costs."""
    return [{**row, **cost} for row, cost in zip(read_csv(folder / 'tradeoff.csv'), read_csv(folder / 'costs.csv'))]


def run_bits_per_dim(config, workdir, folder, mesh):
    """Writes bits_per_dim.json: the bound on -log2 p(image | label) by dimension, over eval.num_samples real images."""
    params, step, *_ = sampling.load(config, workdir, mesh)
    source = build.source(config)
    bound = build.bits_per_dim(config)
    count, size = min(config.eval.num_samples, len(source)), config.sample.batch_size
    progress, parts = Progress(count), []
    for start in range(0, count, size):
        indices = np.arange(start, min(start + size, count))
        examples = [source[index] for index in np.resize(indices, size)]  # filled up: one compilation
        images, labels = (np.stack([example[key] for example in examples]) for key in ('image', 'label'))
        terms = bound(params, images, labels, np.resize(indices, size).astype(np.uint32), np.uint32(config.sample.seed))
        parts.append({key: np.asarray(terms[key])[: len(indices)] for key in ('total', 'prior')})
        rate, left = progress.rate(start + len(indices))
        print(f'bits per dim  {start + len(indices)}/{count} images  {rate:.1f} images/s  {left} left', flush=True)
    means = {key: float(np.concatenate([part[key] for part in parts]).mean()) for key in ('total', 'prior')}
    result = {**means, 'num_images': count, 'num_steps': len(build.sampling_logsnrs(config)), 'step': step}
    figures.write_atomically(folder / 'bits_per_dim.json', (json.dumps(result) + '\n').encode())
    print(
        f'bits per dim {means["total"]:.4f} (prior {means["prior"]:.2g}), wrote {folder}/bits_per_dim.json', flush=True
    )
    return result
