"""Judging sets of images: a scorer, and a row of the table for each set."""

import dataclasses
import datetime
import posixpath
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cfg_jax import build, build_sampling, metrics, trained
from cfg_jax.config import changed
from cfg_jax.data.sources import Source
from cfg_jax.errors import UserError
from cfg_jax.evaluation import columns, grids, judges, memorisation, results, scoring
from cfg_jax.jobs.evaluate import curves, searching
from cfg_jax.training import sharding

_GRID = 100  # images in the picture of a weight
_HELD_OUT = 10_000  # held-out images, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Measuring:
    """The scorer of an evaluation by one judge, with what its rows share.

    config: that of the evaluation, with this judge alone, and its folder. facts: columns that all rows share. other:
    the rows of config.eval.compare_with, or None. source: the data set, or None for given samples.
    """

    config: ConfigDict
    scorer: scoring.Scorer
    facts: dict
    other: list | None = None
    source: Source | None = None

    def folder(self, workdir):
        """Return the folder of this judge's tables, pictures and report."""
        return Path(workdir) / self.config.eval.folder


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """A set of images, judged: its row of the table and its pictures.

    confusion: `metrics.confusion_matrix`, or None if the judge has other classes. picture: PNG bytes, one row per
    class; nearest: those of `nearest_picture` or None. first: uint8 [n, H, W, C], which start from the same noise at
    every weight. influences: what each image changes FID by, times N.
    """

    name: str
    row: dict
    confusion: np.ndarray | None
    picture: bytes
    first: np.ndarray
    influences: np.ndarray
    nearest: bytes | None = None


def by_judge(config):
    """Return the config of each judge alone. All after the first have a folder of their own in config.eval.folder."""
    first, *others = judges.names(config.eval.judge)
    configs = [changed(config, {'eval.judge': first})]
    for name in others:
        kept = ('folder', 'compare_with') if config.eval.compare_with else ('folder',)
        places = {f'eval.{key}': posixpath.join(config.eval[key], name) for key in kept}
        configs.append(changed(config, {'eval.judge': name, **places}))
    return configs


def open_measurings(config, workdir, model):
    """Return the `Measuring` of each judge for a `Trained` model's sweep, after checking that all can be read."""
    source = build.source(config)
    source.order_classes(model.class_names)
    return [_open_measuring(config, workdir, model, source) for config in by_judge(config)]


def _open_measuring(config, workdir, model, source):
    other = results.read_curve(Path(workdir) / config.eval.compare_with) if config.eval.compare_with else None
    results.read_all(Path(workdir) / 'results.csv')
    scorer = open_scorer(config, workdir, source)
    scorer.check_enough(config.eval.num_samples, allow_few=config.eval.allow_few_samples)
    if config.eval.search:
        searching.check_enough(config, scorer)
    facts = shared_facts(config, scorer, model)
    if other:
        check_comparable(config.eval.compare_with, other[0], facts | {'num_samples': config.eval.num_samples})
    return Measuring(config, scorer, facts, other, source)


def open_scorer(config, workdir, source):
    """Return the `Scorer` of the judge and the reference that config.eval names; prints a line about the reference."""
    weights = config.eval.get(f'{config.eval.judge}_weights', '')  # not all judges read a file that the user chose
    settings = {'weights': weights, 'num_steps': config.eval.judge_steps}
    settings |= {'mesh': sharding.local_mesh(), 'cache': Path(workdir) / 'judges'}
    judge = scoring.open_judge(config.eval.judge, source, config.data.num_classes, **settings)
    images = source and scoring.RealImages(judge, source, config.eval.reference_images)
    rules = {key: config.eval[key] for key in ('nearest_k', 'split_images', 'coverage_k')}
    if config.eval.reference:
        real = scoring.reference_of_file(judge, config.eval.reference, build.image_shape(config))
    else:
        real = scoring.reference_of_data(images, Path(workdir) / 'references', **rules)
    score = f'IS {real.inception_score[0]:.2f}  ' if real.inception_score else ''
    score += f'FID of two halves {floor_text(real)}  ' if real.floor else ''
    count = f'{real.num_images:,} images, ' if real.num_images else ''
    print(f'data   {score}({count}sha256 {real.hash[:12]})', flush=True)
    return scoring.Scorer(
        judge, real, **rules, training=open_training(config, workdir, judge, images, len(source or ()))
    )


def open_training(config, workdir, judge, images, total):
    """Return the `memorisation.Training` that config.eval.held_out asks for, or None.

    images: `scoring.RealImages` of training, of `total` in the data set.
    """
    data = build.held_out_source(config)
    if data is None:
        return None
    held_out = scoring.RealImages(judge, data, _HELD_OUT, 'held-out images')
    training = scoring.training_of_data(images, held_out, Path(workdir) / 'references', name=config.eval.held_out)
    missed = '; copies of the others are missed (config.eval.reference_images)' if len(images) < total else ''
    searched = f'{len(images):,} of {total:,} training images{missed}'
    print(f'memorisation  against {searched}, with {len(held_out):,} held-out images', flush=True)
    return training


def nearest_picture(scorer, near, source, samples_at, title):
    """Return a PNG of samples beside their nearest training images; None if memorisation is not measured.

    near: that of the samples. source: the data set. samples_at: numbers of samples -> images.
    """
    if near is None:
        return None
    training, parts = scorer.training, memorisation.chosen(near.ratios)
    limit = training.limit()
    neighbours = [source.batch(training.indices[near.places[part]].ravel())['image'] for part in parts]
    neighbours = [each.reshape(len(part), -1, *each.shape[1:]) for part, each in zip(parts, neighbours)]
    ratios = [near.ratios[part] for part in parts]
    samples = [samples_at(part) for part in parts]
    return grids.as_png(memorisation.draw(samples, neighbours, ratios, limit=limit, title=title))


