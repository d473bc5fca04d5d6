"""Samplers: a denoiser, a start and a grid of λ to images. They know nothing of labels, weights or classifiers.

`logsnrs` increases; each of its entries is one call of the denoiser, all within one `lax.scan`. The last call's x is
returned, without noise. A grid that does not increase and a denoiser that returns no `Prediction` are a ValueError; a
grid that jit traces cannot be checked (`diffusion.check_logsnrs`, before it is given to the jitted function, can).
"""

import jax
import jax.numpy as jnp

from cfg_jax import diffusion
from cfg_jax.diffusion import Denoiser, MeanShift
from cfg_jax.typing import Array, Float, Int, Integer, Key, Scalar

# ---------------------------------------------------------------- CFG paper, Algorithm 2: z_1 ~ N(0, I)


def step_noise(
    keys: Key[Array, ' B'], step: int | Int[Array, ''], image_shape: tuple[int, ...]
) -> Float[Array, 'B ...']:
    """Draw standard normal noise [B, *image_shape]; image i's depends on keys[i] and step alone.

    Step 0 is the start z ~ N(0, I); a sampler's T-1 noisy steps are 1 .. T-1.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), image_shape))(keys)


def image_keys(seed: int | Integer[Array, ''], indices: Integer[Array, ' B']) -> Key[Array, ' B']:
    """Return the typed PRNG key of each image, fold_in(seed, image index)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def _walk(denoise, z, logsnrs, clip_x, step_to):
    """Scan over the grid; `step_to(step, z, x, prediction, λ_t, λ_s)` makes z at the next λ."""
    diffusion.check_logsnrs(logsnrs)
    # The last step takes x in place of z_s, so any finite λ_s will do there.
    targets = jnp.append(logsnrs[1:], logsnrs[-1] + 1.0)
    steps = jnp.arange(1, len(logsnrs) + 1)

    def body(z, inputs):
        step, logsnr_t, logsnr_s = inputs
        prediction = diffusion.check_prediction(denoise(z, jnp.full(z.shape[:1], logsnr_t)), z)
        x = diffusion.predict_x(z, prediction.eps, logsnr_t)
        x = diffusion.clip_to_range(x) if clip_x else x
        z_s = step_to(step, z, x, prediction, logsnr_t, logsnr_s)
        return jnp.where(step == len(logsnrs), x, z_s), None

    return jax.lax.scan(body, z, (steps, logsnrs, targets))[0]


# ---------------------------------------------------------------- CFG paper, Algorithm 2, with eq. 3 and 4


def ancestral(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'],
    *,
    v: Scalar = 0.3,
    clip_x: bool = True,
    mean_shift: MeanShift | None = None,
) -> Float[Array, ' B *D']:
    """Sample each step z_s ~ N(mean of q(z_s | z_t, x), (σ~²)^{1-v} (σ²_{t|s})^v).

    keys: one per image. v: the constant of eq. 4, unless the denoiser predicts its own.
    mean_shift(z, logsnr_t, variance) -> shape of z is added to the mean of every step but the last. ADM's
    Algorithm 1 shifts the last step too, which changes the reference's images by 2e-6.
    """

    def step_to(step, z, x, prediction, logsnr_t, logsnr_s):
        mean, _ = diffusion.q_posterior(x, z, logsnr_t, logsnr_s)
        variance = diffusion.reverse_variance(logsnr_t, logsnr_s, v if prediction.v is None else prediction.v)
        if mean_shift is not None:
            mean = mean + mean_shift(z, jnp.full(z.shape[:1], logsnr_t), variance)
        return mean + jnp.sqrt(variance) * step_noise(keys, step, z.shape[1:])

    return _walk(denoise, z, logsnrs, clip_x, step_to)


# ---------------------------------------------------------------- DDIM, eq. 12 and 16 (Song et al. 2021)


def ddim(
    denoise: Denoiser,
    z: Float[Array, ' B *D'],
    logsnrs: Float[Array, ' T'],
    keys: Key[Array, ' B'] | None = None,
    *,
    eta: float = 0.0,
    clip_x: bool = True,
) -> Float[Array, ' B *D']:
    """Sample each step z_s = alpha_s x + sqrt(sigma_s² - c²) eps + c noise, c² = eta² σ~².

    eta=0 is deterministic and needs no keys; eta=1 has the posterior's variance. keys: one per image. eps is the one
    that fits the clipped x, as in ADM (which clips before guidance: `diffusion.clip_prediction`).
    """
    if eta and keys is None:
        raise ValueError('ddim with eta > 0 adds noise and needs keys, one per image')

    def step_to(step, z, x, prediction, logsnr_t, logsnr_s):
        eps = diffusion.predict_eps(z, x, logsnr_t) if clip_x else prediction.eps
        alpha_s, sigma_s = diffusion.alpha_sigma(logsnr_s)
        if not eta:
            return alpha_s * x + sigma_s * eps
        # c² = η² (1 - e^{λt-λs}) sigma_s²: factored, so that the rest of sigma_s² never rounds below zero
        share = eta**2 * diffusion.one_minus_ratio(logsnr_t, logsnr_s)
        noise = step_noise(keys, step, z.shape[1:])
        return alpha_s * x + sigma_s * (jnp.sqrt(1.0 - share) * eps + jnp.sqrt(share) * noise)

    return _walk(denoise, z, logsnrs, clip_x, step_to)
