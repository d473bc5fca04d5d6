"""Checks of a config: every job makes them before it begins; an error names the first field that is wrong."""

import importlib
import math
import pkgutil
from itertools import pairwise

import numpy as np

from cfg_jax import build, build_sampling, denoisers, diffusion, losses, phema
from cfg_jax.config import default
from cfg_jax.data import images
from cfg_jax.errors import UserError
from cfg_jax.evaluation import judges

JUDGES = tuple(sorted(module.name for module in pkgutil.iter_modules(judges.__path__)))
_CHOICES = {
    'data.source': ('digits', 'tfds', 'folder', 'mixture'),
    'data.resampling': tuple(images.RESAMPLINGS),
    'diffusion.schedule': ('cosine', *build.TABLES),
    'diffusion.prediction': tuple(diffusion.PARAMETERISATIONS),
    'model.kind': ('unet', 'classifier'),
    'model.labels': ('null', 'classes', 'none'),
    'model.dtype': ('float32', 'bfloat16'),
    'loss.target': ('eps', 'x', 'v'),
    'loss.guided': ('', 'gft'),
    'loss.weighting': ('', *losses.WEIGHTINGS),
    'loss.times': ('uniform', *build.TIMES),
    'optim.name': ('adam', 'adamw'),
    'optim.decay': ('constant', 'cosine', 'linear'),
    'distill.method': ('', 'guided', 'progressive'),
    'guidance.classifier_form': ('eps', 'mean'),
    'guidance.weak': build_sampling.WEAK,
    'sample.grid': build_sampling.GRIDS,
    'sample.sampler': tuple(build_sampling.SAMPLERS),
    'sample.label_order': ('balanced', 'random'),
}
_LEAST = {
    'eval.reference_images': 0,
    'seed': 0,
    'data.image_size': 1,
    'data.image_channels': 1,
    'data.num_classes': 1,
    'data.num_threads': 0,
    'data.num_workers': 0,
    'model.channels': 1,
    'model.num_blocks': 1,
    'model.num_heads': 1,
    'model.num_groups': 1,
    'optim.learning_rate': 0,
    'optim.clip_norm': 0,
    'optim.weight_decay': 0,
    'optim.warmup_steps': 0,
    'optim.ema_snapshot_every': 0,
    'train.num_steps': 1,
    'train.log_every': 1,
    'train.checkpoint_every': 1,
    'train.keep_checkpoints': 1,
    'train.keep_every': 0,
    'train.grid_every': 0,
    'train.grid_images': 1,
    'sample.num_steps': 1,
    'sample.num_images': 1,
    'sample.batch_size': 1,
    'sample.shard_images': 1,
    'sample.seed': 0,
    'guidance.time_scale': 0,
    'guidance.apg_norm_threshold': 0,
    'guidance.schedule_power': 0,
    'sample.churn': 0,
    'sample.churn_noise': 0,
    'eval.nearest_k': 1,
    'eval.coverage_k': 1,
    'eval.bound_evaluations': 1,
    'eval.judge_steps': 1,
    'eval.split_images': 1,
    'eval.search_samples': 1,
    'eval.search_rounds': 0,
    'prepare.num_workers': 0,
    'prepare.num_shards': 0,
    'inspect.num_images': 1,
    'inspect.seconds': 0,
    'laboratory.num_samples': 100,
    'laboratory.target_samples': 100,
    'laboratory.train_steps': 10,
    'laboratory.batch_size': 1,
    'laboratory.width': 1,
}
_BETWEEN_0_AND_1 = ('loss.p_uncond', 'sample.v', 'sample.eta', 'guidance.rescale_factor')
_FINITE = (
    'guidance.time_scale', 'guidance.apg_norm_threshold', 'guidance.apg_eta', 'guidance.momentum',
    'guidance.schedule_power', 'sample.churn', 'sample.churn_noise', 'loss.sigmoid_bias',
)  # fmt: skip
_BELOW_1 = ('model.dropout', 'optim.b1', 'optim.b2', 'optim.ema_decay')


def check_config(config):
    """Raise UserError for the first value that is not allowed, naming its field."""
    _check_values(config)
    _check_combinations(config)
    _check_loss(config)
    _check_splits(config)
    _check_judges(config)
    _check_averages(config)
    _check_curves(config)
    _check_held_out(config)
    _check_search(config)
    _check_network(config)
    _check_guidance(config)
    _check_learned_guidance(config)
    _check_distillation(config)
    _check_grid(config)
    build_sampling.guidance_weight(config)


