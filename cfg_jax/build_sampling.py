"""Building what a config draws with: the grid of λ, guidance, the sampler, and what an image costs.

Guidance is eps~ = rule(strong, weak, w(λ)). config.guidance chooses each part: a name of this file, or a
'module:function' of the user's own.
"""

import functools
import hashlib
import importlib
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import build, denoisers, diffusion, guidance, losses, samplers, schedules
from cfg_jax.config import changed, default
from cfg_jax.errors import UserError

# config.sample.sampler: its function, and the fields of config.sample that it takes besides clip_x
SAMPLERS = {
    'ancestral': (samplers.ancestral, ('v',)),
    'ddim': (samplers.ddim, ('eta',)),
    'dpmpp_2m': (samplers.dpmpp_2m, ('lower_order_final',)),
    'dpmpp_2m_sde': (samplers.dpmpp_2m_sde, ('lower_order_final',)),
    'unipc_2': (samplers.unipc_2, ('lower_order_final',)),
    'heun': (samplers.heun, ('churn', 'churn_interval', 'churn_noise')),
}
GRIDS = ('u', 'u_open', 'logsnr', 'karras')
FUNCTIONS = ('classifier_free', 'conditional', 'unconditional', 'learned')
WEAK = ('', 'null', 'checkpoint', 'random_label', 'time', 'attention')
# config.guidance.rule: the rule's parameters, each from a field of config.guidance
RULE_FIELDS = {
    'linear': {},
    'rescale': {'factor': 'rescale_factor'},
    'apg': {'norm_threshold': 'apg_norm_threshold', 'eta': 'apg_eta'},
    'zero_star': {},
    'tangential': {},
    'dynamic_threshold': {'percentile': 'dynamic_percentile'},
    'cfgpp': {},
}
# fields of config.guidance that may name a function of the user's own: (positional arguments, keywords, description)
OWN_FIELDS = {
    'function': (3, ('null_label',), '(model, labels, weight, *, null_label) -> denoiser'),
    'rule': (3, (), '(strong eps, weak eps, weight) -> guided eps'),
    'schedule': (1, (), '(λ [B]) -> factor of the weight [B]'),
}
_GIVEN = 'python:'  # how a field begins for a function that a program has handed over
_given = {}  # such functions, by the name


# ---------------------------------------------------------------- weights and the grid


def guidance_weight(config):
    """Return the paper's w, from config.sample.guidance_weight or guidance_scale = 1 + w; at most one may be set."""
    weight, scale = config.sample.guidance_weight, config.sample.guidance_scale
    if weight is not None and scale is not None:
        raise UserError(
            f'both config.sample.guidance_weight ({weight:g}) and config.sample.guidance_scale ({scale:g}) are set; '
            'set one of them: scale = 1 + weight.'
        )
    if scale is not None:
        return scale - 1.0
    return 0.0 if weight is None else weight


def guides(config):
    """Return True if the guidance weight changes what is predicted; a classifier has a weight of its own."""
    return config.guidance.function not in ('conditional', 'unconditional') or bool(weak_name(config))


def check_weight(config, weight, field='config.sample.guidance_weight'):
    """Raise UserError for a guidance weight, one or an array, that cannot be used.

    It is one other than 0 where nothing guides by it, or one that a network that takes it has not been trained for.
    """
    largest, weights = config.model.guidance_max, np.atleast_1d(weight)
    if not guides(config) and weights.any():
        raise UserError(
            f'{field} has {weights[weights != 0.0][0]:g}, but nothing guides by it: config.guidance.function is '
            f"{config.guidance.function!r} and config.guidance.weak is ''. Give the weight 0, or choose another."
        )
    bad = weights[~((weights >= 0.0) & (weights <= largest))]
    if config.guidance.function == 'learned' and len(bad):
        raise UserError(
            f'{field} has {bad[0]:g}, but the network was trained for weights from 0 to {largest:g} '
            '(config.model.guidance_max).'
        )


