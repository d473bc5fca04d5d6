"""Training objectives, one short function a line of the algorithm, and the bound on the likelihood.

`diffusion_loss` is the CFG paper's Algorithm 1; `hybrid_loss` adds Improved DDPM's bound, which learns the variances.
Every loss is one number per image, [B].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfg_jax import diffusion
from cfg_jax.diffusion import Prediction


class Loss(NamedTuple):
    """Per-image losses [B] with what they were drawn at: λ [B], and whether the label had been dropped (bool [B]).

    correct: of a classifier, whether it found the label (bool [B]); else None.
    """

    loss: jax.Array
    logsnr: jax.Array
    dropped: jax.Array
    correct: jax.Array | None = None


def sample_u(key, batch_size, *, low_discrepancy):
    """u ~ Uniform[0, 1), one per image: [B].

    low_discrepancy: u_i = (i + offset) / B mod 1, one random offset for all (Variational Diffusion Models, app. I.1):
    each u is still uniform, and the batch covers [0, 1) evenly.
    """
    if not low_discrepancy:
        return jax.random.uniform(key, (batch_size,))
    return (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0


def drop_labels(key, labels, *, p_uncond, null_label):
    """Each label replaced by the null label with probability p_uncond. Returns (labels, dropped), each [B]."""
    dropped = jax.random.bernoulli(key, p_uncond, labels.shape)
    return jnp.where(dropped, null_label, labels), dropped


def squared_error(output, z, x, eps, logsnr, *, prediction, target):
    """Mean squared error of each image [B], measured on `target` ('eps' as in the paper, 'x' or 'v').

    The network's output is `prediction`. Where the two differ, the error is rescaled rather than the output converted:
    error_eps = (alpha/sigma) error_x = alpha error_v, which stays finite at both ends of λ.
    """
    truth = {'eps': eps, 'x': x, 'v': diffusion.velocity(x, eps, logsnr)}[prediction]
    mse = jnp.mean(jnp.square(output - truth), axis=tuple(range(1, z.ndim)))
    # squared error on x, eps and v, in units of the squared error on eps
    in_eps = {'eps': 0.0, 'x': logsnr, 'v': jax.nn.log_sigmoid(logsnr)}
    return mse * jnp.exp(in_eps[prediction] - in_eps[target]) if prediction != target else mse


def _draw(key, x, labels, *, null_label, p_uncond, low_discrepancy):
    """What a loss is random in: (u [B], eps, labels, dropped)."""
    u_key, eps_key, label_key = jax.random.split(key, 3)
    labels, dropped = drop_labels(label_key, labels, p_uncond=p_uncond, null_label=null_label)
    u = sample_u(u_key, len(x), low_discrepancy=low_discrepancy)
    return u, jax.random.normal(eps_key, x.shape), labels, dropped


def diffusion_loss(
    network, x, labels, key, *, schedule, null_label, p_uncond, prediction='eps', target='eps', low_discrepancy=False
):
    """Algorithm 1's loss for images x [B, H, W, C] in [-1, 1] and labels [B].

    network(z, logsnr, labels) -> shape of z, a `prediction` of 'eps', 'x' or 'v'. schedule: u -> λ. Returns `Loss`.
    """
    u, eps, labels, dropped = _draw(
        key, x, labels, null_label=null_label, p_uncond=p_uncond, low_discrepancy=low_discrepancy
    )
    logsnr = schedule(u)
    z = diffusion.q_sample(x, eps, logsnr)
    output = network(z, logsnr, labels)
    loss = squared_error(output, z, x, eps, logsnr, prediction=prediction, target=target)
    return Loss(loss, logsnr, dropped)


# ---------------------------------------------------------------- the variational bound (IDDPM, eq. 4 to 7)


def bits_per_dim(nats):
    """Nats per dimension [B, ...] -> their mean over an image, in bits: [B]."""
    return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / math.log(2.0)


def gaussian_kl(mean_a, log_variance_a, mean_b, log_variance_b):
    """KL(N(mean_a, variance_a) || N(mean_b, variance_b)) of each dimension, in nats; the arguments broadcast."""
    log_ratio = log_variance_a - log_variance_b
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + jnp.square(mean_a - mean_b) * jnp.exp(-log_variance_b))


def _normal_cdf(value):
    """Page's approximation of the normal distribution function, which the published bits per dimension rest on.

    sigmoid(2 y) is (1 + tanh y) / 2 without its rounding in the lower tail.
    """
    return jax.nn.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3))


def discretized_log_likelihood(x, mean, log_variance):
    """log of N(mean, variance)'s mass on each value's bin, in nats, at least log 1e-12. Shape of x (DDPM, eq. 13).

    x: 8-bit data scaled to [-1, 1]. A bin reaches 1/255 to either side, and the outermost ones to infinity.
    """
    inverse_std, half_bin = jnp.exp(-0.5 * log_variance), 1.0 / 255.0
    distance = -jnp.abs(x - mean)  # both tails are computed as the lower one, where float32 is fine
    inner = _normal_cdf(inverse_std * (distance + half_bin)) - _normal_cdf(inverse_std * (distance - half_bin))
    outer = _normal_cdf(inverse_std * (half_bin - jnp.sign(x) * (x - mean)))
    return jnp.log(jnp.maximum(jnp.where(jnp.abs(x) > 0.999, outer, inner), 1e-12))


def variational_bound(prediction, x, z, t, *, logsnrs, clip_x):
    """One term of the bound, at timestep t, in bits per dimension: [B].

    KL(q(z_s | z_t, x) || p(z_s | z_t)) for t > 0, -log p(x | z_0) for t = 0. prediction: with its v. t: int [B].
    logsnrs: [T], t=0 first.
    """
    _, mean, log_variance = diffusion.table_reverse(prediction, z, t, logsnrs=logsnrs, clip_x=clip_x)
    true_mean, _ = diffusion.q_posterior(x, z, *diffusion.table_step(logsnrs, t))
    true_log_variance = diffusion.table_log_variance(logsnrs, t, jnp.zeros_like(prediction.v))
    kl = bits_per_dim(gaussian_kl(true_mean, true_log_variance, mean, log_variance))
    return jnp.where(t == 0, -bits_per_dim(discretized_log_likelihood(x, mean, log_variance)), kl)


# ---------------------------------------------------------------- learned variances (IDDPM, section 3.1)


def hybrid_terms(output, z, x, eps, t, *, logsnrs):
    """(mean squared error on eps, bound · T/1000), each [B]: their sum is L_hybrid (IDDPM, eq. 16; weights as in ADM).

    output: a network's, [..., 2C] (`diffusion.split_variance`). The bound teaches v alone: no gradient reaches eps
    through it. logsnrs: [T], t=0 first. t: int [B], at which z was made from x and eps.
    """
    eps_hat, v = diffusion.split_variance(output)
    mse = jnp.mean(jnp.square(eps_hat - eps), axis=tuple(range(1, z.ndim)))
    frozen = Prediction(jax.lax.stop_gradient(eps_hat), v)
    bound = variational_bound(frozen, x, z, t, logsnrs=logsnrs, clip_x=False)
    return mse, bound * (len(logsnrs) / 1000.0)


def hybrid_loss(network, x, labels, key, *, logsnrs, null_label, p_uncond, low_discrepancy=False):
    """L_hybrid at uniform timesteps, with Algorithm 1's dropped labels; x [B, H, W, C] in [-1, 1]. Returns `Loss`.

    network(z, logsnr, labels) -> [..., 2C], eps and then the variance's half. logsnrs: [T], t=0 first.
    """
    u, eps, labels, dropped = _draw(
        key, x, labels, null_label=null_label, p_uncond=p_uncond, low_discrepancy=low_discrepancy
    )
    t = jnp.minimum(jnp.int32(u * len(logsnrs)), len(logsnrs) - 1)  # float32's u T may round up to T
    logsnr, _ = diffusion.table_step(logsnrs, t)
    z = diffusion.q_sample(x, eps, logsnr)
    mse, bound = hybrid_terms(network(z, logsnr, labels), z, x, eps, t, logsnrs=logsnrs)
    return Loss(mse + bound, logsnr, dropped)


# ---------------------------------------------------------------- the noisy classifier (ADM, section 4)


def label_log_prob(logits, labels):
    """log p(label) of each image: [B]. logits: [B, num_classes], labels: int [B]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def classifier_loss(network, x, labels, key, *, schedule):
    """Cross-entropy of p(label | z_λ) at random λ, for images x [B, H, W, C] in [-1, 1]. Returns `Loss`.

    network(z, logsnr) -> logits [B, num_classes]. schedule: u -> λ.
    """
    u, eps, _, dropped = _draw(key, x, labels, null_label=0, p_uncond=0.0, low_discrepancy=False)
    logsnr = schedule(u)
    logits = network(diffusion.q_sample(x, eps, logsnr), logsnr)
    return Loss(-label_log_prob(logits, labels), logsnr, dropped, correct=logits.argmax(1) == labels)


