r"""The paper's class-conditional ImageNet 64x64 model, 295.9M parameters (Ho & Salimans 2022, table 1).

    python -m cfg_jax.main --config=configs/imagenet64.py --mode=prepare --config.prepare.path=FOLDER
    python -m cfg_jax.main --config=configs/imagenet64.py
    python -m cfg_jax.main --config=configs/imagenet64.py --mode=sample --config.sample.guidance_weight=0.1

Data: TFDS's `imagenet_resized/64x64` (area-averaged), 1,281,167 images, 10 GB. FOLDER holds image-net.org's
Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip (12 GB); 15 minutes on two cores. Data that TFDS
prepared itself works too; --config.data.data_dir says where it is.
Those images were squeezed to a square. From ILSVRC2012_img_train.tar, cropped as the authors' public code does, in an
hour: --config.prepare.path=ILSVRC2012_img_train.tar --config.data.name=imagenet64, with that name also to train.
Hardware: accelerators whose number divides the batch of 2048; bfloat16. Parameters, EMA and Adam take 4.7 GB on each.
Cost: 1.3 PFLOP per update (XLA counts 211 GFLOP per forward pass and image), 5.2e20 FLOP for all 400,000: 55 chip-days
at 110 TFLOP/s per chip, a rate that is assumed, not measured.
Expect (p_uncond 0.1, 50k samples, T=256): FID 1.80, IS 53.7 at w=0; 1.55, 66.1 at w=0.1; 3.03, 92.8 at w=0.3;
12.6, 170 at w=1; 26.2, 260 at w=4. The paper also has p_uncond 0.2 and 0.5 (--config.loss.p_uncond).
Not all settings are in the paper; the rest are its authors' public ones for this model.
"""

from cfg_jax.config import imagenet


def get_config():
    config = imagenet(64)

    config.model.channels = 192
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.head_channels = 64
    config.model.dropout = 0.1

    config.loss.p_uncond = 0.1

    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 10_000
    config.optim.clip_norm = 1.0

    config.train.batch_size = 2048
    config.train.num_steps = 400_000
    config.train.log_every = 100
    config.train.checkpoint_every = 5_000
    config.train.grid_every = 10_000

    config.sample.num_steps = 256
    config.sample.v = 0.3
    return config