def sampling_logsnrs(config):
    """Return the grid of λ that a sampler walks, float32 [T], increasing."""
    sample, tabulated = config.sample, build.table(config)
    if sample.grid == 'u':
        if tabulated is not None:
            return schedules.spaced_grid(tabulated, sample.spacing or str(sample.num_steps))
        return schedules.logsnr_grid(build.schedule(config), sample.num_steps)
    if sample.grid == 'u_open':
        return schedules.open_logsnr_grid(build.schedule(config), sample.num_steps)
    low, high = grid_ends(config)
    if sample.grid == 'logsnr':
        return schedules.uniform_logsnr_grid(sample.num_steps, logsnr_min=low, logsnr_max=high)
    ends = {'sigma_min': math.exp(-0.5 * high), 'sigma_max': math.exp(-0.5 * low)}
    return schedules.karras_grid(sample.num_steps, **ends, rho=sample.rho)


def grid_ends(config):
    """Return (λ_min, λ_max) of config.sample.grid 'logsnr' or 'karras'.

    By default they are the schedule's; for 'karras', EDM's sigma of 80 and 0.002 where the schedule reaches so far.
    """
    low, high = build.logsnr_range(config)
    if config.sample.grid == 'karras':
        low, high = max(low, -8.764), min(high, 12.429)  # -2 log of 80 and of 0.002
    ends = config.sample.logsnr_min, config.sample.logsnr_max
    return tuple(end if given is None else given for given, end in zip(ends, (low, high)))


def call_logsnrs(config):
    """Return λ of each call of the denoiser, [calls]: the grid's, or those of `samplers.heun_calls`."""
    logsnrs = sampling_logsnrs(config)
    if config.sample.sampler != 'heun':
        return logsnrs
    options = sampler_options(config)
    del options['churn_noise']
    return samplers.heun_calls(logsnrs, **options)


def sampler_options(config):
    """Return the options of the sampler that config.sample names, apart from clip_x."""
    options = {key: config.sample[key] for key in SAMPLERS[config.sample.sampler][1]}
    if options.get('churn_interval') == ():
        del options['churn_interval']  # all steps
    return options


# ---------------------------------------------------------------- functions of the user's own


def given_function(function, field='function'):
    """Return the value of config.guidance.<field> that means this Python function, in this process.

    field: 'function', 'rule' or 'schedule'. Raises UserError if it cannot be called as `OWN_FIELDS` describes.
    """
    try:
        _bind(function, field)
    except (ValueError, TypeError) as error:
        kind = 'guidance' if field == 'function' else field
        raise UserError(f'{kind} is {function!r}; it must be {OWN_FIELDS[field][2]} ({error}).') from None
    prefix = _GIVEN if field == 'function' else f'{_GIVEN}{field}:'
    name = f'{prefix}{getattr(function, "__name__", "own")}'
    _given[name] = function
    return name


def _bind(function, field):
    """Raise TypeError or ValueError unless the function takes the arguments of its field."""
    positional, keywords, _ = OWN_FIELDS[field]
    signature = inspect.signature(function)
    optional = ('weak_model',) if field == 'function' and 'weak_model' in signature.parameters else ()
    signature.bind(*(None,) * positional, **dict.fromkeys((*keywords, *optional)))


def own_function(config, field):
    """Return the user's own function that config.guidance.<field> names; None if it names one of cfg_jax.

    Raises UserError for a name that is neither.
    """
    name = config.guidance[field]
    if name in _given:
        return _given[name]
    known = {'function': FUNCTIONS, 'rule': guidance.RULES, 'schedule': guidance.SCHEDULES}[field]
    if name in known:
        return None
    allowed = f"allowed: {', '.join(map(repr, known))} or 'module:function' of your own"
    if ':' not in name:
        raise UserError(f'config.guidance.{field} is {name!r}; {allowed}.')
    module_name, _, function_name = name.rpartition(':')
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        _bind(function, field)
        return function
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f'config.guidance.{field} is {name!r}; {allowed} ({error}).') from None


def own_functions(config):
    """Return {field: function} of the user's own functions in config.guidance."""
    found = {field: own_function(config, field) for field in OWN_FIELDS}
    return {field: function for field, function in found.items() if function is not None}


