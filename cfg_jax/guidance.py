"""Guidance: functions from denoisers to denoisers, so that they compose.

A model is `model(z, logsnr, labels) -> Prediction`; a denoiser is `denoise(z, logsnr) -> Prediction`. Guidance moves a
strong denoiser away from a weak one, eps~ = rule(strong, weak, w(λ)), and leaves three choices:

- what to move away from: the functions under "weak", each of which returns a `Pair`;
- how to use the difference: `RULES`;
- when: `interval`, and `scheduled` weights.

`classifier` goes on top of any of them. A weight is the paper's w, a scalar or one per image, always traced: a sweep
over weights compiles once. It may also be a function λ [B] -> w, [B]. w = 0 is the strong denoiser under every rule.
Equations are the CFG paper's where no other is named.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cfg_jax import denoisers, diffusion
from cfg_jax.denoisers import Stateful, Switched
from cfg_jax.diffusion import Denoiser, MeanShift, Model, Prediction
from cfg_jax.typing import Array, Float, Int, Key, PerImage, Scalar

# log_prob(z, λ, labels) -> log p(label | z, λ) of each image
LogProb = Callable[[Float[Array, ' B *D'], Float[Array, ' B'], Int[Array, ' B']], Float[Array, ' B']]
# (z, λ) -> (strong prediction, weak prediction)
Pair = Callable[[Float[Array, ' B *D'], Float[Array, ' B']], tuple[Prediction, Prediction]]
Weight = PerImage | Callable[[Float[Array, ' B']], Float[Array, ' B']]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: called as function(strong, weak, weight, **parameters), with arrays [B, ...] and a weight, scalar or [B].

    on_x: the arrays are predictions of x, not of eps. renoises_with_weak: samplers add the weak eps back to x.
    """

    function: Callable[..., Array]
    on_x: bool = False
    renoises_with_weak: bool = False

    def __call__(
        self, strong: Float[Array, ' B *D'], weak: Float[Array, ' B *D'], weight: PerImage, **parameters: Scalar
    ) -> Float[Array, ' B *D']:
        return self.function(strong, weak, weight, **parameters)


# ---------------------------------------------------------------- rules. eq. 6: (1 + w) strong - w weak


def _linear(strong, weak, weight):
    w = diffusion.broadcast_to_images(weight, strong)
    return (1.0 + w) * strong - w * weak


# ---------------------------------------------------------------- the strong one's deviation (Lin et al. 2024)


def _rescale(strong, weak, weight, *, factor=0.7):
    """Return the linear rule's result, `factor` of it rescaled to the standard deviation of `strong`, per image."""
    guided, axes = _linear(strong, weak, weight), tuple(range(1, strong.ndim))
    deviation, wanted = jnp.std(guided, axes, keepdims=True), jnp.std(strong, axes, keepdims=True)
    return guided * (1.0 + factor * (_ratio(wanted, deviation, 1.0) - 1.0))


# ---------------------------------------------------------------- APG, Algorithm 1 (Sadat et al. 2025)


def project_difference(
    strong: Float[Array, ' B *D'], difference: Float[Array, ' B *D'], *, norm_threshold: Scalar = 0.0, eta: Scalar = 0.0
) -> Float[Array, ' B *D']:
    """Return the difference with its L2 norm limited, then its part along `strong` multiplied by eta, per image.

    norm_threshold: largest norm, in units of x; 0 sets no limit.
    """
    norm = jnp.sqrt(_dot(difference, difference))
    kept = jnp.where((norm_threshold > 0.0) & (norm > norm_threshold), _ratio(norm_threshold, norm, 1.0), 1.0)
    difference = kept * difference
    parallel = _ratio(_dot(difference, strong), _dot(strong, strong), 0.0) * strong
    return difference + (eta - 1.0) * parallel


def _apg(strong, weak, weight, *, norm_threshold=0.0, eta=0.0):
    w = diffusion.broadcast_to_images(weight, strong)
    return strong + w * project_difference(strong, strong - weak, norm_threshold=norm_threshold, eta=eta)


