r"""Guided Fashion-MNIST in 16, 8, 4, 2 and 1 steps of one forward each: progressive distillation.

    python -m cfg_jax.main --config=configs/fashion_mnist_progressive.py

The first round learns from the student of configs/fashion_mnist_distilled.py in 32 steps of DDIM; each round halves the
steps. See configs/digits_progressive.py.
Hardware: two CPU cores. Cost: not measured; a step has 5/3 of the FLOPs of one of the first teacher's.
Expect: not measured.
"""

from itertools import accumulate
from pathlib import Path

from cfg_jax import config_files

ROUNDS = ((16, 100), (8, 150), (4, 200), (2, 200), (1, 300))


def get_config():
    return config_files.read(
        Path(__file__).with_name('fashion_mnist_distilled.py'),
        {
            'distill.method': 'progressive',
            'distill.teacher': 'runs/fashion_mnist_distilled',
            'distill.rounds': ROUNDS,
            'loss.target': 'eps',
            'loss.weighting': 'truncated_snr',
            'optim.learning_rate': 1e-3,
            'optim.decay': 'linear',
            'optim.warmup_steps': 0,
            'optim.ema_decay': 0.95,
            'train.num_steps': sum(steps for _, steps in ROUNDS),
            'train.checkpoint_every': 50,
            'sample.sampler': 'ddim',
            'sample.grid': 'u_open',
            'sample.logsnr_min': None,
            'sample.logsnr_max': None,
            'sample.num_steps': 1,
            'eval.steps': tuple(accumulate(steps for _, steps in ROUNDS)),
            'eval.guidance_weights': (0.0, 0.3, 1.0),
        },
    )