def guidance_digest(config):
    """Return text that changes with the user's own functions; '' if there is none.

    It holds the hash of each function's module file (modules that it imports are not looked at). For a function that a
    program has given it is the hash of what the whole guidance computes, with all constants that it holds.
    """
    own = own_functions(config)
    if not own:
        return ''
    names = [config.guidance[field] for field in own]
    if not any(name in _given for name in names):
        digest = hashlib.sha256()
        for name in names:
            digest.update(Path(importlib.import_module(name.rpartition(':')[0]).__file__).read_bytes())
        return digest.hexdigest()

    def stand_in(z, logsnr, labels, **_):
        eps = jnp.cos(z + diffusion.broadcast_to_images(logsnr + 2.0 * labels, z))
        return diffusion.Prediction(eps, z if config.model.learn_variance else None)

    def guided(z, logsnr, labels, weight):
        keys = samplers.image_keys(0, jnp.arange(len(z)))
        denoise = denoisers.stateful(guide(config, stand_in, labels, weight, keys=keys, weak_model=stand_in))
        _, state = denoise.step(z, logsnr, denoise.start(z))
        return denoise.step(z, logsnr, state)

    shapes = [((2, *build.image_shape(config)), jnp.float32), ((2,), jnp.float32), ((2,), jnp.int32), ((), jnp.float32)]
    lowered = jax.jit(guided).lower(*(jax.ShapeDtypeStruct(*each) for each in shapes))
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


# ---------------------------------------------------------------- guidance


def takes_weak(function):
    """Return True if a guidance function of the user's own has an argument weak_model."""
    return 'weak_model' in inspect.signature(function).parameters


def used_fields(config):
    """Return the fields of config.guidance that this guidance reads, but not where other networks lie: a dict."""
    settings, weak = config.guidance.to_dict(), weak_name(config)
    names = ['function']
    if weak:
        names += ['rule', 'momentum', 'interval', 'schedule', *RULE_FIELDS.get(settings['rule'], {}).values()]
        names += ['schedule_power'] if settings['schedule'] == 'power' else []
        names += {
            'checkpoint': ['weak_conditional'],
            'time': ['time_scale'],
            'attention': ['attention_resolutions'],
        }.get(weak, [])
    if settings['classifier_workdir']:
        names += ['clip_first', 'classifier_form']
    return {'weak': weak} | {name: settings[name] for name in names}


def weak_name(config):
    """Return what guidance moves away from, a name of `WEAK`; '' if there is no such guidance."""
    function = config.guidance.function
    return config.guidance.weak or ('null' if function == 'classifier_free' else '')


def has_unconditional(config):
    """Return True if the network can be asked without a label: it has no labels, or has learned the null label."""
    if config.model.labels == 'null':
        return not config.distill.method and config.loss.p_uncond > 0.0  # a student learns from its teacher's labels
    return config.model.labels == 'none'


def at_weight(config, weight):
    """Return the config to draw with at this guidance weight: at w = 0 one without guidance, except a classifier's.

    Nothing is then computed for it. A guidance function of the user's own is left as it is.
    """
    function = config.guidance.function
    if weight != 0.0 or function not in FUNCTIONS or not weak_name(config):
        return config
    kept = ('classifier_workdir', 'classifier_weight', 'clip_first', 'classifier_form')
    fields = {f'guidance.{key}': value for key, value in default().guidance.items() if key not in kept}
    fields['guidance.function'] = 'unconditional' if function == 'unconditional' else 'conditional'
    return changed(config, fields)


def weight_function(config, weight):
    """Return the weight as guidance takes it: w itself, or the function λ -> w m(λ) of config.guidance.schedule."""
    own, name = own_function(config, 'schedule'), config.guidance.schedule
    if name == 'constant':
        return weight
    if own:
        return guidance.scheduled(weight, own)
    options = {'power': config.guidance.schedule_power} if name == 'power' else {}
    tabulated = build.table(config)

    def multiplier(logsnr):
        if tabulated is None:
            ends = {key: config.diffusion[key] for key in ('logsnr_min', 'logsnr_max')}
            u = schedules.cosine_u(logsnr, **ends)
        else:
            u = schedules.table_time_input(tabulated)(logsnr) / (len(tabulated) - 1)
        return guidance.SCHEDULES[name](jnp.clip(u, 0.0, 1.0), **options)  # churn goes beyond the schedule's ends

    return guidance.scheduled(weight, multiplier)