# ---------------------------------------------------------------- the likelihood of a data set


def bits_per_dim_terms(denoise, x, keys, *, logsnrs, v=0.3, clip_x=True):
    """The bound on -log p(x), in bits per dimension: a dict of 'total' [B], 'prior' [B], and, by timestep, [B, T]:
    'terms' (total = prior + their sum), 'x_mse' and 'eps_mse' (of the eps that fits the clipped x).

    denoise(z, logsnr) -> Prediction. x: 8-bit images scaled to [-1, 1]. keys: [B] typed PRNG keys, one per image.
    logsnrs: [T], t=0 first: a table, or a sampler's grid reversed. v: as in `samplers.ancestral`.
    """
    logsnrs = jnp.asarray(logsnrs, jnp.float32)

    def term(_, t):
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), x.shape[1:]))(keys)
        t = jnp.full(x.shape[:1], t)
        z = diffusion.q_sample(x, eps, logsnrs[t])
        prediction = denoise(z, logsnrs[t])
        if prediction.v is None:
            prediction = prediction._replace(v=jnp.full_like(z, v))
        x_hat, _, _ = diffusion.table_reverse(prediction, z, t, logsnrs=logsnrs, clip_x=clip_x)
        eps_hat = diffusion.predict_eps(z, x_hat, logsnrs[t]) if clip_x else prediction.eps
        axes = tuple(range(1, x.ndim))
        return None, {
            'terms': variational_bound(prediction, x, z, t, logsnrs=logsnrs, clip_x=clip_x),
            'x_mse': jnp.mean(jnp.square(x_hat - x), axis=axes),
            'eps_mse': jnp.mean(jnp.square(eps_hat - eps), axis=axes),
        }

    terms = jax.lax.scan(term, None, jnp.arange(len(logsnrs)))[1]
    terms = {name: value.T for name, value in terms.items()}
    alpha, _ = diffusion.alpha_sigma(logsnrs[-1])
    prior = bits_per_dim(gaussian_kl(alpha * x, jax.nn.log_sigmoid(-logsnrs[-1]), 0.0, 0.0))
    return {'total': prior + terms['terms'].sum(axis=1), 'prior': prior, **terms}
