"""Distillation: a student learns to do in one forward, or in one step, what its teacher does in two.

`guided_loss` is the first stage of Meng et al. 2023 (On Distillation of Guided Diffusion Models): the student takes the
guidance weight w. `progressive_loss` is Salimans & Ho 2022 (Progressive Distillation for Fast Sampling of Diffusion
Models), which is Meng et al.'s second stage if teacher and student take w.
Every loss is one number per image, [B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cfg_jax import diffusion, losses
from cfg_jax.diffusion import Schedule
from cfg_jax.losses import GuidedNetwork, Loss
from cfg_jax.typing import Array, Float, Int, Key, Scalar

# ---------------------------------------------------------------- Meng et al. 2023, section 3.1: w ~ U[0, w_max]


def sample_weight(key: Key[Array, ''], batch_size: int, *, weight_max: Scalar) -> Float[Array, ' {batch_size}']:
    """Draw w ~ Uniform[0, w_max], one per image."""
    return weight_max * jax.random.uniform(key, (batch_size,))


# ---------------------------------------------------------------- Meng et al. 2023, Algorithm 1: (1 + w) x_c - w x_null


def guided_output(
    teacher: losses.Network,
    z: Float[Array, ' B *D'],
    logsnr: Float[Array, ' B'],
    labels: Int[Array, ' B'],
    weight: Float[Array, ' B'],
    *,
    null_label: int,
) -> Float[Array, ' B *D']:
    """Return the guided output of a network that predicts eps, x, v or F, each of which is linear in the others.

    It is computed in one forward of 2B: [labels; null].
    """
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
    output = teacher(jnp.concatenate([z, z]), jnp.concatenate([logsnr, logsnr]), both)
    conditional, unconditional = jnp.split(output, 2)
    return conditional + diffusion.broadcast_to_images(weight, z) * (conditional - unconditional)


def guided_loss(
    student: GuidedNetwork,
    teacher: losses.Network,
    x: Float[Array, ' B *D'],
    labels: Int[Array, ' B'],
    key: Key[Array, ''],
    *,
    schedule: Schedule,
    null_label: int,
    weight_max: Scalar,
    prediction: str = 'eps',
    target: str = 'eps',
    sigma_data: Scalar = 0.5,
    weighting: losses.Weighting | None = None,
    low_discrepancy: bool = False,
) -> Loss:
    """Compute Meng et al.'s Algorithm 1 of images x in [-1, 1]: the student's error on the guided teacher.

    Teacher and student output the same `prediction`; w ~ Uniform[0, weight_max] for each image.
    """
    u_key, eps_key, weight_key = jax.random.split(key, 3)
    u = losses.sample_u(u_key, len(x), low_discrepancy=low_discrepancy)
    logsnr = schedule(u)
    z = diffusion.q_sample(x, jax.random.normal(eps_key, x.shape), logsnr)
    weight = sample_weight(weight_key, len(x), weight_max=weight_max)
    truth = jax.lax.stop_gradient(guided_output(teacher, z, logsnr, labels, weight, null_label=null_label))
    error = student(z, logsnr, labels, weight) - truth
    meaning = {'prediction': prediction, 'target': target, 'sigma_data': sigma_data}
    loss = losses.mean_square(error, logsnr, **meaning, log_weight=losses.log_weight(weighting, schedule, u))
    return Loss(loss, logsnr, jnp.zeros(len(x), bool))


# ---------------------------------------------------------------- Salimans & Ho 2022, Algorithm 2: t -> t' -> t''


def ddim_pair(
    predict_x: Callable[[Float[Array, ' B *D'], Float[Array, ' B']], Float[Array, ' B *D']],
    z: Float[Array, ' B *D'],
    logsnr: Float[Array, ' B'],
    logsnr_middle: Float[Array, ' B'],
    logsnr_end: Float[Array, ' B'],
) -> Float[Array, ' B *D']:
    """Return the x with which one DDIM step from λ to λ_end arrives where two steps, by λ_middle, arrive.

    The paper's (z'' - (σ''/σ) z) / (alpha'' - (σ''/σ) alpha) is a mean of the x at both steps, weighted by the steps
    in e^{λ/2} = alpha/sigma. So written, nothing cancels. predict_x(z, λ) -> x.
    """
    first = predict_x(z, logsnr)
    alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_images(logsnr_middle, z))
    middle = alpha * first + sigma * diffusion.predict_eps(z, first, logsnr)
    second = predict_x(middle, logsnr_middle)
    share = jnp.expm1(0.5 * (logsnr_middle - logsnr_end)) / jnp.expm1(0.5 * (logsnr - logsnr_end))
    return first + diffusion.broadcast_to_images(share, z) * (second - first)


# ---------------------------------------------------------------- Salimans & Ho 2022, Algorithm 2: its steps and loss


def sample_step(
    key: Key[Array, ''], batch_size: int, num_steps: Scalar | Int[Array, ''], *, low_discrepancy: bool
) -> Float[Array, ' {batch_size}']:
    """Draw u = i / N with i ~ Uniform({1, ..., N}), one per image: a start of one of the student's N steps."""
    number = jnp.floor(losses.sample_u(key, batch_size, low_discrepancy=low_discrepancy) * num_steps)
    return (jnp.minimum(number, num_steps - 1) + 1.0) / num_steps  # u N may round up to N


def progressive_loss(
    student: GuidedNetwork,
    teacher: GuidedNetwork,
    x: Float[Array, ' B *D'],
    labels: Int[Array, ' B'],
    key: Key[Array, ''],
    *,
    schedule: Schedule,
    num_steps: Scalar | Int[Array, ''],
    weight_max: Scalar,
    clip_x: bool = True,
    prediction: str = 'v',
    target: str = 'v',
    sigma_data: Scalar = 0.5,
    weighting: losses.Weighting | None = None,
    low_discrepancy: bool = False,
) -> Loss:
    """Compute Salimans & Ho's Algorithm 2 of images x in [-1, 1]: one of N steps of the student, two of its teacher.

    schedule: u -> λ, on which steps go from i/N to (i-1)/N. Teacher and student output the same `prediction`, any
    but 'eps'. clip_x: keep the teacher's x within [-1, 1], as its sampler does. w ~ Uniform[0, weight_max].
    """
    step_key, eps_key, weight_key = jax.random.split(key, 3)
    u = sample_step(step_key, len(x), num_steps, low_discrepancy=low_discrepancy)
    logsnr, middle, end = schedule(u), schedule(u - 0.5 / num_steps), schedule(jnp.maximum(u - 1.0 / num_steps, 0.0))
    z = diffusion.q_sample(x, jax.random.normal(eps_key, x.shape), logsnr)
    weight = sample_weight(weight_key, len(x), weight_max=weight_max)

    def predict_x(z, logsnr):
        output = teacher(z, logsnr, labels, weight)
        return diffusion.limit_x(diffusion.network_x(output, z, logsnr, prediction, sigma_data), clip_x)

    wanted = jax.lax.stop_gradient(ddim_pair(predict_x, z, logsnr, middle, end))
    eps = diffusion.predict_eps(z, wanted, logsnr)
    output = student(z, logsnr, labels, weight)
    meaning = {'prediction': prediction, 'target': target, 'sigma_data': sigma_data}
    log_weight = losses.log_weight(weighting, schedule, u)
    loss = losses.squared_error(output, z, wanted, eps, logsnr, **meaning, log_weight=log_weight)
    return Loss(loss, logsnr, jnp.zeros(len(x), bool))