def rule(config):
    """Return the rule of config.guidance.rule, with its parameters."""
    name = config.guidance.rule
    if own := own_function(config, 'rule'):
        return own
    options = {key: config.guidance[field] for key, field in RULE_FIELDS[name].items()}
    return functools.partial(guidance.RULES[name], **options) if options else guidance.RULES[name]


def guide(config, model, labels, weight, *, keys=None, weak_model=None):
    """Return the guided denoiser of config.guidance, apart from a classifier's part.

    model(z, λ, labels) -> Prediction. keys: one per image, for a weak prediction that is drawn at random. weak_model:
    another model, for config.guidance.weak='checkpoint'; a function of the user's own gets it as weak_model.
    """
    null, name, settings = build.null_label(config), config.guidance.function, config.guidance
    if own := own_function(config, 'function'):
        return own(model, labels, weight, null_label=null, **({'weak_model': weak_model} if takes_weak(own) else {}))
    if name == 'learned':
        return guidance.learned(model, labels, weight, null_label=null)
    unconditional = name == 'unconditional'
    alone = (guidance.unconditional if unconditional else guidance.conditional)(model, labels, 0.0, null_label=null)
    weak, own_labels = weak_name(config), jnp.full_like(labels, null) if unconditional else labels
    if not weak:
        return alone
    weight, options = weight_function(config, weight), {'rule': rule(config), 'momentum': settings.momentum}
    if weak == 'checkpoint':
        weak_labels = own_labels if settings.weak_conditional else jnp.full_like(labels, null)
        other = guidance.conditional(weak_model, weak_labels, 0.0, null_label=null)
        guided = guidance.extrapolate(alone, other, weight, **options)
    else:
        pair = {
            'null': lambda: guidance.with_null(model, own_labels, null_label=null),
            'random_label': lambda: guidance.with_random_label(model, own_labels, keys, num_classes=null),
            'time': lambda: guidance.with_perturbed_time(model, own_labels, keys, scale=settings.time_scale),
            'attention': lambda: guidance.with_identity_attention(model, own_labels),
        }[weak]()
        guided = guidance.extrapolate_pair(pair, weight, **options)
    return guidance.interval(guided, alone, *settings.interval) if settings.interval else guided


def denoiser(config, params, labels, weight, of_label=None, classifier_weight=0.0, *, keys=None, weak_model=None):
    """Return the guided denoiser (z, λ) -> Prediction of labels [B] at a guidance weight.

    of_label: the `build.log_prob` of a classifier that guides too (ADM, Algorithm 2), or None; it is not computed where
    classifier_weight is the number 0. keys and weak_model: see `guide`; keys are those of images 0 to B - 1 by default.
    """
    if keys is None:
        keys = samplers.image_keys(config.sample.seed, jnp.arange(len(labels)))
    denoise = guide(config, build.model(config, params), labels, weight, keys=keys, weak_model=weak_model)
    if of_label is None:
        return denoise
    if config.sample.clip_x and config.guidance.clip_first:
        denoise = denoisers.mapped(denoise, diffusion.clip_prediction)
    if isinstance(classifier_weight, int | float) and classifier_weight == 0.0:
        return denoise
    return guidance.classifier(denoise, of_label, labels, classifier_weight)


def clipping(config):
    """Return a sampler's clip_x: True, False, or dynamic thresholding."""
    percentile = config.sample.clip_percentile
    if config.sample.clip_x and percentile:
        return functools.partial(diffusion.dynamic_threshold, percentile=percentile)
    return config.sample.clip_x


def sampler(config, classifier_config=None, weak_config=None):
    """Return the function (params, seed, image indices [B], labels [B], weight) -> x [B, H, W, C] in [-1, 1].

    All arguments are traced. It takes three more: the parameters and the weight of a classifier, if classifier_config
    is given, and the parameters of a weak model, if weak_config is.
    """
    shape, logsnrs = build.image_shape(config), sampling_logsnrs(config)
    walk, _ = SAMPLERS[config.sample.sampler]
    by_mean = config.guidance.classifier_form == 'mean'

    def sample(params, seed, indices, labels, weight, classifier_params=None, classifier_weight=0.0, weak_params=None):
        keys = samplers.image_keys(seed, indices)
        z = samplers.step_noise(keys, 0, shape)
        settings = {'clip_x': clipping(config), **sampler_options(config)}
        of_label = classifier_config and build.log_prob(classifier_config, classifier_params)
        if of_label and by_mean:
            settings['mean_shift'] = guidance.classifier_mean_shift(of_label, labels, classifier_weight)
            of_label = None
        elif of_label and config.guidance.clip_first:
            settings['clip_x'] = False  # `denoiser` has clipped
        others = {'keys': keys, 'weak_model': weak_config and build.model(weak_config, weak_params)}
        denoise = denoiser(config, params, labels, weight, of_label, classifier_weight, **others)
        return walk(denoise, z, logsnrs, keys, **settings)

    return sample


