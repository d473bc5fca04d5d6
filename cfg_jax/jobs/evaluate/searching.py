"""The search for a curve's best weight and interval, with few images at each point."""

import dataclasses

from cfg_jax import build_sampling
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.distributed import processes
from cfg_jax.errors import UserError
from cfg_jax.evaluation import scoring, search, values
from cfg_jax.jobs.evaluate import curves

COLUMNS = (
    *('variant', 'round', 'guidance_weight', 'classifier_weight', 'interval', 'fid', 'fid_error'),
    *('num_samples', 'seed', 'sampler', 'num_steps', 'samples_sha256'),
)


def check_enough(config, scorer):
    """Raise UserError if FID of config.eval.search_samples images cannot be measured."""
    try:
        scorer.check_enough(config.eval.search_samples, allow_few=config.eval.allow_few_samples)
    except UserError as error:
        raise UserError(str(error).replace('config.eval.num_samples', 'config.eval.search_samples')) from None


def intervals(config):
    """Return (the intervals that the search of a curve begins with, the `UserError` of those given or None).

    A curve whose config refuses every interval, say because it has no guidance, keeps its own. Raises UserError if it
    refuses some of them.
    """
    given, refused = tuple(dict.fromkeys(map(tuple, config.eval.search_intervals))), []
    for interval in given:
        try:
            check_config(changed(config, {'guidance.interval': interval}))
        except UserError as error:
            refused.append(error)
    if refused and len(refused) < len(list(filter(None, given))):
        raise refused[0]
    return (given if given and not refused else (tuple(config.guidance.interval),)), next(iter(refused), None)


def check_curves(every):
    """Raise UserError if the intervals of config.eval.search_intervals cannot be, before anything is drawn."""
    refused = []
    for curve in every:
        name = f'variant {curve.variant!r}: ' if curve.variant else ''
        try:
            refused.append(intervals(curve.config)[1])
        except UserError as error:
            raise UserError(f'{name}{error} It is one of config.eval.search_intervals.') from None
    if all(refused):
        raise UserError(f'{refused[0]} It is one of config.eval.search_intervals.')


def search_curve(model, curve, measuring, open_drawing):
    """Return (the `search.Tried` of least FID, rows of search.csv). All processes call it; the first one judges.

    measuring: None in the other processes, which get no rows. open_drawing(model, count=) -> (points -> iterator of
    (`Point`, `SampleSet`)) is called once for each interval, since each is a program of its own.
    """
    count, drawings, rows = curve.config.eval.search_samples, {}, []

    def evaluate(weight, interval):
        config = limited(curve, weight, interval)
        key, place = config.guidance.interval, curves.point(config, weight)
        if key not in drawings:
            drawings[key] = open_drawing(dataclasses.replace(model, config=config), count=count)
        for _, images in drawings[key]([place]):  # a loop of one: it deletes a set that is not kept
            fid = processes.first_alone(lambda images=images: judge(config, place, images))
        return processes.of_first(fid)

    def judge(config, place, images):
        (outputs,) = scoring.judged([measuring.scorer.judge], images.shards(), len(images), place.name)
        row = {
            'variant': curve.variant,
            'guidance_weight': place.guidance_weight,
            'classifier_weight': place.classifier_weight,
            'interval': curves.interval_text(config),
            **measuring.scorer.measure_fid(outputs.features),
            'num_samples': len(images),
            'seed': config.sample.seed,
            'sampler': config.sample.sampler,
            'num_steps': len(build_sampling.sampling_logsnrs(config)),
            'samples_sha256': images.sha256,
        }
        rows.append(row)
        limits = f' λ {row["interval"]} ' if row['interval'] else ''
        print(f'{place.name:<6}{limits} {values.show_named(row, "fid")} in the search', flush=True)
        return float(row['fid'])

    over, weights = curves.swept(curve.config)
    options = {'rounds': curve.config.eval.search_rounds, 'off': 0.0 if over == 'guidance_weight' else None}
    first, refusal = intervals(curve.config)
    if refusal and processes.is_first():
        print(f'no interval is searched: {refusal}', flush=True)
    best, tried = search.search(evaluate, weights, first, **options)
    end = search.at_end(best, tried)
    if (end == 'highest' or (end and best.weight)) and processes.is_first():
        print(f'the best weight, {best.weight:g}, is the {end} of those given: others may be better', flush=True)
    return best, [{**row, 'round': each.round} for row, each in zip(rows, tried)]


def limited(curve, weight, interval):
    """Return the curve's config with an interval, or as it is at w = 0, where there is no guidance to limit."""
    off = curves.swept(curve.config)[0] == 'guidance_weight' and not weight
    return curve.config if off else changed(curve.config, {'guidance.interval': interval})


def confirming(curve, best):
    """Return the `Curve` of one point that measures the best of a search again, with the next seed."""
    over, _ = curves.swept(curve.config)
    changes = {
        'sample.seed': (curve.config.sample.seed + 1) % 2**32,
        f'eval.{over}s': (best.weight,),
    }
    return dataclasses.replace(curve, config=changed(limited(curve, best.weight, best.interval), changes))
