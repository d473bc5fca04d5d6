r"""A weak model for autoguidance on the digits: half as wide as configs/digits.py, and trained for a quarter as long.

    python -m cfg_jax.main --config=configs/digits_weak.py
    python -m cfg_jax.main --config=configs/digits.py --mode=evaluate --config.eval.folder=autoguidance \
        --config.guidance.weak=checkpoint --config.guidance.weak_workdir=runs/digits_weak

Hardware: two CPU cores. Cost: 33 CPU seconds.
Karras et al. 2024 guide with a model that is smaller and trained less: it makes the same mistakes, but more of them. An
earlier checkpoint of the model itself needs no second training; configs/digits.py keeps one every 500 steps:
--config.guidance.weak=checkpoint --config.guidance.weak_step=500.
Expect, over 2,000 images: FID 0.79 ± 0.20 at w = 0.5, where no guidance has 1.36 ± 0.28, the null label at its best
0.74 ± 0.17, and the checkpoint of step 500 0.60 ± 0.12. See docs/guidance.md.
"""

from cfg_jax.config import default


def get_config():
    config = default()

    config.model.channels = 8
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
    config.train.num_steps = 600
    config.train.log_every = 100
    config.train.checkpoint_every = 600
    config.train.grid_every = 0

    config.sample.num_steps = 32
    config.sample.v = 1.0
    config.sample.batch_size = 100
    return config
