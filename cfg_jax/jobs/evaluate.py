"""The evaluation job: the trade-off of fidelity and variety over guidance weights (CFG paper, figures 1 and 4)."""

import datetime
import functools
import hashlib
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cfg_jax import build, files
from cfg_jax.checks import check_config, check_judge
from cfg_jax.config import changed
from cfg_jax.data import sources
from cfg_jax.distributed import processes
from cfg_jax.errors import UserError
from cfg_jax.evaluation import figures, references, report, results, scoring
from cfg_jax.evaluation.judges import Judge
from cfg_jax.progress import Progress
from cfg_jax.sampling import generate, sample_sets
from cfg_jax.training import sharding

_ABOUT = ('date', 'samples', 'step', 'seed', 'judge', 'reference', 'reference_sha256', 'samples_sha256')
_IN_REPORT = tuple(key for key in results.RESULTS if not key.endswith('_error') and key not in _ABOUT)
_GRID = 100  # images in the picture of a weight


def sweep(config):
    """[(guidance weight, classifier weight)] of the curve, and which of the two it is drawn over."""
    if config.eval.classifier_weights:
        weight = build.guidance_weight(config)
        return [(weight, each) for each in sorted(set(config.eval.classifier_weights))], 'classifier_weight'
    return [
        (each, config.guidance.classifier_weight) for each in sorted(set(config.eval.guidance_weights))
    ], 'guidance_weight'


def groups(config):
    """A config for each curve: every sampler of config.eval.samplers with every number of config.eval.num_steps."""
    curves = []
    for sampler in dict.fromkeys(config.eval.samplers or (config.sample.sampler,)):
        for num_steps in dict.fromkeys(config.eval.num_steps or (config.sample.num_steps,)):
            curve = changed(config, {'sample.sampler': sampler, 'sample.num_steps': num_steps})
            check_config(curve)
            curves.append(curve)
    return curves


def run(config, workdir):
    """Judges images at every weight of the sweep, or those of config.eval.samples.

    Writes, into config.eval.folder, tradeoff.csv and .png, costs.csv, samples_*.png and report.html; adds its rows to
    results.csv of the workdir.
    """
    check_config(config)
    folder = Path(workdir) / config.eval.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f'{folder} is not a folder (config.eval.folder).')
    if config.eval.bits_per_dim:
        return run_bits_per_dim(config, workdir, folder)
    check_judge(config)
    if config.eval.samples:
        return processes.first_alone(lambda: run_on_samples(config, workdir, folder))
    curves = groups(config)
    restored = generate.load(config, workdir, sharding.make_mesh())
    # All processes draw; the first alone judges, while the others draw on.
    measuring = processes.first_alone(lambda: open_measuring(config, workdir, restored.step))
    classifier = generate.load_classifier(config, sharding.make_mesh())
    digests = [sample_sets.params_digest(params) for params in (restored.tree, classifier[1])]
    model = restored, classifier, digests
    rows, grids = [], []
    for curve in curves:
        ours, pictures = run_curve(curve, workdir, folder, model, measuring, rows)
        rows, grids = rows + ours, grids + pictures
    processes.first_alone(lambda: write_summary(config, workdir, folder, rows, grids, measuring))
    return rows


class Measuring(NamedTuple):
    """What images are measured with. facts: what rows have in common; other: rows of eval.compare_with, or None."""

    judge: Judge
    real: references.Reference
    facts: dict
    other: list | None = None


def open_measuring(config, workdir, step):
    """The `Measuring` of a sweep, once everything that it needs is there."""
    other = results.read_curve(Path(workdir) / config.eval.compare_with) if config.eval.compare_with else None
    results.read_all(Path(workdir) / 'results.csv')
    source = build.source(config)
    judge = scoring.open_judge(config, source)
    real = scoring.reference(config, judge, source, Path(workdir) / 'references')
    print_reference(real)
    scoring.check_enough(config, config.eval.num_samples, real)
    facts = describe_run(config, judge, real, step)
    if other:
        check_comparable(config, other[0], facts | {'num_samples': config.eval.num_samples})
    return Measuring(judge, real, facts, other)


