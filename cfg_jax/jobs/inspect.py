"""The job of --mode=inspect: show a data set as numbers and pictures, and measure how fast the pipeline reads it."""

import contextlib
import csv
import io
import time
from pathlib import Path

import numpy as np

from cfg_jax import build, files, trained
from cfg_jax.checks import check_config
from cfg_jax.data import sources, spread
from cfg_jax.data.preparing import raw_images
from cfg_jax.errors import printable
from cfg_jax.evaluation import figures, grids, style
from cfg_jax.progress import Progress, rounded

_SHOWN_CLASSES, _COLUMNS, _CHUNK = 10, 12, 256


def run(config, workdir):
    """Write images.png, classes.csv and statistics.json, .png and .svg into `workdir`/inspect; print a summary."""
    check_config(config)
    data = build.source(config)
    data.order_classes(trained.saved_class_names(workdir))
    folder = Path(workdir) / 'inspect'
    print(
        f'{len(data):,} images of {"x".join(map(str, data.image_shape))}, {len(data.class_names)} classes', flush=True
    )
    labels = count_labels(data)
    counts = np.bincount(labels, minlength=len(data.class_names))
    print(f'images a class: {counts.min()} to {counts.max()}, median {np.median(counts):g}', flush=True)
    if not isinstance(data, sources.FolderSource):  # it printed them when it was opened
        for line in raw_images.notes(data.class_names, counts, []):
            print(line, flush=True)
    statistics = pixel_statistics(data, config.inspect.num_images)
    for key in ('mean', 'std'):
        print(f'{key} of the pixels, 0 to 255: {", ".join(f"{value:.2f}" for value in statistics[key])}', flush=True)
    print(f'{100 * statistics["gray_images"]:.1f}% of {statistics["images"]:,} images are gray', flush=True)
    rate, megabytes = pipeline_rate(config, data)
    how = f'{config.data.num_threads} threads, {config.data.num_workers} workers'
    print(f'pipeline  {rounded(rate)} images/s  {megabytes:.1f} MB/s  ({how})', flush=True)

    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    writer.writerow(('label', 'class', 'images'))
    writer.writerows((label, name, counts[label]) for label, name in enumerate(data.class_names))
    summary = {
        'images': len(data),
        'image_shape': list(data.image_shape),
        'classes': len(data.class_names),
        'pixels': statistics,
        'pipeline': {'images_per_second': rate, 'megabytes_per_second': megabytes, 'read_with': how},
    }
    files.write(folder / 'classes.csv', table.getvalue().encode(errors='backslashreplace'))
    files.write_json(folder / 'statistics.json', summary)
    title = f'{config.data.name or config.data.data_dir or config.data.source}: {len(data):,} images'
    picture = figures.data_statistics(counts, data.class_names, statistics, title=title)
    style.save(folder / 'statistics', picture)
    grids.save_png(folder / 'images.png', grids.grid(*class_rows(data, labels, config.seed)))
    print(f'wrote images.png, classes.csv and statistics.json, .png and .svg in {printable(str(folder))}', flush=True)


def count_labels(data):
    """Return the label of every image, int32 [N], without decoding any."""
    labels, progress = np.empty(len(data), np.int32), Progress(len(data))
    for index in range(len(data)):
        labels[index] = data.label(index)
        progress.show(index + 1, 'labels')
    return labels


def pixel_statistics(data, count):
    """Return statistics of `count` images spread evenly over the data set, as plain values.

    {'mean', 'std', 'min', 'max' (each [C], of 0 .. 255), 'histogram' [C, 256], 'gray_images' (share), 'images'}.
    """
    indices = spread(len(data), count)
    channels = data.image_shape[-1]
    histogram, gray, progress = np.zeros((channels, 256), np.int64), 0, Progress(len(indices))
    for start in range(0, len(indices), _CHUNK):
        images = data.batch(indices[start : start + _CHUNK])['image']
        histogram += [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(channels)]
        gray += int((images == images[..., :1]).all((1, 2, 3)).sum())
        progress.show(min(start + _CHUNK, len(indices)), 'pixels')
    levels, total = np.arange(256), histogram.sum(1)
    mean = histogram @ levels / total
    present = [np.flatnonzero(row) for row in histogram]
    return {
        'images': len(indices),
        'mean': mean.tolist(),
        'std': np.sqrt(histogram @ levels**2 / total - mean**2).tolist(),
        'min': [int(row[0]) for row in present],
        'max': [int(row[-1]) for row in present],
        'gray_images': gray / len(indices),
        'histogram': histogram.tolist(),
    }


def pipeline_rate(config, data):
    """Return (images/s, uint8 megabytes/s) of this process's training pipeline, without a model.

    The first batch is not counted, because it waits for threads and workers to start.
    """
    with contextlib.closing(build.train_batches(config, data)) as batches:
        next(batches)
        start, images, size = time.monotonic(), 0, 0
        while time.monotonic() - start < config.inspect.seconds:
            batch = next(batches)['image']
            images, size = images + len(batch), size + batch.nbytes
        seconds = time.monotonic() - start
    return images / seconds, size / seconds / 1e6


def class_rows(data, labels, seed):
    """Return (rows of images, a name for each row) for `grids.grid`: random images of up to ten classes."""
    present = np.unique(labels)
    shown = present[spread(len(present), _SHOWN_CLASSES)]
    rows_each = max(_SHOWN_CLASSES // len(shown), 1)
    rows, names, rng = [], [], np.random.default_rng(seed)
    for label in shown:
        chosen = rng.permutation(np.flatnonzero(labels == label))[: rows_each * _COLUMNS]
        images = data.batch(chosen)['image']
        for start in range(0, len(chosen), _COLUMNS):
            rows.append(images[start : start + _COLUMNS])
            number_and_name = dict.fromkeys([str(label), data.class_names[label]])  # once if they are equal
            names.append(' '.join(number_and_name) if start == 0 else '')
    return rows, names
