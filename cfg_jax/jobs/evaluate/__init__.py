"""The evaluation job: fidelity against variety over guidance weights (CFG paper, figures 1 and 4)."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from cfg_jax import build, trained
from cfg_jax.checks import check_config, check_judge, check_sweep
from cfg_jax.data import spread
from cfg_jax.distributed import processes
from cfg_jax.errors import UserError
from cfg_jax.evaluation import columns
from cfg_jax.jobs.evaluate import bound, curves, given, judging, means, pages, searching
from cfg_jax.sampling import sample_sets


def run(config, workdir):
    """Judge images at every weight of the sweep, or those of config.eval.samples. Return the rows of all judges.

    Writes tables (tradeoff.csv, costs.csv), pictures (tradeoff.png, means.png, samples_*.png; with config.eval.held_out
    nearest_*.png) and report.html into config.eval.folder of the workdir, and adds the rows to results.csv of the
    workdir. With config.eval.variants, or another choice of several curves: ranking.csv too. With config.eval.search:
    search.csv, and the best point of each curve alone, measured again with the next seed. With several judges: all but
    the first write into a folder of config.eval.folder with their name, and the first one searches. With
    config.eval.bits_per_dim: bits_per_dim.json and .csv alone.
    """
    check_config(config)
    every = curves.curves(config)
    folder = Path(workdir) / config.eval.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f'{folder} is not a folder (config.eval.folder).')
    if config.eval.bits_per_dim:
        return bound.bound_likelihood(config, workdir, folder)
    check_judge(config)
    if config.eval.samples:
        class_names = trained.saved_class_names(workdir)
        return processes.first_alone(lambda: given.judge_given_samples(config, workdir, class_names))

    _check_sweeps(every)
    if config.eval.search:
        searching.check_curves(every)
    step = build.student_step(config, config.sample.num_steps)
    newest = trained.load_alone(config, workdir, step=step)
    every = curves.that_guide(every, newest.step)
    curves.check_models(every, newest)
    # Every process draws. The first one also judges, while the others draw on.
    measurings = processes.first_alone(lambda: judging.open_measurings(config, workdir, newest)) or []
    records = [pages.Record(measuring, workdir, newest.class_names) for measuring in measurings]
    measuring, tried = measurings[0] if measurings else None, []
    if measuring:
        means.write_means(newest, measuring.source, folder)
    for number, (curve, model) in enumerate(zip(every, curves.models(every, newest)), 1):
        if curve.variant and processes.is_first():
            print(f'variant {number} of {len(every)}: {curve.variant}', flush=True)
        best = None
        if config.eval.search:
            open_here = functools.partial(open_drawing, workdir=workdir)
            best, found = searching.search_curve(model, curve, measuring, open_here)
            tried.extend(found)
            processes.first_alone(lambda: pages.write_search(folder, tried))
            curve = searching.confirming(curve, best)
            model = dataclasses.replace(model, config=curve.config)
        for point, images in draw_curve(model, workdir):
            if not records:
                continue
            for record, judged in zip(records, judging.judge_set(model, curve, measurings, point, images)):
                if best and record is records[0]:
                    judged.row['search_fid'] = best.fid
                record.add(curve, judged)
                name = f'{pages.judge_of(judged.row)}  ' if len(records) > 1 else ''
                print(f'{point.name:<6} {name}{columns.summary_line(judged.row)}', flush=True)
        for record in records:
            record.end_curve(curve)
    processes.first_alone(lambda: [record.end() for record in records])
    return [row for record in records for row in record.rows]


def check_to_come(config, workdir):
    """Raise UserError unless a run that trains with this config in `workdir` leaves all that its evaluation reads."""
    check_config(config)
    every = curves.curves(config)
    _check_sweeps(every)
    curves.check_to_come(config, every, workdir)


def _check_sweeps(every):
    """Raise UserError for the first weight of a curve that cannot be, before anything is drawn."""
    for curve in every:
        name = f'variant {curve.variant!r}: ' if curve.variant else ''
        try:
            check_sweep(curve.config)
        except UserError as error:
            raise UserError(f'{name}{error}') from None


def draw_curve(model, workdir):
    """Yield (`Point`, `SampleSet`) for every weight of the curve, each set drawn to its end."""
    points, _ = curves.sweep(model.config)
    yield from open_drawing(model, workdir, model.config.eval.num_samples)(points)


def open_drawing(model, workdir, count):
    """Return the function points -> iterator of (`Point`, `SampleSet`), the set of `count` images drawn to its end.

    It compiles once, for all points. Sets that it has drawn are deleted after use unless config.eval.keep_samples.
    """
    config, seed = model.config, model.config.sample.seed
    ids = tuple(spread(config.data.num_classes, count).tolist())
    batch_size = trained.unit_size(config, count)
    batches = trained.image_batches(config, model.classifier, model.weak, batch_size=batch_size)

    compiled = set()

    def compile_sampler(point):
        """Draw one unit, so that the time of the first weight of a program is like that of the others."""
        program = trained.is_guided(config, point.guidance_weight), point.classifier_weight != 0.0
        if program not in compiled:
            compiled.add(program)
            labels = np.resize(ids, batch_size)
            next(batches(model.params, labels, point.guidance_weight, seed, point.classifier_weight))

    def draw_points(points):
        wanted = [trained.Wanted(ids, count, point.guidance_weight, point.classifier_weight) for point in points]
        sets = [trained.open_set(model, workdir, each) for each in wanted]
        # asked at once: later the first process judges, and the others would wait for its answer
        for point, images, missing in zip(points, sets, sample_sets.all_missing(sets)):

            def draw(units, point=point, labels=images.labels):
                compile_sampler(point)
                return batches(model.params, labels, point.guidance_weight, seed, point.classifier_weight, units=units)

            is_new = not images.folder.exists()
            images.draw(draw, point.name, missing)
            yield point, images
            if is_new and not config.eval.keep_samples and processes.is_first():
                images.delete()

    return draw_points
