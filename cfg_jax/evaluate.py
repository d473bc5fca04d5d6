"""The evaluation job: the trade-off of fidelity and variety over guidance weights (CFG paper, figures 1 and 4)."""

import copy
import csv
import datetime
import io
import json
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from cfg_jax import build, figures, references, report, sample_sets, sampling, scoring, sharding
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
# results.csv, to which every evaluation adds its rows
RESULTS = (
    *('date', 'samples', 'step', 'sampler', 'num_steps', 'guidance_weight', 'classifier_weight'),
    *('fid', 'fid_error', 'fid_infinity', 'sfid', 'inception_score', 'inception_score_error', 'precision'),
    *('precision_error', 'recall', 'recall_error', 'kernel_distance', 'kernel_distance_error', 'accuracy', 'spread'),
    *('num_samples', 'seed', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('judge', 'reference', 'reference_sha256', 'samples_sha256'),
)
_ABOUT = ('date', 'samples', 'step', 'seed', 'judge', 'reference', 'reference_sha256', 'samples_sha256')
_IN_REPORT = tuple(key for key in RESULTS if not key.endswith('_error') and key not in _ABOUT)
_GRID = 100  # images in the picture of a weight


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
    return [{key: float(value or 'nan') if key in numbers else value for key, value in row.items()} for row in rows]


def sweep(config):
    """[(guidance weight, classifier weight)] of the curve, and which of the two it is drawn over."""
    if config.eval.classifier_weights:
        weight = build.guidance_weight(config)
        return [(weight, each) for each in sorted(config.eval.classifier_weights)], 'classifier_weight'
    return [
        (each, config.guidance.classifier_weight) for each in sorted(config.eval.guidance_weights)
    ], 'guidance_weight'


def groups(config):
    """A config for each curve: every sampler of config.eval.samplers with every number of config.eval.num_steps."""
    curves = []
    for sampler in config.eval.samplers or (config.sample.sampler,):
        for num_steps in config.eval.num_steps or (config.sample.num_steps,):
            curve = copy.deepcopy(config)
            curve.sample.sampler, curve.sample.num_steps = sampler, num_steps
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
    if config.eval.bits_per_dim:
        return run_bits_per_dim(config, workdir, folder, sharding.make_mesh())
    check_judge(config)
    if config.eval.samples:  # the first of several processes by itself
        rows = run_on_samples(config, workdir, folder) if jax.process_index() == 0 else []
        sample_sets.wait_for_all('evaluated')
        return rows
    other = config.eval.compare_with and read_curve(Path(workdir) / config.eval.compare_with)
    restored = sampling.load(config, workdir, sharding.make_mesh())
    source = build.source(config)
    judge = scoring.open_judge(config, source)
    real = scoring.reference(config, judge, source, Path(workdir) / 'references', config.eval.num_samples)
    print_reference(real)
    scoring.check_enough(config, config.eval.num_samples, real)
    labels = np.resize(np.arange(config.data.num_classes, dtype=np.int32), config.eval.num_samples)
    facts = describe_run(config, judge, real, restored.step)
    classifier = sampling.load_classifier(config, sharding.make_mesh())
    digests = [sample_sets.params_digest(params) for params in (restored.tree, classifier[1])]
    model = restored, classifier, digests
    rows, grids = [], []
    for curve in groups(config):
        ours, pictures = run_curve(curve, workdir, folder, model, judge, labels, real, facts, rows)
        rows, grids = rows + ours, grids + pictures
    if jax.process_index() == 0:
        write_summary(config, workdir, folder, rows, grids, facts, real, other)
    sample_sets.wait_for_all('evaluated')
    return rows


def run_curve(config, workdir, folder, model, judge, labels, real, facts, before):
    """Draws and judges the images of one sampler at every weight: (rows, [(row, PNG of its images)]).

    model: the checkpoint, the classifier as `sampling.load_classifier` gives it, and the digests of both's parameters.
    """
    restored, classifier, digests = model
    drawing = sampling.image_batches(config, classifier=classifier)
    pairs, over = sweep(config)
    seed, symbol = config.sample.seed, figures.SYMBOLS[over]
    sets = [sample_sets.open_set(config, classifier[0], workdir, digests, labels, *pair) for pair in pairs]
    if not all(images.is_whole() for images in sets):
        # one unit compiles the sampler, so that the first weight's time is like the others'
        next(drawing(restored.tree, labels[: config.sample.batch_size], 0.0, seed))
    costs, rows, grids, same_noise, by_class = build.count_evaluations(config), [], [], [], []
    suffix = curve_suffix(config)
    for (weight, classifier_weight), images in zip(pairs, sets):
        name = f'{symbol}={weight if over == "guidance_weight" else classifier_weight:g}'

        def draw(units, pair=(weight, classifier_weight)):
            return drawing(restored.tree, labels, pair[0], seed, pair[1], units=units)

        ours = not images.folder.exists()
        images.draw(draw, name)
        if jax.process_index() != 0:
            continue
        outputs = scoring.judged(judge, images.shards(), len(images), name)
        row = {'guidance_weight': float(weight), 'classifier_weight': float(classifier_weight)}
        row |= scoring.measure(config, judge, outputs, labels, real)
        row |= {
            'num_samples': len(images),
            'num_steps': len(build.sampling_logsnrs(config)),
            'sampler': config.sample.sampler,
            'seed': seed,
            'seconds_per_image': images.seconds() / len(images),
            'samples_sha256': images.sha256(),
            **costs,
            **facts,
        }
        rows.append(row)
        if judge.classes_are_labels:
            by_class.append((name, scoring.accuracy_by_class(outputs.logits, labels, config.data.num_classes)))
            table = accuracy_table(restored.class_names, by_class)
            figures.write_atomically(folder / f'accuracy_by_class{suffix}.csv', table.encode())
        first = images.first(_GRID)
        same_noise.append(first[: 2 * min(config.data.num_classes, 10)])
        picture = figures.as_png(figures.class_grid(first, labels[: len(first)], restored.class_names))
        grids.append((row, picture))
        figures.write_atomically(folder / f'samples{suffix}_{name.replace("=", "")}.png', picture)
        figures.write_atomically(folder / 'tradeoff.csv', as_csv(before + rows, COLUMNS).encode())
        figures.write_atomically(folder / 'costs.csv', as_csv(before + rows, COSTS).encode())
        if ours and not config.eval.keep_samples:
            images.delete()
        print_row(name, row)
    if jax.process_index() == 0:
        names = [f'{symbol} = {row[over]:g}' for row in rows]
        figures.save_png(folder / f'samples{suffix}_over_{symbol}.png', figures.grid(same_noise, names))
        real_score = real.inception_score and real.inception_score[0]
        picture = figures.tradeoff(rows, title=title_of(config, rows, facts), over=over, real=real_score)
        figures.write_atomically(folder / f'tradeoff{suffix}.png', picture)
    return rows, grids


def accuracy_table(class_names, by_class):
    """CSV text: a row a class, a column for each (name, accuracy of every class) of `by_class`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['class', *(name for name, _ in by_class)])
    for label, class_name in enumerate(class_names):
        writer.writerow([class_name, *(f'{accuracies[label]:.4g}' for _, accuracies in by_class)])
    return text.getvalue()


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
    real = scoring.reference(config, judge, source, Path(workdir) / 'references', len(found.images))
    print_reference(real)
    scoring.check_enough(config, len(found.images), real)
    facts = describe_run(config, judge, real, None) | {'samples': str(config.eval.samples)}
    outputs = scoring.judged(judge, [found.images], len(found.images), 'samples')
    row = scoring.measure(config, judge, outputs, labels, real) | {'num_samples': len(found.images)} | facts
    print_row('samples', row)
    first = found.images[np.linspace(0, len(found.images) - 1, min(_GRID, len(found.images))).astype(int)]
    picture = figures.as_png(figures.grid([first[start : start + 10] for start in range(0, len(first), 10)]))
    write_summary(config, workdir, folder, [row], [(row, picture)], facts, real, None)
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


def title_of(config, rows, facts):
    """A line that says what the curves are of."""
    row = rows[0]
    made = f'{row["num_steps"]} {row["sampler"]} steps, training step {facts["step"]:,}, ' if facts['step'] else ''
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


def write_summary(config, workdir, folder, rows, grids, facts, real, other):
    """results.csv, report.html and, where another curve is given, comparison.png."""
    path, former = Path(workdir) / 'results.csv', []
    if path.exists():
        former = list(csv.DictReader(path.read_text().splitlines()))
    figures.write_atomically(path, as_csv([*former, *rows], RESULTS).encode())
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
        title=title_of(config, rows, facts)
        if len(groups(config)) == 1
        else f'{config.data.name or config.data.source}',
        rows=rows,
        columns=_IN_REPORT,
        settings=config.to_dict(),
        references={name: value for name, value in shown.items() if value not in (None, '')},
        grids=grids,
        notes=notes,
        real={'inception_score': real.inception_score[0]} if real.inception_score else None,
    )
    figures.write_atomically(folder / 'report.html', page.encode())
    if other:
        pairs = (config.eval.compare_with, other), (config.eval.folder or '.', rows)
        curves = {curve_name(folder, rows): rows for folder, rows in pairs}
        title = title_of(config, rows, facts)
        figures.write_atomically(folder / 'comparison.png', figures.comparison(curves, title=title))
        print(f'wrote {folder}/comparison.png', flush=True)
    print(f'wrote {folder}/report.html and its tables and pictures; added to {path}', flush=True)


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
        filled = np.resize(indices, size)  # one compilation
        batch, seed = source.batch(filled), np.uint32(config.sample.seed)
        terms = bound(params, batch['image'], batch['label'], filled.astype(np.uint32), seed)
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
