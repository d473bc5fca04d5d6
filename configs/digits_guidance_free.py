r"""The digits by a network that takes the guidance weight: guided sampling in one forward per step, without a teacher.

    python -m cfg_jax.main --config=configs/digits_guidance_free.py

Guidance-free training (Chen et al. 2025) of the model of configs/digits.py, at weights from 0 to 4.
Hardware: two CPU cores. Cost: a training step takes 1.3 times the CPU time of one of configs/digits.py, and a guided
step of the sampler one forward, not two.
Expect, over 2,000 images of the same with v (--config.diffusion.prediction=v --config.loss.target=v): FID 1.14, 0.78,
0.76, 1.88 at w = 0.1, 0.3, 0.5, 1; ordinary training and guidance have 0.78, 0.53, 0.73, 1.97 (errors 0.13 to 0.4).
"""

from pathlib import Path

from cfg_jax import config_files


def get_config():
    return config_files.read(
        Path(__file__).with_name('digits.py'),
        {'model.guidance_input': True, 'loss.guided': 'gft', 'guidance.function': 'learned'},
    )