def floor_text(real):
    """Return the FID of two halves of a reference that has it, with its deviation, as text."""
    mean, deviation = (f'{value:{columns.column("fid").format}}' for value in real.floor)
    return f'{mean} ± {deviation}'


def real_values(real):
    """Return {column: value} of the real images of a reference, as far as it has them."""
    pairs = {'inception_score': real.inception_score, 'fid': real.floor}
    return {name: pair[0] for name, pair in pairs.items() if pair}


def check_comparable(name, other, row):
    """Raise UserError unless a row of config.eval.compare_with was measured as ours is: one plot shows both."""
    for key in ('num_samples', 'judge', 'reference_sha256'):
        if other.get(key, row[key]) != row[key]:
            raise UserError(
                f'the curve in {name!r} was measured with {key} {other[key]}, this one with {row[key]}; evaluate one '
                'of the two again (config.eval.compare_with).'
            )


def judge_set(model, curve, measurings, point, images):
    """Return the images of a `SampleSet` of a `Trained` model, at a point of a curve, as each judge's `Judged`."""
    labels, config = images.labels, curve.config
    settings = {
        'guidance_weight': float(point.guidance_weight),
        'classifier_weight': float(point.classifier_weight),
        'step': model.step,
        'model_sha256': model.digest[:16],
        'parameters': {True: 'ema', False: 'raw'}.get(curve.ema, 'post-hoc'),
        'ema_length': curves.length(curve.ema),
        'weak_ema_length': curves.length(config.guidance.weak_ema) if model.weak else None,
        'num_samples': len(images),
        'num_steps': len(build_sampling.sampling_logsnrs(config)),
        'sampler': config.sample.sampler,
        'seed': config.sample.seed,
        'seconds_per_image': images.seconds() / len(images),
        'samples_sha256': images.sha256,
        **build_sampling.count_evaluations(config, point.guidance_weight, point.classifier_weight),
        **settings_of(config),
        'classifier': network_name(model.classifier, config.guidance.classifier_workdir),
        'weak': network_name(model.weak, config.guidance.weak_workdir),
        'variant': curve.variant,
        'overrides': curve.overrides,
    }
    first = images.first(_GRID)
    title = trained.drawn_with(config, point.guidance_weight, point.classifier_weight)
    picture = grids.as_png(grids.class_grid(first, labels[: len(first)], model.class_names, title=title))
    shared, found = (picture, first[: 2 * min(config.data.num_classes, 10)]), []
    used = [measuring.scorer.judge for measuring in measurings]
    for measuring, outputs in zip(measurings, scoring.judged(used, images.shards(), len(images), point.name)):
        scorer, confusion = measuring.scorer, None
        influences, near = scorer.fid_influences(outputs.features), scorer.near(outputs.features)
        row = {**measuring.facts, **settings, **scorer.measure(outputs, labels, influences, near)}
        if scorer.judge.classes_are_labels:
            confusion = metrics.confusion_matrix(outputs.logits, labels, config.data.num_classes)
        nearest = nearest_picture(scorer, near, measuring.source, images.at, title)
        found.append(Judged(point.name, row, confusion, *shared, influences, nearest))
    return found


def shared_facts(config, scorer, model):
    """Return the columns that every row of this evaluation has in common. model: `Trained`, None for given samples."""
    return {
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'samples': '',
        'step': model and model.step,
        'judge': scorer.judge.identity,
        'reference': config.eval.reference or build.data_name(config),
        'reference_sha256': scorer.real.hash,
        'folder': config.eval.folder,
        'nearest_k': config.eval.nearest_k,
        'split_images': config.eval.split_images,
        'coverage_k': config.eval.coverage_k,
        'held_out': config.eval.held_out,
        'model_sha256': model and model.digest[:16],
    }


def network_name(network, workdir):
    """Return the text that tells a classifier or a weak model, a `Trained`, from others; None if there is none."""
    return network and ', '.join(filter(None, (workdir, f'step {network.step}', f'sha256 {network.digest[:16]}')))


def settings_of(config):
    """Return the columns that tell how a curve's images are drawn, apart from the sampler, steps and weights."""
    sample, guided = config.sample, bool(config.guidance.classifier_workdir)
    churns = sample.sampler == 'heun' and sample.churn
    lowers = 'lower_order_final' in build_sampling.SAMPLERS[sample.sampler][1]
    constant_v = sample.sampler == 'ancestral' and not config.model.learn_variance
    return {
        'guidance': trained.guidance_identity(config),
        'classifier_form': config.guidance.classifier_form if guided else None,
        'clip_first': config.guidance.clip_first if guided else None,
        'spacing': sample.spacing,
        'grid': trained.grid_words(config),
        'churn': ' '.join(map(str, (sample.churn, *sample.churn_interval, sample.churn_noise))) if churns else None,
        'v': sample.v if constant_v else None,
        'eta': sample.eta if sample.sampler == 'ddim' else None,
        'clip_x': sample.clip_percentile if sample.clip_x and sample.clip_percentile else sample.clip_x,
        'label_order': sample.label_order,
        'dtype': config.model.dtype,
        'ema_decay': config.optim.ema_decay,
        'interval': curves.interval_text(config),
        'lower_order_final': False if lowers and not sample.lower_order_final else None,
    }