def count_evaluations(config, weight=1.0, classifier_weight=1.0):
    """Return the cost of one image at these weights: {'network_evaluations', 'classifier_gradients'}.

    A weak model's evaluations count as the model's own.
    """
    config = at_weight(config, weight)
    calls, keys, labels = call_logsnrs(config), samplers.image_keys(0, jnp.arange(1)), jnp.zeros(1, jnp.int32)

    def guided(model):
        return guide(config, model, labels, jnp.float32(weight), keys=keys, weak_model=model)

    evaluations = denoisers.count_evaluations(guided, calls, build.image_shape(config))
    gradients = len(calls) if config.guidance.classifier_workdir and classifier_weight != 0.0 else 0
    return {'network_evaluations': evaluations, 'classifier_gradients': gradients}


# ---------------------------------------------------------------- the bound on the likelihood


def bound_range(config):
    """Return (number of λ, λ of the noisiest, λ of the cleanest) at which `bits_per_dim` evaluates the network."""
    if build.table(config) is not None:
        logsnrs = sampling_logsnrs(config)
        if len(logsnrs) < 2:
            raise UserError(
                'bits per dimension need at least 2 timesteps (config.sample.num_steps, config.sample.spacing).'
            )
        return len(logsnrs), float(logsnrs[0]), float(logsnrs[-1])
    highest = min(config.eval.bound_logsnr_max, config.diffusion.logsnr_max)  # the network knows no λ above the latter
    return config.eval.bound_evaluations, config.diffusion.logsnr_min, highest


def bits_per_dim(config, weight=0.0):
    """Return the jitted function (params, uint8 images, labels, image indices, seed) -> the bound's parts, each [B].

    The bound holds for any denoiser, so also for the guided one of a guidance weight, apart from a classifier's part.
    Raises UserError for guidance that has a memory or needs another checkpoint, and as `check_weight` does.

    They are 'total', 'prior', 'diffusion' and 'reconstruction', in bits per dimension: `losses.continuous_bound`'s, or,
    for a model on one of ADM's tables, `losses.bits_per_dim_terms`' over the sampler's timesteps.
    """
    clip_x, guided = config.sample.clip_x, at_weight(config, weight)
    number, lowest, highest = bound_range(config)
    check_weight(config, weight, 'config.eval.bound_weights')
    if guided.guidance.momentum or weak_name(guided) == 'checkpoint':
        raise UserError(
            'bits per dimension of guidance with a momentum or a weak checkpoint are not defined here; use '
            "config.guidance.momentum=0 and another config.guidance.weak, or config.eval.bound_weights='(0.,)'."
        )

    def discrete(denoise, x, keys):
        logsnrs = sampling_logsnrs(config)[::-1]
        found = losses.bits_per_dim_terms(denoise, x, keys, logsnrs=logsnrs, v=config.sample.v, clip_x=clip_x)
        rest, last = found['terms'][:, 1:].sum(axis=1), found['terms'][:, 0]
        return {'total': found['total'], 'prior': found['prior'], 'diffusion': rest, 'reconstruction': last}

    def continuous(denoise, x, keys):
        ends = {'logsnr_min': lowest, 'logsnr_max': highest, 'num_evaluations': number}
        return losses.continuous_bound(denoise, x, keys, **ends, clip_x=clip_x)

    @jax.jit
    def bound(params, images, labels, indices, seed):
        keys = samplers.image_keys(seed, indices)
        denoise = guide(guided, build.model(config, params), labels, weight, keys=keys)
        of_images = continuous if build.table(config) is None else discrete
        return of_images(denoise, diffusion.to_unit_range(images), keys)

    return bound