def check_training(config):
    """Raise UserError for a config that can be drawn with, but should not be trained."""
    trains = config.distill.method or config.loss.guided
    untrained = 'False unless config.distill.method or config.loss.guided is set: nothing else trains its weight'
    _require(trains or not config.model.guidance_input, config, 'model.guidance_input', untrained)
    build.student_step(config, config.sample.num_steps)  # raises if no round makes that student, which is drawn with
    build_sampling.check_weight(config, build_sampling.guidance_weight(config))  # of the grids


def check_sweep(config):
    """Raise UserError for a guidance weight of a curve that would change nothing, or that cannot be."""
    if len(config.eval.classifier_weights):
        build_sampling.check_weight(config, build_sampling.guidance_weight(config))
    else:
        build_sampling.check_weight(config, config.eval.guidance_weights, 'config.eval.guidance_weights')


def check_judge(config):
    """Raise UserError unless config.eval names a judge, and the weights files that judges read are there."""
    allowed = f'allowed: {", ".join(map(repr, JUDGES))}'
    if not judges.names(config.eval.judge):
        raise UserError(f'config.eval.judge is not set; {allowed}.')
    for name in judges.names(config.eval.judge):
        weights = config.eval.get(f'{name}_weights')  # None: a judge that reads no file that the user chose
        if weights is not None:
            importlib.import_module(f'{judges.__name__}.{name}').PUBLISHED.require(weights)


def _get(config, name):
    value = config
    for key in name.split('.'):
        value = value[key]
    return value


def _require(holds, config, name, allowed):
    if not holds:
        raise UserError(f'config.{name} is {_get(config, name)!r}; it must be {allowed}.')


def _check_values(config):
    """Check each value by itself."""
    for name, allowed in _CHOICES.items():
        if _get(config, name) not in allowed:
            raise UserError(f'config.{name} is {_get(config, name)!r}; allowed: {", ".join(map(repr, allowed))}.')
    for name, least in _LEAST.items():
        _require(_get(config, name) >= least, config, name, f'at least {least}')
    for name in ('seed', 'sample.seed'):
        _require(_get(config, name) < 2**32, config, name, f'below {2**32}')
    for name in _BETWEEN_0_AND_1:
        _require(0 <= _get(config, name) <= 1, config, name, 'between 0 and 1')
    for name in _FINITE:
        _require(math.isfinite(_get(config, name)), config, name, 'a finite number')
    for name in ('sample.clip_percentile', 'guidance.dynamic_percentile'):
        _require(0 <= _get(config, name) <= 100, config, name, 'between 0 and 100')
    for name in _BELOW_1:
        _require(0 <= _get(config, name) < 1, config, name, 'at least 0 and below 1')
    for name in ('guidance_weights', 'classifier_weights', 'bound_weights'):
        finite = all(map(math.isfinite, config.eval[name]))
        _require(finite, config, f'eval.{name}', 'a tuple of finite numbers')
    _require(math.isfinite(build_sampling.guidance_weight(config)), config, 'sample.guidance_weight', 'a finite number')
    for name in ('laboratory.radius', 'laboratory.std', 'diffusion.sigma_data', 'loss.min_snr_gamma'):
        _require(0 < _get(config, name) < math.inf, config, name, 'above 0')
    weights = config.laboratory.weights
    increasing = weights and weights[0] >= 0 and all(a < b for a, b in pairwise((*weights, math.inf)))
    _require(increasing, config, 'laboratory.weights', 'a tuple of finite, increasing numbers, at least 0')
    _require(0 < config.plan.utilisation <= 1, config, 'plan.utilisation', 'above 0 and at most 1')
    _require(0 <= config.plan.price < math.inf, config, 'plan.price', 'at least 0 (0 if it is not known)')
    _require(config.data.image_channels in (1, 3), config, 'data.image_channels', '1 or 3')
    for name in ('guidance_weights', 'bound_weights'):
        _require(len(config.eval[name]) > 0, config, f'eval.{name}', 'a tuple of at least one number')


