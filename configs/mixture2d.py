"""Guidance on a mixture of three Gaussians in the plane, where every answer is known exactly: the laboratory.

    python -m cfg_jax.main --config=configs/mixture2d.py

Hardware: two CPU cores. Cost: 112 CPU seconds, measured on two cores that much other work shared, where it took 158
seconds; the time on idle cores is not measured. No data are read, and no checkpoint is written.
Expect, in runs/mixture2d, nine figures as .png and .svg, and their numbers with errors in laboratory.csv and .json.
Away from the other classes, the guided target's mean is 1.085 ± 0.001 at w=1 and 1.165 at w=4. Guidance draws 1.406 ±
0.005 and 2.023 with DDIM, 1.254 ± 0.006 and 1.485 with the ancestral sampler. At w=0 all are 1: see docs/laboratory.md.
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
