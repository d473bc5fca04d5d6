"""Classifier-free guidance on CIFAR-10: 32x32, ten classes, 57.1M parameters; half a day on one accelerator.

    python -m cfg_jax.main --config=configs/cifar10.py --mode=prepare --config.prepare.path=cifar-10-python.tar.gz
    python -m cfg_jax.main --config=configs/cifar10.py
    python -m cfg_jax.main --config=configs/cifar10.py --mode=sample --config.sample.guidance_weight=1

Data: the archive of 170 MB from https://www.cs.toronto.edu/~kriz/cifar.html, from which the first command makes TFDS's
`cifar10`: 50,000 images, 113 MB, in 15 seconds. Its test images: --config.data.split=test.
Hardware: one accelerator; bfloat16. Parameters, EMA and Adam take 0.9 GB on each.
Cost: 6.7 TFLOP per update (XLA counts 17.4 GFLOP per forward pass and image), 3.3e18 FLOP for all 500,000: 0.4
chip-days at 110 TFLOP/s per chip, a rate that is assumed, not measured.
Expect: not measured, and the paper has no such experiment. Width, blocks, dropout, batch and updates are Improved
DDPM's for CIFAR-10, whose unconditional model has FID 2.94.
"""

from cfg_jax.config import default


def get_config():
    config = default()
    config.data.source = 'tfds'
    config.data.name = 'cifar10'
    config.data.image_size = 32
    config.data.image_channels = 3
    config.data.num_classes = 10
    config.data.flip = True
    config.data.num_threads = 4

    config.model.channels = 128
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.num_blocks = 3
    config.model.attention_resolutions = (16, 8)
    config.model.num_heads = 4
    config.model.dropout = 0.3
    config.model.dtype = 'bfloat16'

    config.loss.p_uncond = 0.1
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 1_000

    config.train.batch_size = 128
    config.train.num_steps = 500_000
    config.train.log_every = 100
    config.train.checkpoint_every = 5_000
    config.train.grid_every = 5_000

    config.sample.num_steps = 256
    config.eval.num_samples = 50_000
    return config