def _check_combinations(config):
    """Check values that have to agree with each other."""
    samples, neighbours = config.eval.num_samples, config.eval.nearest_k
    _require(samples > neighbours, config, 'eval.num_samples', f'above config.eval.nearest_k, {neighbours}')
    samplers = config.eval.samplers
    names = _CHOICES['sample.sampler']
    of_names = f'a tuple of names from {", ".join(map(repr, names))}'
    _require(set(samplers) <= set(names), config, 'eval.samplers', of_names)
    _require(min(config.eval.num_steps, default=1) >= 1, config, 'eval.num_steps', 'a tuple of whole numbers above 0')
    spaced = not config.eval.num_steps or not config.sample.spacing
    _require(spaced, config, 'eval.num_steps', '() because config.sample.spacing is set')
    lowest = config.diffusion.logsnr_min
    kept, every = config.train.keep_every, config.train.checkpoint_every
    _require(
        kept % every == 0, config, 'train.keep_every', f'a multiple of config.train.checkpoint_every, {every}, or 0'
    )
    _require(lowest < config.diffusion.logsnr_max, config, 'diffusion.logsnr_min', 'below config.diffusion.logsnr_max')
    above = lowest < config.eval.bound_logsnr_max < math.inf
    _require(above, config, 'eval.bound_logsnr_max', f'a number above config.diffusion.logsnr_min, {lowest:g}')
    adamw = config.optim.name == 'adamw'
    _require(
        adamw or not config.optim.weight_decay, config, 'optim.weight_decay', "0 unless config.optim.name is 'adamw'"
    )

    tabulated = config.diffusion.schedule in build.TABLES
    tables = f'unless config.diffusion.schedule is one of {", ".join(map(repr, build.TABLES))}'
    _require(tabulated or not config.model.learn_variance, config, 'model.learn_variance', f'False {tables}')
    _require(tabulated or not config.sample.spacing, config, 'sample.spacing', f"'' {tables}")
    null = config.model.labels == 'null'
    _require(null or not config.loss.p_uncond, config, 'loss.p_uncond', "0 unless config.model.labels is 'null'")
    form = config.guidance.classifier_form == 'eps' or config.sample.sampler == 'ancestral'
    _require(form, config, 'guidance.classifier_form', "'eps' unless config.sample.sampler is 'ancestral'")
    weights = config.guidance.classifier_weight or len(config.eval.classifier_weights)
    guided = config.guidance.classifier_workdir or not weights
    workdir = (
        'the workdir of a trained classifier because config.guidance.classifier_weight is not 0 or '
        'config.eval.classifier_weights are set'
    )
    _require(guided, config, 'guidance.classifier_workdir', workdir)


def _check_loss(config):
    """Check what the network predicts, and the weight and the times of its loss."""
    unread = ('diffusion.prediction', 'loss.target', 'loss.weighting', 'loss.times')
    for applies, reason in (
        (config.model.learn_variance, 'config.model.learn_variance is set'),
        (config.model.kind == 'classifier', "config.model.kind is 'classifier'"),
    ):
        for field in unread if applies else ():
            usual = _get(default(), field)
            _require(_get(config, field) == usual, config, field, f'{usual!r} because {reason}')
    because = f'because config.loss.guided is {config.loss.guided!r}'
    for field, holds, allowed in (
        ('model.guidance_input', config.model.guidance_input, 'True'),
        ('model.labels', config.model.labels == 'null', "'null'"),
        ('loss.p_uncond', config.loss.p_uncond > 0, 'above 0, so that the null label is trained,'),
        ('distill.method', not config.distill.method, "''"),
    ):
        _require(holds or not config.loss.guided, config, field, f'{allowed} {because}')
    weighting = config.loss.weighting
    weighted = f"'eps' because config.loss.weighting is {weighting!r}, which is a weight of the error on eps"
    _require(not weighting or config.loss.target == 'eps', config, 'loss.target', weighted)
    tabulated = config.diffusion.schedule in build.TABLES and config.loss.times == 'uniform'
    steep = "other than 'sigmoid', which needs dλ/du: a table has none (config.diffusion.schedule, config.loss.times)"
    _require(weighting != 'sigmoid' or not tabulated, config, 'loss.weighting', steep)


def _check_judges(config):
    """Check the judges that config.eval names."""
    names = judges.names(config.eval.judge)
    allowed = f'allowed: {", ".join(map(repr, JUDGES))}, or several with commas'
    if 'digits' in names:
        raise UserError(f"config.eval.judge is {config.eval.judge!r}; the judge 'digits' is called 'trained' now.")
    if not set(names) <= set(JUDGES):
        raise UserError(f'config.eval.judge is {config.eval.judge!r}; {allowed}.')
    _require(len(set(names)) == len(names), config, 'eval.judge', 'a text that names each judge once')
    alone = len(names) < 2 or not config.eval.reference
    _require(alone, config, 'eval.reference', "'' because config.eval.judge names several judges: it belongs to one")


