"""The training objective (CFG paper, Algorithm 1), one short function a line of the algorithm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfg_jax import diffusion


class Loss(NamedTuple):
    """Per-image losses [B] with what they were drawn at: λ [B], and whether the label had been dropped (bool [B])."""

    loss: jax.Array
    logsnr: jax.Array
    dropped: jax.Array


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


def diffusion_loss(
    network, x, labels, key, *, schedule, null_label, p_uncond, prediction='eps', target='eps', low_discrepancy=False
):
    """Algorithm 1's loss for images x [B, H, W, C] in [-1, 1] and labels [B].

    network(z, logsnr, labels) -> shape of z, a `prediction` of 'eps', 'x' or 'v'. schedule: u -> λ. Returns `Loss`.
    """
    u_key, eps_key, label_key = jax.random.split(key, 3)
    labels, dropped = drop_labels(label_key, labels, p_uncond=p_uncond, null_label=null_label)
    logsnr = schedule(sample_u(u_key, len(x), low_discrepancy=low_discrepancy))
    eps = jax.random.normal(eps_key, x.shape)
    z = diffusion.q_sample(x, eps, logsnr)
    output = network(z, logsnr, labels)
    loss = squared_error(output, z, x, eps, logsnr, prediction=prediction, target=target)
    return Loss(loss, logsnr, dropped)
