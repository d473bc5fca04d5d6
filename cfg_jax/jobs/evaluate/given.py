"""Judging images that any program has made."""

import hashlib
from pathlib import Path

import numpy as np

from cfg_jax import build, files
from cfg_jax.data import spread
from cfg_jax.errors import UserError
from cfg_jax.evaluation import columns, grids, judges, references, results, scoring
from cfg_jax.jobs.evaluate import judging, pages
from cfg_jax.sampling.labels import meanings

_SHOWN = 100  # images in the picture


def judge_given_samples(config, workdir, class_names):
    """Judge the images of config.eval.samples, made by any program: one row for each judge.

    class_names: those of the workdir's checkpoint, in whose order label ids count, or ().
    """
    found = references.load_samples(
        config.eval.samples, channels=config.data.image_channels, num_classes=config.data.num_classes
    )
    if found.images.shape[1:] != build.image_shape(config):
        raise UserError(
            f'{config.eval.samples} holds images of {found.images.shape[1:]}, not {build.image_shape(config)} '
            '(config.eval.samples, config.data.image_size, config.data.image_channels).'
        )
    source = None
    if config.eval.held_out or not config.eval.reference or 'trained' in judges.names(config.eval.judge):
        source = build.source(config)
        source.order_classes(class_names)
    labels = match_classes(config.eval.samples, found, source)
    results.read_all(Path(workdir) / 'results.csv')
    count, measurings, rows = len(found.images), [], []
    given = {
        'num_samples': count,
        'samples': str(config.eval.samples),
        'samples_sha256': hashlib.sha256(np.ascontiguousarray(found.images)).hexdigest(),
    }
    for alone in judging.by_judge(config):
        scorer = judging.open_scorer(alone, workdir, source)
        scorer.check_enough(count, allow_few=config.eval.allow_few_samples)
        measurings.append(judging.Measuring(alone, scorer, judging.shared_facts(alone, scorer, None) | given))
    first = found.images[spread(count, _SHOWN)]
    picture = grids.as_png(grids.grid([first[start : start + 10] for start in range(0, len(first), 10)]))
    used = [measuring.scorer.judge for measuring in measurings]
    for measuring, outputs in zip(measurings, scoring.judged(used, [found.images], count, 'samples')):
        scorer = measuring.scorer
        near = scorer.near(outputs.features)
        row = scorer.measure(outputs, labels, near=near) | measuring.facts
        print(f'samples {columns.summary_line(row)}', flush=True)
        if nearest := judging.nearest_picture(scorer, near, source, found.images.__getitem__, 'samples'):
            files.write(measuring.folder(workdir) / 'nearest.png', nearest)
        pages.write_summary(workdir, [row], [(row, picture)], measuring)
        rows.append(row)
    return rows


def match_classes(path, found, source):
    """Return the labels of `references.Samples` as the data set's, int32 [N]; None if they have none to compare.

    The classes of the samples are all names, or all label ids. Raises UserError for a class that the data set does not
    have, and if both readings are possible and differ.
    """
    if found.labels is None or found.class_names is None:
        return found.labels
    if source is None:
        return None  # without the data set its class names are not known
    by_name, by_id = zip(*(meanings(name, source.class_names) for name in found.class_names))
    readings = {ids for ids in (by_name, by_id) if None not in ids}
    if not readings:
        unknown = found.class_names[by_name.index(None)]
        raise UserError(
            f'{path} has the class {unknown!r}, which the data set does not have '
            f'({", ".join(source.class_names[:3])}, ...) (config.eval.samples).'
        )
    if len(readings) > 1:
        name = next(name for name, *ids in zip(found.class_names, by_name, by_id) if ids[0] != ids[1])
        raise UserError(
            f'{path}: the folder {name!r} may be the class of that name or that label id, which is another class; '
            f'call the folders "name:{name}" or "id:{name}" and so on (config.eval.samples).'
        )
    return np.array(readings.pop(), np.int32)[found.labels]
