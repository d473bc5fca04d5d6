"""The evaluation job: fidelity against variety over guidance weights (CFG paper, figures 1 and 4)."""

import dataclasses
import datetime
import functools
import hashlib
import sys
from pathlib import Path

import numpy as np

import cfg_jax
from cfg_jax import build, files, trained
from cfg_jax.checks import check_config, check_judge
from cfg_jax.config import changed
from cfg_jax.data.sources import spread
from cfg_jax.distributed import processes
from cfg_jax.errors import UserError
from cfg_jax.evaluation import columns, figures, grids, likelihood, references, report, results, scoring, style
from cfg_jax.sampling import sample_sets
from cfg_jax.sampling.labels import meanings, spread_labels
from cfg_jax.training import sharding

_GRID = 100  # images in the picture of a weight


def run(config, workdir):
    """Judge images at every weight of the sweep, or those of config.eval.samples. Return the rows of the table.

    Writes tradeoff.csv, .png and .svg, costs.csv, samples_*.png and report.html into config.eval.folder of the workdir,
    and adds the rows to results.csv of the workdir. With config.eval.bits_per_dim: bits_per_dim.json alone.
    """
    check_config(config)
    folder = Path(workdir) / config.eval.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f'{folder} is not a folder (config.eval.folder).')
    if config.eval.bits_per_dim:
        return bound_likelihood(config, workdir, folder)
    check_judge(config)
    if config.eval.samples:
        class_names = trained.saved_class_names(workdir)
        return processes.first_alone(lambda: judge_given_samples(config, workdir, folder, class_names))

    curve_configs = curves(config)
    model = trained.load(config, workdir)
    # Every process draws. The first one also judges, while the others draw on.
    measuring = processes.first_alone(lambda: open_measuring(config, workdir, model))
    rows, pictures = [], []
    for curve in curve_configs:
        suffix = curve_suffix(curve)
        sets = []
        for point, images in draw_curve(dataclasses.replace(model, config=curve), workdir):
            if measuring is None:
                continue
            judged = judge_set(curve, model.class_names, measuring, point, images)
            sets.append(judged)
            files.write(folder / f'samples{suffix}_{point.name.replace("=", "")}.png', judged.picture)
            write_tables(folder, suffix, rows, sets, model.class_names)
            print(f'{point.name:<6} {columns.summary_line(judged.row)}', flush=True)
        if measuring:
            write_curve_pictures(curve, folder, suffix, sets, measuring.scorer.real)
        rows += [judged.row for judged in sets]
        pictures += [(judged.row, judged.picture) for judged in sets]
    processes.first_alone(lambda: write_summary(config, workdir, folder, rows, pictures, measuring))
    return rows


# ---------------------------------------------------------------- the sweep


@dataclasses.dataclass(frozen=True)
class Point:
    """One place of a curve: its two weights, and its name, such as 'w=0.3'."""

    guidance_weight: float
    classifier_weight: float
    name: str


def sweep(config):
    """Return the `Point`s of a curve by increasing weight, and the name of the weight that varies."""
    if config.eval.classifier_weights:
        over, weight = 'classifier_weight', build.guidance_weight(config)
        pairs = [(weight, each) for each in sorted(set(config.eval.classifier_weights))]
    else:
        over, weight = 'guidance_weight', config.guidance.classifier_weight
        pairs = [(each, weight) for each in sorted(set(config.eval.guidance_weights))]
    symbol = columns.SYMBOLS[over]
    return [Point(*pair, f'{symbol}={pair[over == "classifier_weight"]:g}') for pair in pairs], over


def curves(config):
    """Return a config per curve: every sampler of config.eval.samplers with every number of config.eval.num_steps."""
    configs = []
    for sampler in dict.fromkeys(config.eval.samplers or (config.sample.sampler,)):
        for num_steps in dict.fromkeys(config.eval.num_steps or (config.sample.num_steps,)):
            curve = changed(config, {'sample.sampler': sampler, 'sample.num_steps': num_steps})
            check_config(curve)
            configs.append(curve)
    return configs


def curve_suffix(config):
    """Return the part of a file name that tells one of several curves from the others; '' if there is only one."""
    several = len(config.eval.samplers) > 1 or len(config.eval.num_steps) > 1
    return f'_{config.sample.sampler}{len(build.sampling_logsnrs(config))}' if several else ''


# ---------------------------------------------------------------- drawing