def _check_splits(config):
    """Check the splits that --mode=prepare makes."""
    names = all(isinstance(split, str) and split for split in config.prepare.splits)
    _require(names, config, 'prepare.splits', "a tuple of names such as ('train', 'test')")


def _check_averages(config):
    """Check which averages of the parameters training keeps, and those that guidance and evaluation read."""
    optim, (shortest, longest) = config.optim, (0.01, phema.LONGEST)
    lengths, every = optim.ema_lengths, optim.ema_snapshot_every
    within = _are_numbers(lengths) and all(shortest <= length <= longest for length in lengths)
    different = within and len({f'{length:g}' for length in lengths}) == len(lengths)
    allowed = f'a tuple of different numbers from {shortest:g} to {longest:.3f} (sigma_rel)'
    _require(different, config, 'optim.ema_lengths', allowed)
    if lengths:
        divides = every > 0 and config.train.checkpoint_every % every == 0
        allowed = f'a divisor of config.train.checkpoint_every, {config.train.checkpoint_every}, with ema_lengths set'
    else:
        divides, allowed = every == 0, '0 unless config.optim.ema_lengths are set'
    _require(divides, config, 'optim.ema_snapshot_every', allowed)
    whole = not (lengths and config.distill.rounds)
    _require(whole, config, 'optim.ema_lengths', '() because each of config.distill.rounds is a training of its own')
    known = f'True, False or a number from {phema.SHORTEST:g} to {longest:.3f} (sigma_rel)'
    _require(_is_average(config.guidance.weak_ema), config, 'guidance.weak_ema', known)
    for field in ('ema', 'weak_ema'):
        chosen = config.eval[field]
        fits = all(map(_is_average, chosen)) and len(set(chosen)) == len(chosen)
        _require(
            fits and (chosen or field != 'ema'), config, f'eval.{field}', f'a tuple of different values, each {known}'
        )
    weak = not config.eval.weak_ema or config.guidance.weak == 'checkpoint'
    _require(weak, config, 'eval.weak_ema', "() unless config.guidance.weak is 'checkpoint'")


def _is_average(value):
    """Return True for True, False and lengths: whether snapshots can give one is known when they are read."""
    return isinstance(value, bool) or (_are_numbers([value]) and phema.SHORTEST <= value <= phema.LONGEST)


def names_curves(config):
    """Return True if config.eval chooses checkpoints, averages or intervals, each of which is a curve with a name."""
    evaluate = config.eval
    return bool(evaluate.steps or tuple(evaluate.ema) != (True,) or evaluate.weak_ema or evaluate.intervals)


def _check_curves(config):
    """Check the fields of config.eval that make curves."""
    evaluate = config.eval
    whole = all(isinstance(step, int) and step >= 0 for step in evaluate.steps)
    _require(whole, config, 'eval.steps', 'a tuple of training steps, whole numbers')
    _check_intervals(config, 'eval.intervals')
    for field in ('samplers', 'num_steps', 'samples', 'compare_with', 'bits_per_dim'):
        unset = default().eval[field]
        makers = 'config.eval.steps, config.eval.ema, config.eval.weak_ema or config.eval.intervals'
        allowed = f'{unset!r} because {makers} makes the curves'
        _require(not (names_curves(config) and evaluate[field]), config, f'eval.{field}', allowed)
    searched = not (evaluate.intervals and evaluate.search_intervals)
    _require(searched, config, 'eval.search_intervals', '() because config.eval.intervals makes the curves')


def _check_intervals(config, name):
    """Check a tuple of values for config.guidance.interval."""
    allowed = 'a tuple of pairs (λ_low, λ_high) of finite numbers, the lower first, or of () for no limits'
    for ends in _get(config, name):
        is_pair = isinstance(ends, (tuple, list)) and len(ends) in (0, 2)
        numbers = is_pair and all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends)
        _require(numbers and (not ends or ends[0] < ends[1]), config, name, allowed)


