r"""A student of the Fashion-MNIST model that takes the guidance weight: guided sampling in one forward per step.

    python -m cfg_jax.main --config=configs/fashion_mnist_distilled.py

The teacher is that of configs/fashion_mnist.py, trained before, in runs/fashion_mnist (config.distill.teacher). It is
the first stage of Meng et al. 2023.
Hardware: two CPU cores. Cost: 31 CPU minutes on an Intel Xeon with AVX-512; the teacher takes an hour.
Expect, over 10,000 images: FID 1.6, 1.4, 7.7 at w = 0.3, 0.5, 1, where the teacher has 1.2, 2.0, 9.8 with twice the
evaluations (errors 0.2 to 0.5).
"""

from pathlib import Path

from cfg_jax import config_files


def get_config():
    return config_files.read(
        Path(__file__).with_name('fashion_mnist.py'),
        {
            'loss.p_uncond': 0.0,
            'model.guidance_input': True,
            'guidance.function': 'learned',
            'distill.method': 'guided',
            'distill.teacher': 'runs/fashion_mnist',
            'optim.learning_rate': 1e-3,
            'optim.ema_decay': 0.98,  # 0.998 would hold an eighth of the teacher, which does not guide
            'train.num_steps': 1000,
            'train.keep_every': 0,
        },
    )