def check_comparable(config, there, here):
    """Raises UserError unless a row of eval.compare_with was measured like ours: one plot shows both."""
    for key in ('num_samples', 'judge', 'reference_sha256'):
        if there.get(key, here[key]) != here[key]:
            raise UserError(
                f'{config.eval.compare_with!r} was measured with {key} {there[key]}, not {here[key]}; evaluate one '
                'of the two anew (config.eval.compare_with).'
            )


def run_curve(config, workdir, folder, model, measuring, before):
    """Draws and judges the images of one sampler at every weight: (rows, [(row, PNG of its images)]).

    model: the checkpoint, the classifier as `generate.load_classifier` gives it, and the digests of both's parameters.
    measuring: a `Measuring`, or None in processes that only draw. before: rows of the curves before this one.
    """
    restored, classifier, digests = model
    drawing = generate.image_batches(config, classifier=classifier)
    pairs, over = sweep(config)
    seed, symbol, count = config.sample.seed, figures.SYMBOLS[over], config.eval.num_samples
    ids = sources.spread(config.data.num_classes, count).tolist()
    sets = [sample_sets.open_set(config, classifier[0], workdir, digests, ids, count, *pair) for pair in pairs]
    labels = sets[0].labels

    @functools.cache
    def compile_sampler():
        """Draws one unit, so that the first weight's time is like the others'."""
        next(drawing(restored.tree, labels[: config.sample.batch_size], 0.0, seed))

    costs, rows, grids, same_noise, by_class = build.count_evaluations(config), [], [], [], []
    suffix = curve_suffix(config)
    # all at once: later the first process judges, and the others would wait for its answer
    for (weight, classifier_weight), images, missing in zip(pairs, sets, sample_sets.all_missing(sets)):
        name = f'{symbol}={weight if over == "guidance_weight" else classifier_weight:g}'

        def draw(units, pair=(weight, classifier_weight)):
            compile_sampler()
            return drawing(restored.tree, labels, pair[0], seed, pair[1], units=units)

        ours = not images.folder.exists()
        images.draw(draw, name, missing)
        if measuring is None:
            continue
        judge, real, facts, _ = measuring
        outputs = scoring.judged(judge, images.shards(), len(images), name)
        row = {'guidance_weight': float(weight), 'classifier_weight': float(classifier_weight)}
        row |= scoring.measure(config, judge, outputs, labels, real)
        row |= {
            'num_samples': len(images),
            'num_steps': len(build.sampling_logsnrs(config)),
            'sampler': config.sample.sampler,
            'seed': seed,
            'seconds_per_image': images.seconds() / len(images),
            'samples_sha256': images.sha256,
            **costs,
            **facts,
        }
        rows.append(row)
        if judge.classes_are_labels:
            by_class.append((name, scoring.accuracy_by_class(outputs.logits, labels, config.data.num_classes)))
            table = results.accuracy_table(restored.class_names, by_class)
            files.write(folder / f'accuracy_by_class{suffix}.csv', table.encode())
        first = images.first(_GRID)
        same_noise.append(first[: 2 * min(config.data.num_classes, 10)])
        picture = figures.as_png(figures.class_grid(first, labels[: len(first)], restored.class_names))
        grids.append((row, picture))
        files.write(folder / f'samples{suffix}_{name.replace("=", "")}.png', picture)
        files.write(folder / 'tradeoff.csv', results.as_csv(before + rows, results.COLUMNS).encode())
        files.write(folder / 'costs.csv', results.as_csv(before + rows, results.COSTS).encode())
        if ours and not config.eval.keep_samples:
            images.delete()
        print_row(name, row)
    if measuring:
        names = [f'{symbol} = {row[over]:g}' for row in rows]
        figures.save_png(folder / f'samples{suffix}_over_{symbol}.png', figures.grid(same_noise, names))
        real_score = measuring.real.inception_score and measuring.real.inception_score[0]
        picture = figures.tradeoff(rows, title=title_of(config, rows), over=over, real=real_score)
        files.write(folder / f'tradeoff{suffix}.png', picture)
    return rows, grids