def _check_held_out(config):
    """Check that the held-out images are others than those of training."""
    data, held_out = config.data, config.eval.held_out
    trained_on = {'tfds': data.split, 'folder': data.data_dir}
    known = not held_out or data.source in trained_on
    _require(known, config, 'eval.held_out', "'' unless config.data.source is 'tfds' or 'folder'")
    unseen = not held_out or held_out != trained_on[data.source]
    _require(unseen, config, 'eval.held_out', 'other images than those of training (config.data)')


def _check_search(config):
    """Check the fields of config.eval that a search reads."""
    samples, neighbours, intervals = config.eval.search_samples, config.eval.nearest_k, config.eval.search_intervals
    enough = samples > neighbours or not config.eval.search
    _require(enough, config, 'eval.search_samples', f'above config.eval.nearest_k, {neighbours}')
    _check_intervals(config, 'eval.search_intervals')
    _require(
        config.eval.search or not intervals, config, 'eval.search_intervals', '() unless config.eval.search is set'
    )


def _check_guidance(config):
    """Check what guidance moves away from, by which rule and when."""
    settings, usual = config.guidance, default().guidance
    own = build_sampling.own_function(config, 'function') is not None
    build_sampling.own_functions(config)  # raises for a name that is not known
    if config.model.kind == 'unet':
        _check_weak(config)
    for field in ('weak_workdir', 'weak_step', 'weak_ema', 'weak_conditional') if settings.weak != 'checkpoint' else ():
        allowed = f"{usual[field]!r} unless config.guidance.weak is 'checkpoint'"
        _require(settings[field] == usual[field], config, f'guidance.{field}', allowed)
    step = settings.weak_step
    _require(step is None or step >= 0, config, 'guidance.weak_step', 'at least 0')
    reason = ''
    if own:
        reason = 'because config.guidance.function is your own'
        takes = build_sampling.takes_weak(build_sampling.own_function(config, 'function'))
        wanted = ('checkpoint', 'has an argument weak_model') if takes else ('', 'has no argument weak_model')
        _require(settings.weak == wanted[0], config, 'guidance.weak', f'{wanted[0]!r} {reason}, which {wanted[1]}')
    elif not build_sampling.weak_name(config):
        reason = 'because there is nothing to move away from (config.guidance.weak)'
    for field in ('rule', 'schedule', 'interval', 'momentum') if reason else ():
        _require(settings[field] == usual[field], config, f'guidance.{field}', f'{usual[field]!r} {reason}')
    low, high = build.logsnr_range(config)
    for name in ('guidance.interval', 'sample.churn_interval'):
        ends = _get(config, name)
        _require(_are_numbers(ends), config, name, '() or two numbers, (λ_low, λ_high)')
        within = not len(ends) or (len(ends) == 2 and low - _CLOSE <= ends[0] < ends[1] <= high + _CLOSE)
        allowed = f'() or (λ_low, λ_high) with λ_low below λ_high, both from {low:.4g} to {high:.4g}'
        _require(within, config, name, allowed)


def _check_learned_guidance(config):
    """Check a network that takes the guidance weight, and the weights that it is asked for."""
    takes, learned = config.model.guidance_input, config.guidance.function == 'learned'
    labelled = config.model.kind == 'unet' and config.model.labels != 'none' and not config.model.learn_variance
    fitting = "False unless config.model.kind is 'unet', with labels and without config.model.learn_variance"
    _require(labelled or not takes, config, 'model.guidance_input', fitting)
    _require(0 < config.model.guidance_max < math.inf, config, 'model.guidance_max', 'a finite number above 0')
    given = "'learned' only where the network takes the guidance weight (config.model.guidance_input)"
    _require(takes or not learned, config, 'guidance.function', given)
    alone = "'' because config.guidance.function is 'learned': the network guides by itself"
    _require(not (learned and config.guidance.weak), config, 'guidance.weak', alone)
    if learned:  # where nothing guides, weights are refused where they are used: these need not be
        build_sampling.check_weight(config, build_sampling.guidance_weight(config))
        for name in ('guidance_weights', 'bound_weights'):
            build_sampling.check_weight(config, config.eval[name], f'config.eval.{name}')


