"""The paper's class-conditional ImageNet 128x128 model, 421.5M parameters (Ho & Salimans 2022, table 2).

    python -m cfg_jax.main --config=configs/imagenet128.py --mode=prepare --config.prepare.path=ILSVRC2012_img_train.tar
    python -m cfg_jax.main --config=configs/imagenet128.py

Data: image-net.org's ILSVRC2012_img_train.tar (138 GB), area-averaged and cropped to the centre by the first command:
1,281,167 images, 37 GB, 1.1 hours on two cores and less on more (325 images/s). Under --config.data.data_dir, or
~/tensorflow_datasets.
Hardware: accelerators whose number divides the batch of 256; bfloat16. Parameters, EMA and Adam take 6.7 GB on each.
Cost: 0.46 PFLOP per update (XLA counts 599 GFLOP per forward pass and image), 1.24e21 FLOP for all 2.7M: 131 chip-days
at 110 TFLOP/s per chip, a rate that is assumed, not measured.
Expect (50k samples; T = 128/256/1024): FID 8.11/7.27/7.22, IS 81/82/82 at w=0; 3.04/2.43/2.43, 156/158/156 at w=0.3;
7.88/7.86/7.80, 295/298/295 at w=1; 21.6/21.5/21.5, 422/421/419 at w=4. ADM-G's FID at this size is 2.97.
Not all settings are in the paper; the rest are its authors' public ones for this model.
"""

from cfg_jax.config import imagenet


def get_config():
    config = imagenet(128)

    config.model.channels = 256
    config.model.channel_mult = (1, 1, 2, 3, 4)
    config.model.num_blocks = 2
    config.model.num_heads = 4
    config.model.dropout = 0.0

    config.loss.p_uncond = 0.1

    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 1_000
    config.optim.clip_norm = 1.0

    config.train.batch_size = 256
    config.train.num_steps = 2_700_000
    config.train.log_every = 100
    config.train.checkpoint_every = 10_000
    config.train.grid_every = 20_000

    config.sample.num_steps = 256
    config.sample.v = 0.2
    return config
