"""Classifier-free guidance on ImageNet 256x256 with ADM's network of that size, 553.8M parameters.

    python -m cfg_jax.main --config=configs/imagenet256.py --mode=prepare --config.prepare.path=ILSVRC2012_img_train.tar
    python -m cfg_jax.main --config=configs/imagenet256.py

Data: image-net.org's ILSVRC2012_img_train.tar (138 GB), area-averaged and cropped to the centre by the first command:
1,281,167 images, 136 GB, 3 hours on two cores and less on more (130 images/s). Under --config.data.data_dir, or
~/tensorflow_datasets.
Hardware: accelerators whose number divides the batch of 256; bfloat16. Parameters, EMA and Adam take 8.9 GB on each.
Cost: 1.7 PFLOP per update (XLA counts 2.2 TFLOP per forward pass and image), 3.4e21 FLOP for all 1.98M: 354 chip-days
at 110 TFLOP/s per chip, a rate that is assumed, not measured.
Expect: not measured, and the paper ends at 128x128. ADM's FID at this size is 10.94, 4.59 with its classifier.
"""

from cfg_jax.config import imagenet


def get_config():
    config = imagenet(256)

    config.model.channels = 256
    config.model.channel_mult = (1, 1, 2, 2, 4, 4)
    config.model.num_blocks = 2
    config.model.head_channels = 64
    config.model.dropout = 0.0

    config.loss.p_uncond = 0.1

    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 1_000
    config.optim.clip_norm = 1.0

    config.train.batch_size = 256
    config.train.num_steps = 1_980_000
    config.train.log_every = 100
    config.train.checkpoint_every = 10_000
    config.train.grid_every = 20_000

    config.sample.num_steps = 256
    config.sample.v = 0.2
    return config
