"""Classifier-free guidance on scikit-learn's 8x8 digits: trains, samples and draws the trade-off curve.

    python -m cfg_jax.main --config=configs/digits.py

Hardware: two CPU cores. Cost: 330 CPU seconds, three and a half minutes, on an AMD EPYC with AVX-512; 660 CPU seconds
on one of family 25, model 1 (Zen 3: AVX2, no AVX-512).
Expect, over 1,000 samples per weight, judged by a classifier of its own (real images have IS 9.65): FID 1.59 at w=0,
1.06 at w=0.3, 2.45 at w=1, 8.64 at w=4 (jaxlib 0.12.0.1, with AVX-512; another processor or version: some percent more
or less); IS 9.5 at w=0, 9.9 at w=1; accuracy from 0.986 at w=0 to 1.0 at w=1. It is the shape of the paper's tables 1
and 2, on data small enough for it. The variance is the upper one (v=1): at 32 steps the paper's v=0.3, made for 256,
loses variety before any guidance does, and with it the dip of FID at small w.
"""

from cfg_jax.config import default


def get_config():
    config = default()

    config.model.channels = 16
    config.model.channel_mult = (1, 2)
    config.model.attention_resolutions = (4,)
    config.model.num_heads = 2
    config.model.num_groups = 8

    config.optim.learning_rate = 2e-3
    config.optim.decay = 'cosine'
    config.optim.warmup_steps = 100
    config.optim.ema_decay = 0.995

    config.loss.low_discrepancy = True

    config.train.batch_size = 64
    config.train.num_steps = 2500
    config.train.log_every = 100
    config.train.checkpoint_every = 500
    config.train.keep_every = 500  # earlier checkpoints are weak models: config.guidance.weak_step
    config.train.grid_every = 500

    config.sample.num_steps = 32
    config.sample.v = 1.0
    config.sample.batch_size = 100

    config.eval.at_end = True
    config.eval.judge = 'trained'
    config.eval.num_samples = 1000
    config.eval.split_images = 100
    return config
