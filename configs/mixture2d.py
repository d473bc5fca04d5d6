"""Guidance on a mixture of three Gaussians in the plane, where every answer is known exactly: the laboratory.

    python -m cfg_jax.main --config=configs/mixture2d.py

Hardware: two CPU cores. Cost: one minute. Nothing is read from disk, and no checkpoint is written.
Expect, in runs/mixture2d: seven figures as .png and .svg, and their numbers with errors in laboratory.csv and .json.
"""

from cfg_jax.config import default


def get_config():
    config = default()
    config.data.source = 'mixture'
    config.data.num_classes = 3

    config.diffusion.logsnr_min = -12.0
    config.diffusion.logsnr_max = 12.0

    config.optim.learning_rate = 3e-3
    config.loss.p_uncond = 0.2
    config.sample.num_steps = 256
    return config
