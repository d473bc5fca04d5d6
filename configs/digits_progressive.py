r"""Guided digits in 32, 16, 8, 4, 2 and 1 steps of one forward each: progressive distillation.

    python -m cfg_jax.main --config=configs/digits_progressive.py

Each round halves the steps (Salimans & Ho 2022); the first learns from the student of configs/digits_distilled.py,
which takes the guidance weight, in 64 steps: so it is the second stage of Meng et al. 2023. A run that is stopped
resumes within its round.
Hardware: two CPU cores. Cost: 376 CPU seconds on an Intel Xeon with AVX-512, for all rounds.
Expect, over 2,000 images: FID 0.61 in 8 steps and 0.66 in 4 at w = 0.1, 1.01 in one step at w = 0.3; the first teacher
has 0.53 in 64 evaluations.
"""

from pathlib import Path

from cfg_jax import config_files
from cfg_jax.config import progressive

ROUNDS = ((32, 500), (16, 500), (8, 500), (4, 500), (2, 500), (1, 1000))


def get_config():
    return config_files.read(
        Path(__file__).with_name('digits_distilled.py'),
        {
            **progressive(ROUNDS),
            'distill.teacher': 'runs/digits_distilled',
            'optim.ema_decay': 0.98,
        },
    )