def _check_distillation(config):
    """Check the method of distillation, its rounds, and what it needs of the model."""
    distill, rounds, because = config.distill, tuple(config.distill.rounds), 'because config.distill.method is'
    for field in () if distill.method else ('teacher', 'rounds'):
        allowed = f'{default().distill[field]!r} unless config.distill.method is set'
        _require(distill[field] == default().distill[field], config, f'distill.{field}', allowed)
    if not distill.method:
        return
    _require(config.model.kind == 'unet', config, 'model.kind', f"'unet' {because} set")
    dropped = f'0 {because} set: the teacher knows the null label'
    _require(not config.loss.p_uncond, config, 'loss.p_uncond', dropped)
    _require(not config.model.learn_variance, config, 'model.learn_variance', f'False {because} set')
    asks_null = config.guidance.function == 'unconditional' or build_sampling.weak_name(config) == 'null'
    guides = "'learned' or 'conditional'" if config.model.guidance_input else "'conditional'"
    untrained = f'{guides} {because} set: a student does not learn the null label'
    _require(build_sampling.has_unconditional(config) or not asks_null, config, 'guidance.function', untrained)
    if distill.method == 'guided':
        _require(config.model.guidance_input, config, 'model.guidance_input', f"True {because} 'guided'")
        _require(config.model.labels == 'null', config, 'model.labels', f"'null' {because} 'guided'")
        _require(not rounds, config, 'distill.rounds', f"() {because} 'guided'")
        return
    of_pairs = 'a tuple of (steps of the student, training steps) for each round, whole numbers above 0'
    pairs = bool(rounds) and all(
        isinstance(each, tuple | list) and len(each) == 2 and all(type(n) is int and n > 0 for n in each)
        for each in rounds
    )
    _require(pairs, config, 'distill.rounds', of_pairs)
    halving = all(before == 2 * after for (before, _), (after, _) in pairwise(rounds))
    halved = 'rounds of students of half the steps each, such as ((16, 500), (8, 500))'
    _require(halving, config, 'distill.rounds', halved)
    total = sum(length for _, length in rounds)
    together = f'{total}, the training steps of config.distill.rounds together'
    _require(config.train.num_steps == total, config, 'train.num_steps', together)
    x_from_output = "one that gives x at any noise ('v', 'x' or 'edm')"
    _require(
        config.diffusion.prediction != 'eps', config, 'diffusion.prediction', f"{x_from_output} {because} 'progressive'"
    )
    continuous = config.diffusion.schedule == 'cosine'
    _require(continuous, config, 'diffusion.schedule', f"'cosine' {because} 'progressive'")
    _require(config.loss.times == 'uniform', config, 'loss.times', f"'uniform' {because} 'progressive'")
    for field, wanted in (('sampler', 'ddim'), ('grid', 'u_open'), ('eta', 0.0), ('clip_percentile', 0.0)):
        allowed = f'{wanted!r} {because} {distill.method!r}: the students know no other steps'
        _require(config.sample[field] == wanted, config, f'sample.{field}', allowed)
    few = f"False {because} 'progressive': the students know few λ, and a bound needs all"
    _require(not config.eval.bits_per_dim, config, 'eval.bits_per_dim', few)


def _check_weak(config):
    """Check that the network can give the weak prediction."""
    settings, labels = config.guidance, config.model.labels
    function, weak = settings.function, build_sampling.weak_name(config)
    unguided = "'conditional', 'unconditional' or 'module:function' because config.model.labels is not 'null'"
    null = labels == 'null' or bool(settings.weak) or function != 'classifier_free'
    _require(null, config, 'guidance.function', unguided)
    unlabelled = "'time', 'attention' or 'checkpoint'"
    reasons = (  # (if, names that cannot be, what can, why)
        (labels != 'null', ('null',), f"'random_label', {unlabelled}", "config.model.labels is not 'null'"),
        (labels == 'none', ('random_label',), unlabelled, "config.model.labels is 'none'"),
        (function == 'unconditional', ('null', 'random_label'), unlabelled, "the function is 'unconditional'"),
    )
    for applies, names, allowed, reason in reasons:
        _require(not (applies and weak in names), config, 'guidance.weak', f'{allowed} because {reason}')
    null = labels != 'classes' or function != 'unconditional'
    _require(null, config, 'guidance.function', "'conditional' or 'module:function' because there is no null label")
    sizes = build.attention_sizes(config)
    of_sizes = f'a tuple of image sizes that have attention: {", ".join(map(str, sizes))}'
    chosen = settings.attention_resolutions
    _require(_are_numbers(chosen) and set(chosen) <= set(sizes), config, 'guidance.attention_resolutions', of_sizes)


_CLOSE = 0.01  # λ are given to few digits