def draw_curve(model, workdir):
    """Yield (`Point`, `SampleSet`) for every weight of the curve, each set drawn to its end.

    Sets that this call has drawn are deleted after use unless config.eval.keep_samples.
    """
    config, (points, _) = model.config, sweep(model.config)
    ids = tuple(spread_labels(config.data.num_classes, config.eval.num_samples))
    sets = []
    for point in points:
        wanted = trained.Wanted(ids, config.eval.num_samples, point.guidance_weight, point.classifier_weight)
        sets.append(trained.open_set(model, workdir, wanted))
    labels, batch_size, seed = sets[0].labels, sets[0].batch_size, config.sample.seed
    batches = trained.image_batches(config, model.classifier, batch_size=batch_size)

    @functools.cache
    def compile_sampler():
        """Draw one unit, so that the time of the first weight is like that of the others."""
        next(batches(model.params, labels[:batch_size], 0.0, seed))

    # asked at once: later the first process judges, and the others would wait for its answer
    for point, images, missing in zip(points, sets, sample_sets.all_missing(sets)):

        def draw(units, point=point):
            compile_sampler()
            return batches(model.params, labels, point.guidance_weight, seed, point.classifier_weight, units=units)

        is_new = not images.folder.exists()
        images.draw(draw, point.name, missing)
        yield point, images
        if is_new and not config.eval.keep_samples and processes.is_first():
            images.delete()


# ---------------------------------------------------------------- judging


@dataclasses.dataclass(frozen=True, eq=False)
class Measuring:
    """The scorer of an evaluation, with what its rows share.

    facts: columns that all rows share. other: the rows of config.eval.compare_with, or None.
    """

    scorer: scoring.Scorer
    facts: dict
    other: list | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """A set of images, judged: its row of the table, its accuracy by class or None, and its pictures.

    picture: PNG bytes, one row per class. first: uint8 [n, H, W, C], which start from the same noise at every weight.
    """

    name: str
    row: dict
    accuracies: list | None
    picture: bytes
    first: np.ndarray


def open_measuring(config, workdir, model):
    """Return the `Measuring` of a `Trained` model's sweep, after checking that everything it needs can be read."""
    other = results.read_curve(Path(workdir) / config.eval.compare_with) if config.eval.compare_with else None
    results.read_all(Path(workdir) / 'results.csv')
    source = build.source(config)
    source.order_classes(model.class_names)
    scorer = open_scorer(config, workdir, source)
    scorer.check_enough(config.eval.num_samples, allow_few=config.eval.allow_few_samples)
    facts = shared_facts(config, scorer, model)
    if other:
        check_comparable(config.eval.compare_with, other[0], facts | {'num_samples': config.eval.num_samples})
    return Measuring(scorer, facts, other)


def open_scorer(config, workdir, source):
    """Return the `Scorer` of the judge and the reference that config.eval names; prints a line about the reference."""
    settings = {'weights': config.eval.inception_weights, 'num_steps': config.eval.judge_steps}
    judge = scoring.open_judge(
        config.eval.judge, source, config.data.num_classes, mesh=sharding.local_mesh(), **settings
    )
    rules = {'nearest_k': config.eval.nearest_k, 'split_images': config.eval.split_images}
    if config.eval.reference:
        real = scoring.reference_of_file(judge, config.eval.reference, build.image_shape(config))
    else:
        kept, count = Path(workdir) / 'references', config.eval.reference_images
        real = scoring.reference_of_data(judge, source, kept, num_images=count, **rules)
    score = f'IS {real.inception_score[0]:.2f}  ' if real.inception_score else ''
    count = f'{real.num_images:,} images, ' if real.num_images else ''
    print(f'data   {score}({count}sha256 {real.hash[:12]})', flush=True)
    return scoring.Scorer(judge, real, **rules)


def check_comparable(name, other, row):
    """Raise UserError unless a row of config.eval.compare_with was measured as ours is: one plot shows both."""
    for key in ('num_samples', 'judge', 'reference_sha256'):
        if other.get(key, row[key]) != row[key]:
            raise UserError(
                f'the curve in {name!r} was measured with {key} {other[key]}, this one with {row[key]}; evaluate one '
                'of the two again (config.eval.compare_with).'
            )


def judge_set(config, class_names, measuring, point, images):
    """Return the images of a `SampleSet` as `Judged`."""
    scorer, labels = measuring.scorer, images.labels
    outputs = scoring.judged(scorer.judge, images.shards(), len(images), point.name)
    row = {
        'guidance_weight': float(point.guidance_weight),
        'classifier_weight': float(point.classifier_weight),
        **scorer.measure(outputs, labels),
        'num_samples': len(images),
        'num_steps': len(build.sampling_logsnrs(config)),
        'sampler': config.sample.sampler,
        'seed': config.sample.seed,
        'seconds_per_image': images.seconds() / len(images),
        'samples_sha256': images.sha256,
        **build.count_evaluations(config),
        **measuring.facts,
        **settings_of(config),
    }
    accuracies = None
    if scorer.judge.classes_are_labels:
        accuracies = scoring.accuracy_by_class(outputs.logits, labels, config.data.num_classes)
    first = images.first(_GRID)
    title = trained.drawn_with(config, point.guidance_weight, point.classifier_weight)
    picture = grids.as_png(grids.class_grid(first, labels[: len(first)], class_names, title=title))
    return Judged(point.name, row, accuracies, picture, first[: 2 * min(config.data.num_classes, 10)])