# ---------------------------------------------------------------- CFG-Zero*: a scale for the weak one (Fan et al. 2025)


def _zero_star(strong, weak, weight):
    """Return the linear rule's result for the weak prediction scaled to fit the strong one best, per image."""
    return _linear(strong, _ratio(_dot(strong, weak), _dot(weak, weak), 1.0) * weak, weight)


# ---------------------------------------------------------------- TCFG: no smaller singular vector (Kwon et al. 2025)


def _tangential(strong, weak, weight):
    """Return the linear rule's result for the weak prediction without its part along the smaller singular vector.

    The two singular vectors are those of the two rows [strong; weak], per image. The larger one has the direction
    cos(a) strong + sin(a) weak, where tan(2a) = 2 <strong, weak> / (|strong|² - |weak|²).
    """
    difference, twice = _dot(strong, strong) - _dot(weak, weak), 2.0 * _dot(strong, weak)
    length = jnp.hypot(difference, twice)
    sine2, cosine2 = _ratio(twice, length, 0.0), _ratio(difference, length, 0.0)
    return _linear(strong, 0.5 * ((1.0 - cosine2) * weak + sine2 * strong), weight)


# ---------------------------------------------------------------- Imagen, section 2.3 (Saharia et al. 2022)


def _dynamic_threshold(strong, weak, weight, *, percentile=99.5):
    """Return the linear rule's result after `diffusion.dynamic_threshold`; w = 0 leaves `strong` as it is."""
    w = diffusion.broadcast_to_images(weight, strong)
    limited = diffusion.dynamic_threshold(_linear(strong, weak, weight), percentile=percentile)
    return jnp.where(w == 0.0, strong, limited)


# rule(strong, weak, weight, **parameters). CFG++ (Chung et al. 2025, Algorithm 2) is the linear rule, whose guided x
# samplers renoise with the weak eps; its own λ, in [0, 1], is 1 + w.
RULES = {
    'linear': Rule(_linear),
    'rescale': Rule(_rescale),
    'apg': Rule(_apg, on_x=True),
    'zero_star': Rule(_zero_star),
    'tangential': Rule(_tangential),
    'dynamic_threshold': Rule(_dynamic_threshold, on_x=True),
    'cfgpp': Rule(_linear, renoises_with_weak=True),
}