def curve_suffix(config):
    """What tells the files of one of several curves from the others'."""
    several = len(config.eval.samplers) > 1 or len(config.eval.num_steps) > 1
    return f'_{config.sample.sampler}{len(build.sampling_logsnrs(config))}' if several else ''


def run_on_samples(config, workdir, folder):
    """Judges the images of config.eval.samples, anyone's: one row."""
    found = references.load_samples(
        config.eval.samples, channels=config.data.image_channels, num_classes=config.data.num_classes
    )
    if found.images.shape[1:] != build.image_shape(config):
        raise UserError(
            f'{config.eval.samples} holds images of {found.images.shape[1:]}, not {build.image_shape(config)} '
            '(config.eval.samples, config.data.image_size, config.data.image_channels).'
        )
    source = None if config.eval.reference and config.eval.judge == 'inception' else build.source(config)
    labels = match_classes(config, found, source)
    judge = scoring.open_judge(config, source)
    results.read_all(Path(workdir) / 'results.csv')
    real = scoring.reference(config, judge, source, Path(workdir) / 'references')
    print_reference(real)
    scoring.check_enough(config, len(found.images), real)
    facts = describe_run(config, judge, real, None) | {'samples': str(config.eval.samples)}
    facts['samples_sha256'] = hashlib.sha256(np.ascontiguousarray(found.images)).hexdigest()
    outputs = scoring.judged(judge, [found.images], len(found.images), 'samples')
    row = scoring.measure(config, judge, outputs, labels, real) | {'num_samples': len(found.images)} | facts
    print_row('samples', row)
    first = found.images[sources.spread(len(found.images), _GRID)]
    picture = figures.as_png(figures.grid([first[start : start + 10] for start in range(0, len(first), 10)]))
    write_summary(config, workdir, folder, [row], [(row, picture)], Measuring(judge, real, facts))
    return [row]


def match_classes(config, found, source):
    """The samples' labels as the data set's, int32 [N], or None where they have none; UserError for mixed classes."""
    if found.labels is None or found.class_names is None:
        return found.labels
    if source is None:
        return None  # their names cannot be told from the data set's
    unknown = [name for name in found.class_names if name not in source.class_names]
    if unknown and all(name in map(str, range(len(source.class_names))) for name in found.class_names):
        return np.array([int(name) for name in found.class_names], np.int32)[found.labels]
    if unknown:
        raise UserError(
            f'{config.eval.samples} has the class {unknown[0]!r}, which is none of the data set '
            f'({", ".join(source.class_names[:3])}, ...) (config.eval.samples).'
        )
    return np.array([source.class_names.index(name) for name in found.class_names], np.int32)[found.labels]


def describe_run(config, judge, real, step):
    """What every row of this evaluation has in common."""
    return {
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'samples': '',
        'step': step,
        'judge': judge.identity,
        'reference': config.eval.reference or config.data.name or config.data.data_dir or config.data.source,
        'reference_sha256': real.hash,
    }


def title_of(config, rows):
    """A line that says what the curves are of."""
    row = rows[0]
    made = f'{row["num_steps"]} {row["sampler"]} steps, training step {row["step"]:,}, ' if row['step'] else ''
    return (
        f'{config.data.name or config.data.data_dir or config.data.source}: {row["num_samples"]:,} samples a weight, '
        f'{made}judge {config.eval.judge!r}'
    )


def print_reference(real):
    """A line about the real images."""
    score = f'IS {real.inception_score[0]:.2f}  ' if real.inception_score else ''
    count = f'{real.num_images:,} images, ' if real.num_images else ''
    print(f'data   {score}({count}sha256 {real.hash[:12]})', flush=True)


def print_row(name, row):
    """A line of what a reader looks for first."""
    shown = {'fid': 'FID', 'sfid': 'sFID', 'inception_score': 'IS'}
    shown |= {key: key for key in ('precision', 'recall', 'accuracy', 'spread')}
    text = '  '.join(
        f'{label} {row[key]:.{4 if key == "accuracy" else 3}f}' for key, label in shown.items() if key in row
    )
    print(f'{name:<6} {text}', flush=True)