def shared_facts(config, scorer, model):
    """Return the columns that every row of this evaluation has in common. model: `Trained`, None for given samples."""
    guide = model and model.classifier
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
        'model_sha256': model and model.digest[:16],
        'classifier': guide and f'{config.guidance.classifier_workdir}, step {guide.step}, sha256 {guide.digest[:16]}',
    }


def settings_of(config):
    """Return the columns that tell how a curve's images are drawn, apart from the sampler, steps and weights."""
    sample, guided = config.sample, bool(config.guidance.classifier_workdir)
    constant_v = sample.sampler == 'ancestral' and not config.model.learn_variance
    return {
        'guidance': trained.guidance_identity(config),
        'classifier_form': config.guidance.classifier_form if guided else None,
        'clip_first': config.guidance.clip_first if guided else None,
        'spacing': sample.spacing,
        'v': sample.v if constant_v else None,
        'eta': sample.eta if sample.sampler == 'ddim' else None,
        'clip_x': sample.clip_x,
        'label_order': sample.label_order,
        'dtype': config.model.dtype,
        'ema_decay': config.optim.ema_decay,
    }


def judge_given_samples(config, workdir, folder, class_names):
    """Judge the images of config.eval.samples, made by any program: one row.

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
    if not (config.eval.reference and config.eval.judge == 'inception'):
        source = build.source(config)
        source.order_classes(class_names)
    labels = match_classes(config.eval.samples, found, source)
    results.read_all(Path(workdir) / 'results.csv')
    scorer = open_scorer(config, workdir, source)
    scorer.check_enough(len(found.images), allow_few=config.eval.allow_few_samples)
    facts = shared_facts(config, scorer, None) | {'samples': str(config.eval.samples)}
    facts['samples_sha256'] = hashlib.sha256(np.ascontiguousarray(found.images)).hexdigest()
    outputs = scoring.judged(scorer.judge, [found.images], len(found.images), 'samples')
    row = scorer.measure(outputs, labels) | {'num_samples': len(found.images)} | facts
    print(f'samples {columns.summary_line(row)}', flush=True)
    first = found.images[spread(len(found.images), _GRID)]
    picture = grids.as_png(grids.grid([first[start : start + 10] for start in range(0, len(first), 10)]))
    write_summary(config, workdir, folder, [row], [(row, picture)], Measuring(scorer, facts))
    return [row]


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


# ---------------------------------------------------------------- tables, pictures and the report


def write_tables(folder, suffix, former, sets, class_names):
    """Write tradeoff.csv and costs.csv of the `former` rows and the curve's, and the curve's accuracy_by_class.csv."""
    rows = former + [judged.row for judged in sets]
    files.write(folder / 'tradeoff.csv', results.as_csv(rows, columns.TRADEOFF).encode())
    files.write(folder / 'costs.csv', results.as_csv(rows, columns.COSTS).encode())
    if sets[0].accuracies:
        by_class = [(judged.name, judged.accuracies) for judged in sets]
        table = results.accuracy_table(class_names, by_class)
        files.write(folder / f'accuracy_by_class{suffix}.csv', table.encode())


def write_curve_pictures(config, folder, suffix, sets, real):
    """Write the pictures of a whole curve: the same noise at every weight, and the trade-off."""
    rows, (_, over) = [judged.row for judged in sets], sweep(config)
    symbol = columns.SYMBOLS[over]
    names = [f'{symbol} = {row[over]:g}' for row in rows]
    grid = grids.grid([judged.first for judged in sets], names)
    grids.save_png(folder / f'samples{suffix}_over_{symbol}.png', grid)
    real_score = real.inception_score and real.inception_score[0]
    picture = figures.tradeoff(rows, title=title_of(config, rows), over=over, real=real_score)
    style.save(folder / f'tradeoff{suffix}', picture)


def title_of(config, rows, *, guidance=True):
    """Return a line that says what the curves show. guidance: name it too, if all curves have the same."""
    row = rows[0]
    parts = [f'{row["num_samples"]:,} samples per weight']
    if row['step'] is not None:  # drawn here
        parts += [f'{row["num_steps"]} {row["sampler"]} steps', f'training step {row["step"]:,}']
        parts += [guidance_name(row['guidance'], row['classifier_gradients'])] * guidance
    return f'{build.data_name(config)}: {", ".join(parts)}, judge {config.eval.judge!r}'


def guidance_name(function, by_classifier):
    """Return the name of a guidance in titles. function: the column 'guidance', which older tables do not have."""
    if not function:
        function = 'conditional' if by_classifier else 'classifier_free'
    names = {'classifier_free': 'classifier-free', 'conditional': '', 'unconditional': 'unconditional model'}
    own = function.partition(',')[0].rpartition(':')[2]
    name = names.get(own, own)
    if own in ('conditional', 'unconditional'):
        return f'{name}, {"classifier" if by_classifier else "no"} guidance'.removeprefix(', ')
    return f'{name} and classifier guidance' if by_classifier else f'{name} guidance'


def write_summary(config, workdir, folder, rows, pictures, measuring):
    """Write results.csv, the report and, if another curve is given, comparison.png and .svg.

    pictures: [(row, PNG bytes)].
    """
    path = Path(workdir) / 'results.csv'
    names, former = results.read_all(path)
    every, replaced = results.merged(former, rows)
    files.write(path, results.as_csv(every, names).encode())
    page_path = folder / ('samples_report.html' if config.eval.samples else 'report.html')
    files.write(page_path, report_page(config, rows, pictures, measuring).encode(errors='backslashreplace'))
    if measuring.other:
        pairs = (config.eval.compare_with, measuring.other), (config.eval.folder or '.', rows)
        both = {curve_name(name, rows): rows for name, rows in pairs}
        style.save(folder / 'comparison', figures.comparison(both, title=title_of(config, rows, guidance=False)))
        print(f'wrote {folder}/comparison.png and .svg', flush=True)
    beside = '' if config.eval.samples else ', its tables and its pictures'
    again = f', {replaced} in place of rows of the same settings' if replaced else ''
    print(f'wrote {page_path}{beside}; added to {path}: {len(rows)}{again}', flush=True)


def report_page(config, rows, pictures, measuring):
    """Return report.html as text."""
    notes = []
    if rows[0]['num_samples'] < 10_000:
        notes.append(
            f'{rows[0]["num_samples"]:,} samples: FID is biased upwards at such numbers and compares only with FID of '
            'equally many samples; FID∞ is its extrapolation to infinitely many.'
        )
    if config.eval.judge != 'inception':
        notes.append(
            f'The judge is {config.eval.judge!r}: compare its numbers only with its own, not with those in papers.'
        )
    facts, real_score = measuring.facts, measuring.scorer.real.inception_score
    origin = {
        'judge': facts['judge'],
        'reference': facts['reference'],
        'reference sha256': facts['reference_sha256'],
        'training step': facts['step'],
        'samples': facts['samples'],
        'date': facts['date'],
        'cfg_jax': cfg_jax.__version__,
        'command': ' '.join(['python -m cfg_jax.main', *sys.argv[1:]]),
    }
    several = len(curves(config)) > 1
    return report.render(
        title=config.data.name or config.data.source if several else title_of(config, rows),
        rows=rows,
        columns=columns.IN_REPORT,
        settings=config.to_dict(),
        references={name: value for name, value in origin.items() if value not in (None, '')},
        grids=pictures,
        notes=notes,
        real={'inception_score': real_score[0]} if real_score else None,
    )


def curve_name(folder, rows):
    """Return the name of a folder's curve in a plot with others."""
    kind = guidance_name(rows[0].get('guidance'), rows[0]['classifier_gradients'])
    return kind if folder == '.' else f'{kind} ({folder})'