def _dot(a, b):
    """Return the inner product of each image's numbers, [B, 1, ...]."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdims=True)


def _ratio(a, b, otherwise):
    """Return a / b, and `otherwise` where b is 0."""
    return jnp.where(b == 0.0, otherwise, a / jnp.where(b == 0.0, 1.0, b))


# ---------------------------------------------------------------- eps~ = rule(strong, weak, w(λ))


def extrapolate(
    strong: Denoiser, weak: Denoiser, weight: Weight, *, rule: Callable = RULES['linear'], momentum: Scalar = 0.0
) -> Denoiser:
    """Return the denoiser that moves away from `weak`: eps~ = rule(strong, weak, w(λ)).

    With two models it is autoguidance (Karras et al. 2024a). rule: one of `RULES`, a `functools.partial` of one with
    its parameters, or a function of one's own, rule(strong eps, weak eps, weight) -> guided eps. momentum: see
    `extrapolate_pair`. A learned variance is the strong one's. Both denoisers may have a state.
    """
    if not any(isinstance(each, Stateful | Switched) for each in (strong, weak)):
        return extrapolate_pair(
            lambda z, logsnr: (strong(z, logsnr), weak(z, logsnr)), weight, rule=rule, momentum=momentum
        )
    one, other = denoisers.stateful(strong), denoisers.stateful(weak)

    def step(z, logsnr, states):
        (a, state_a), (b, state_b) = one.step(z, logsnr, states[0]), other.step(z, logsnr, states[1])
        return (a, b), (state_a, state_b)

    pair = Stateful(lambda z: (one.start(z), other.start(z)), step)
    return extrapolate_pair(pair, weight, rule=rule, momentum=momentum)


def extrapolate_pair(
    pair: Pair, weight: Weight, *, rule: Callable = RULES['linear'], momentum: Scalar = 0.0
) -> Denoiser:
    """Return the guided denoiser of a pair, whose predictions may come from one forward pass; see `extrapolate`.

    momentum: the rule gets the running sum d_i = (strong - weak) + momentum d_{i-1} over a sampler's calls in place of
    the difference (APG, where it is negative); calls at which w is 0 do not count. With 0 there is no state.
    """
    remembers = not (isinstance(momentum, int | float) and momentum == 0.0)
    if not remembers and not isinstance(pair, Stateful):

        def denoise(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Prediction:
            return _guided(rule, *pair(z, logsnr), z, logsnr, weight)[0]

        return denoise
    both = denoisers.stateful(pair)

    def start(z):
        return both.start(z), jnp.zeros_like(z) if remembers else None

    def step(z, logsnr, states):
        predictions, state = both.step(z, logsnr, states[0])
        prediction, running = _guided(rule, *predictions, z, logsnr, weight, momentum, states[1])
        return prediction, (state, running)

    return Stateful(start, step)


def _guided(rule, strong, weak, z, logsnr, weight, momentum=0.0, running=None):
    """Return (the guided prediction, the running difference, None without momentum)."""
    strong, weak = (diffusion.check_prediction(each, z) for each in (strong, weak))
    named = getattr(rule, 'func', rule)  # of a functools.partial
    on_x = getattr(named, 'on_x', False)
    weight = weight(logsnr) if callable(weight) else weight
    w = diffusion.broadcast_to_images(weight, z)
    a, b = (diffusion.predict_x(z, each.eps, logsnr) if on_x else each.eps for each in (strong, weak))
    if running is not None:
        running = jnp.where(w == 0.0, running, a - b + momentum * running)
        b = a - running
    guided = rule(a, b, weight)
    if on_x:  # as a change of eps, so that w = 0 changes no digit
        alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr, z))
        guided = strong.eps - alpha / sigma * (guided - a)
    renoise_eps = strong.renoise_eps
    if getattr(named, 'renoises_with_weak', False):
        renoise_eps = jnp.where(w == 0.0, strong.eps, weak.eps)
    return strong._replace(eps=guided, renoise_eps=renoise_eps), running


# ---------------------------------------------------------------- weak: the null label (Algorithm 2)


def with_null(model: Model, labels: Int[Array, ' B'], *, null_label: int) -> Pair:
    """Return the pair of the conditional and the unconditional prediction, the latter of the null label."""
    return _with_other_labels(model, labels, lambda logsnr: jnp.full_like(labels, null_label))


def _with_other_labels(model, labels, others):
    def pair(z, logsnr):
        both_labels = jnp.concatenate([labels, others(logsnr)])
        return _halves(model(_twice(z), _twice(logsnr), both_labels), z)

    return pair


def _twice(values):
    return jnp.concatenate([values, values])


def _halves(both, z):
    """Return the two halves of a prediction for z twice."""
    both = diffusion.check_prediction(both, _twice(z))
    first, second = (slice(None, len(z)), slice(len(z), None))
    return jax.tree.map(lambda a: a[first], both), jax.tree.map(lambda a: a[second], both)


# ---------------------------------------------------------------- weak: a random label (ICG, Sadat et al. 2025b)


def with_random_label(model: Model, labels: Int[Array, ' B'], keys: Key[Array, ' B'], *, num_classes: int) -> Pair:
    """Return the pair of the conditional prediction and that of a random label; it needs no null label.

    keys: one per image. Each λ has a draw of its own, uniform over all classes, which depends on the image's key and λ.
    """

    def others(logsnr):
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes, labels.dtype))(_at(keys, logsnr))

    return _with_other_labels(model, labels, others)


def _at(keys, logsnr):
    """Return a key for each image and its λ."""
    bits = jax.lax.bitcast_convert_type(jnp.float32(logsnr), jnp.uint32)
    return jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, _WEAK_DRAWS), at))(keys, bits)


_WEAK_DRAWS = 2**32 - 1  # no step of a sampler has this number, so its noise is another


# ---------------------------------------------------------------- weak: a wrong time (TSG, Sadat et al. 2025b)


def with_perturbed_time(model: Model, labels: Int[Array, ' B'], keys: Key[Array, ' B'], *, scale: Scalar) -> Pair:
    """Return the pair of the prediction and that of a network that is told λ + scale n, n ~ N(0, 1), in place of λ.

    keys: one per image, as in `with_random_label`. The model takes a keyword, network_logsnr [B]: what its network is
    told. The paper adds its noise to the time embedding; noise in λ needs nothing of the network's inside.
    """

    def pair(z, logsnr):
        noise = jax.vmap(lambda key: jax.random.normal(key, ()))(_at(keys, logsnr))
        told = jnp.concatenate([logsnr, logsnr + scale * noise])
        return _halves(model(_twice(z), _twice(logsnr), _twice(labels), network_logsnr=told), z)

    return pair


# ---------------------------------------------------------------- weak: attention to itself (PAG, Ahn et al. 2024)


def with_identity_attention(model: Model, labels: Int[Array, ' B']) -> Pair:
    """Return the pair of the prediction and that of a network in which each pixel attends to itself alone.

    The model takes a keyword, identity_attention [B], bool: for which images.
    """

    def pair(z, logsnr):
        flags = jnp.arange(2 * len(z)) >= len(z)
        return _halves(model(_twice(z), _twice(logsnr), _twice(labels), identity_attention=flags), z)

    return pair


# ---------------------------------------------------------------- when: an interval of λ (Kynkäänniemi et al. 2024)


def interval(guided: Denoiser, unguided: Denoiser, low: float, high: float) -> Denoiser:
    """Return `guided` for λ in [low, high] and `unguided` elsewhere, where samplers do not compute `guided`."""
    return Switched(guided, unguided, low, high)


# ---------------------------------------------------------------- when: w(λ) = w m(u(λ)), the mean of m over u is 1

# {name: m(u, **parameters)}; u = 0 is data, so that all but 'constant' grow from noise to data (Wang et al. 2024)
SCHEDULES = {
    'constant': jnp.ones_like,
    'linear': lambda u: 2.0 * (1.0 - u),
    'cosine': lambda u: 1.0 + jnp.cos(math.pi * u),
    'power': lambda u, power=2.0: (power + 1.0) * (1.0 - u) ** power,
}


def scheduled(weight: PerImage, multiplier: Callable[[Float[Array, ' B']], Float[Array, ' B']]) -> Weight:
    """Return the function λ [B] -> w multiplier(λ), for the weight of any guidance."""
    return lambda logsnr: weight * multiplier(logsnr)


# ---------------------------------------------------------------- eq. 6: eps~ = (1 + w) eps(z, λ, c) - w eps(z, λ)


def classifier_free(model: Model, labels: Int[Array, ' B'], weight: Weight, *, null_label: int) -> Denoiser:
    """Return the guided denoiser of eq. 6: eps~ = (1 + w) eps(z, λ, c) - w eps(z, λ, null).

    w = 0 is the conditional model. One forward of 2B: labels first, then the null label. A learned variance is that of
    the conditional half.
    """
    return extrapolate_pair(with_null(model, labels, null_label=null_label), weight)


def conditional(model: Model, labels: Int[Array, ' B'], weight: PerImage, *, null_label: int) -> Denoiser:
    """Return eps(z, λ, c), unguided: one forward of B, for models without a null label. The weight is not used."""
    return lambda z, logsnr: diffusion.check_prediction(model(z, logsnr, labels), z)


def unconditional(model: Model, labels: Int[Array, ' B'], weight: PerImage, *, null_label: int) -> Denoiser:
    """Return eps(z, λ, null), for a classifier to guide. Models without labels ignore the null label."""
    return lambda z, logsnr: diffusion.check_prediction(model(z, logsnr, jnp.full_like(labels, null_label)), z)


# ---------------------------------------------------------------- Meng et al. 2023, section 3.1: eps(z, λ, c, w)


def learned(model: Model, labels: Int[Array, ' B'], weight: PerImage, *, null_label: int) -> Denoiser:
    """Return eps(z, λ, c, w) of a network that takes w (Meng et al. 2023): one forward of B for any weight."""

    def denoise(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Prediction:
        weights = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), logsnr.shape)
        return diffusion.check_prediction(model(z, logsnr, labels, weight=weights), z)

    return denoise


# ---------------------------------------------------------------- section 3.2: ∇ log p^i(c|z) = -(eps_c - eps) / sigma


def implicit_classifier_score(
    model: Model, labels: Int[Array, ' B'], *, null_label: int
) -> Callable[[Float[Array, ' B *D'], Float[Array, ' B']], Float[Array, ' B *D']]:
    """Return the function (z, λ) -> ∇_z log p^i(c | z) of the implicit classifier p^i(c | z) ∝ p(z | c) / p(z).

    `classifier_free` is classifier guidance of the conditional model by this gradient.
    """
    pair = with_null(model, labels, null_label=null_label)

    def gradient(z: Float[Array, ' B *D'], logsnr: Float[Array, ' B']) -> Float[Array, ' B *D']:
        conditional, unconditional = pair(z, logsnr)
        return diffusion.score(conditional.eps - unconditional.eps, logsnr)

    return gradient


# ---------------------------------------------------------------- sec. 3.1; ADM, Alg. 2: eps - w sigma ∇ log p(c|z)


def classifier(denoise: Denoiser, log_prob: LogProb, labels: Int[Array, ' B'], weight: PerImage) -> Denoiser:
    """Return the guided denoiser eps~ = eps(z, λ) - w sigma ∇_z log p(c | z, λ), around any denoiser.

    The gradient of log_prob is `jax.grad`'s.
    """

    def add_gradient(prediction, z, logsnr):
        gradient = _gradient(log_prob, z, logsnr, labels)
        _, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr, z))
        w = diffusion.broadcast_to_images(weight, z)
        return diffusion.with_eps(prediction, prediction.eps - w * sigma * gradient)

    return denoisers.mapped(denoise, add_gradient)


# ---------------------------------------------------------------- ADM, Algorithm 1: mean + w variance ∇ log p(c|z)


def classifier_mean_shift(log_prob: LogProb, labels: Int[Array, ' B'], weight: PerImage) -> MeanShift:
    """Return a sampler's `mean_shift`: w variance ∇_z log p(c | z, λ) is added to the posterior mean.

    The gradient is taken at z_t, as in ADM's program; the derivation has it at the mean.
    """

    def mean_shift(
        z: Float[Array, ' B *D'], logsnr: Float[Array, ' B'], variance: Scalar | Float[Array, '...']
    ) -> Float[Array, ' B *D']:
        w = diffusion.broadcast_to_images(weight, z)
        return w * variance * _gradient(log_prob, z, logsnr, labels)

    return mean_shift


def _gradient(log_prob, z, logsnr, labels):
    """Return ∇_z log p(c | z, λ) of each image. Images do not mix, so the gradient of the sum is each one's own."""

    def total(z):
        values = log_prob(z, logsnr, labels)
        if jnp.shape(values) != z.shape[:1]:
            raise ValueError(
                f'log_prob returned shape {jnp.shape(values)} for {len(z)} images; it must return log p(label | z), '
                'one number per image'
            )
        return values.sum()

    return jax.grad(total)(z)