def write_summary(config, workdir, folder, rows, grids, measuring):
    """results.csv, the report and, where another curve is given, comparison.png."""
    path, (_, real, facts, other) = Path(workdir) / 'results.csv', measuring
    columns, former = results.read_all(path)
    files.write(path, results.as_csv([*former, *rows], columns).encode())
    notes = []
    few = rows[0]['num_samples'] < 10_000
    if few:
        notes.append(
            f'{rows[0]["num_samples"]:,} samples: FID is biased upwards at such numbers and compares only with FID of '
            'as many; FID∞ is its extrapolation to endlessly many.'
        )
    if config.eval.judge != 'inception':
        notes.append(f'The judge is {config.eval.judge!r}: its numbers compare with its own alone, not with papers.')
    shown = {
        'judge': facts['judge'],
        'reference': facts['reference'],
        'reference sha256': facts['reference_sha256'],
        'training step': facts['step'],
        'samples': facts['samples'],
        'date': facts['date'],
        'cfg_jax': metadata.version('cfg_jax'),
        'command': ' '.join(['python -m cfg_jax.main', *sys.argv[1:]]),
    }
    page = report.render(
        title=title_of(config, rows) if len(groups(config)) == 1 else f'{config.data.name or config.data.source}',
        rows=rows,
        columns=_IN_REPORT,
        settings=config.to_dict(),
        references={name: value for name, value in shown.items() if value not in (None, '')},
        grids=grids,
        notes=notes,
        real={'inception_score': real.inception_score[0]} if real.inception_score else None,
    )
    page_path = folder / ('samples_report.html' if config.eval.samples else 'report.html')
    files.write(page_path, page.encode())
    if other:
        pairs = (config.eval.compare_with, other), (config.eval.folder or '.', rows)
        curves = {curve_name(folder, rows): rows for folder, rows in pairs}
        files.write(folder / 'comparison.png', figures.comparison(curves, title=title_of(config, rows)))
        print(f'wrote {folder}/comparison.png', flush=True)
    others = '' if config.eval.samples else ' and its tables and pictures'
    print(f'wrote {page_path}{others}; added to {path}', flush=True)


def curve_name(folder, rows):
    """What a curve of a folder of the workdir is called in a plot with others."""
    kind = 'classifier guidance' if rows[0]['classifier_gradients'] else 'classifier-free'
    return kind if folder == '.' else f'{kind} ({folder})'


def run_bits_per_dim(config, workdir, folder):
    """Writes bits_per_dim.json: the bound on -log2 p(image | label) by dimension, over eval.num_samples real images."""
    params, step, *_ = generate.load(config, workdir, sharding.make_mesh())
    params = sharding.to_local(params, sharding.local_mesh())
    return processes.first_alone(lambda: measure_bits_per_dim(config, params, step, folder))


def measure_bits_per_dim(config, params, step, folder):
    """What process 0 does of it: {'total', 'prior', 'num_images', 'num_steps', 'step'}."""
    source = build.source(config)
    bound = build.bits_per_dim(config)
    count, size = min(config.eval.num_samples, len(source)), config.sample.batch_size
    progress, parts = Progress(count), []
    for start in range(0, count, size):
        indices = np.arange(start, min(start + size, count))
        filled = np.resize(indices, size)  # one compilation
        batch, seed = source.batch(filled), np.uint32(config.sample.seed)
        terms = bound(params, batch['image'], batch['label'], filled.astype(np.uint32), seed)
        parts.append({key: np.asarray(terms[key])[: len(indices)] for key in ('total', 'prior')})
        progress.show(start + len(indices), 'bits per dim')
    means = {key: float(np.concatenate([part[key] for part in parts]).mean()) for key in ('total', 'prior')}
    result = {**means, 'num_images': count, 'num_steps': len(build.sampling_logsnrs(config)), 'step': step}
    files.write_json(folder / 'bits_per_dim.json', result)
    print(
        f'bits per dim {means["total"]:.4f} (prior {means["prior"]:.2g}), wrote {folder}/bits_per_dim.json', flush=True
    )
    return result
