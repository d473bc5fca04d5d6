r"""Guided Fashion-MNIST in 16, 8, 4, 2 and 1 steps of one forward each: progressive distillation.

    python -m cfg_jax.main --config=configs/fashion_mnist_progressive.py

The first round learns from the student of configs/fashion_mnist_distilled.py in 32 steps of DDIM; each round halves the
steps. See configs/digits_progressive.py.
Hardware: two CPU cores. Cost: 27 CPU minutes on an Intel Xeon with AVX-512, for all rounds.
Expect, over 3,000 images at w = 0.3: FID 6.2, 4.6, 3.3, 2.7, 2.2 in 1, 2, 4, 8, 16 steps; the first teacher's DDIM has
9.4 in 8 evaluations and 2.3 in 32 (errors 0.4 to 1.3).
"""

from pathlib import Path

from cfg_jax import config_files
from cfg_jax.config import progressive

ROUNDS = ((16, 100), (8, 150), (4, 200), (2, 200), (1, 300))


def get_config():
    return config_files.read(
        Path(__file__).with_name('fashion_mnist_distilled.py'),
        {
            **progressive(ROUNDS),
            'distill.teacher': 'runs/fashion_mnist_distilled',
            'optim.ema_decay': 0.95,
            'train.checkpoint_every': 50,
        },
    )