# ---------------------------------------------------------------- bits per dimension


def bound_likelihood(config, workdir, folder):
    """Write bits_per_dim.json: the bound on -log2 p(image | label) over eval.num_samples real images, per dimension."""
    model = trained.load(config, workdir)
    params = sharding.to_local(model.params, sharding.local_mesh())

    def measure():
        bound, source = functools.partial(build.bits_per_dim(config), params), build.source(config)
        source.order_classes(model.class_names)
        means = likelihood.bits_per_dim(
            bound,
            source,
            num_images=config.eval.num_samples,
            batch_size=config.sample.batch_size,
            seed=config.sample.seed,
        )
        (number, lowest, highest), discrete = build.bound_range(config), build.table(config) is not None
        ends = {'num_steps': number, 'logsnr_min': lowest, 'logsnr_max': highest}
        result = {**means, **ends, 'discrete': discrete, 'step': model.step}
        path = folder / 'bits_per_dim.json'
        files.write_json(path, result)
        error = '' if result['standard_error'] is None else f' ± {result["standard_error"]:.4f}'
        parts = ', '.join(f'{key} {result[key]:.2g}' for key in likelihood.PARTS[1:])
        print(
            f'bits per dim {result["total"]:.4f}{error} ({parts}; {result["num_images"]:,} images, each at {number} λ '
            f'from {lowest:g} to {highest:g}){likelihood.explanation(result, discrete=discrete)}; wrote {path}',
            flush=True,
        )
        return result

    return processes.first_alone(measure)