def _are_numbers(values):
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _check_grid(config):
    """Check the steps of the sampler."""
    sample, uniform, (low, high) = config.sample, config.sample.grid in ('u', 'u_open'), build.logsnr_range(config)
    spaced = sample.grid == 'u' or not sample.spacing
    _require(spaced, config, 'sample.spacing', "'' unless config.sample.grid is 'u'")
    _require(1 <= sample.rho <= 100, config, 'sample.rho', 'from 1 to 100')
    heun = sample.sampler == 'heun'
    _require(heun or not sample.churn, config, 'sample.churn', "0 unless config.sample.sampler is 'heun'")
    clips = sample.clip_x and not (config.guidance.classifier_workdir and config.guidance.clip_first)
    unused = '0 because nothing is clipped in the sampler (config.sample.clip_x, config.guidance.clip_first)'
    _require(clips or not sample.clip_percentile, config, 'sample.clip_percentile', unused)
    renoising = heun or sample.sampler == 'unipc_2'
    allowed = "a rule but 'cfgpp', or config.sample.sampler one of 'ancestral', 'ddim', 'dpmpp_2m', 'dpmpp_2m_sde'"
    _require(not renoising or config.guidance.rule != 'cfgpp', config, 'guidance.rule', allowed)
    for name in ('logsnr_min', 'logsnr_max'):
        value = sample[name]
        unused = "unset unless config.sample.grid is 'logsnr' or 'karras'"
        _require(value is None or not uniform, config, f'sample.{name}', unused)
        within = value is None or low - _CLOSE <= value <= high + _CLOSE
        _require(within, config, f'sample.{name}', f'from {low:.4g} to {high:.4g}, λ of config.diffusion')
    if not uniform:
        first, last = build_sampling.grid_ends(config)
        fields = 'config.sample.logsnr_min, config.sample.logsnr_max, config.diffusion.logsnr_max'
        if first >= last:
            raise UserError(f'the grid {sample.grid!r} would go from λ = {first:.4g} to {last:.4g} ({fields}).')
    tabulated = build.table(config)
    if tabulated is not None and uniform and not sample.spacing:
        most = len(tabulated) - (sample.grid == 'u_open')  # u = 1 and the u before it are one timestep
        of_table = f'at most {most} on the grid {sample.grid!r} (config.sample.grid) of {len(tabulated)} timesteps'
        _require(sample.num_steps <= most, config, 'sample.num_steps', of_table)
    if not uniform or tabulated is not None:
        logsnrs = build_sampling.sampling_logsnrs(config)  # raises for a spacing that cannot be
        close = f'less: two steps of the grid {sample.grid!r} have the same λ (config.sample.logsnr_min, logsnr_max)'
        _require(bool(np.all(np.diff(logsnrs) > 0.0)), config, 'sample.num_steps', close)
    ends = config.guidance.interval
    if len(ends):
        calls = build_sampling.call_logsnrs(config)
        inside = denoisers.within(calls, *ends)
        steps = f'an interval with a step in it: there are {len(calls)} from λ = {calls[0]:.4g} to {calls[-1]:.4g}'
        _require(bool(inside.any()), config, 'guidance.interval', steps)


def _check_network(config):
    """Check the sizes of the network's levels, their heads and their groups."""
    model, levels = config.model, len(config.model.channel_mult)
    _require(levels, config, 'model.channel_mult', 'a tuple of at least one number')
    reduction = 2 ** (levels - 1)
    multiple = (
        f'a multiple of {reduction}: config.model.channel_mult has {levels} levels, which halve it {levels - 1} times'
    )
    _require(config.data.image_size % reduction == 0, config, 'data.image_size', multiple)
    sizes = [config.data.image_size // 2**level for level in range(levels)]
    of_sizes = f'a tuple of image sizes from those of the levels: {", ".join(map(str, sizes))}'
    _require(set(model.attention_resolutions) <= set(sizes), config, 'model.attention_resolutions', of_sizes)
    _require(min(model.channel_mult) >= 1, config, 'model.channel_mult', 'a tuple of whole numbers above 0')
    field = 'num_heads' if model.head_channels is None else 'head_channels'
    for level, mult in enumerate(model.channel_mult):
        width = model.channels * mult
        if sizes[level] in model.attention_resolutions or level == levels - 1:  # the middle always attends
            divides = model[field] >= 1 and width % model[field] == 0
            _require(divides, config, f'model.{field}', f'a divisor of the width {width}')
        groups = f'a divisor of every width, such as {width}'
        _require(width % model.num_groups == 0, config, 'model.num_groups', groups)
