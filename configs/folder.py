r"""Classifier-free guidance on your own images, one folder per class or a zip file of such folders; 64x64.

    python -m cfg_jax.main --config=configs/folder.py --config.data.data_dir=DIR --config.data.num_classes=N
    python -m cfg_jax.main --config=configs/folder.py --config.data.data_dir=DIR --config.data.num_classes=N \
        --mode=inspect

Data: DIR/class_name/*.png (jpg, webp, ...), or a flat folder whose labels.json maps file names to class names or ids
from 0. Classes are numbered in the order of their names, 2 before 10. Images of any size are scaled as they are read
(config.data.resampling). Where photographs are large (a core reads some 300 of 500x375 a second) or files are broken,
prepare them once, which names the broken ones, and train on that:

    python -m cfg_jax.main --config=configs/folder.py --mode=prepare --config.prepare.path=DIR \
        --config.data.name=mine --config.data.data_dir=OUT --config.data.num_classes=N
    python -m cfg_jax.main --config=configs/folder.py --config.data.source=tfds \
        --config.data.name=mine --config.data.data_dir=OUT --config.data.num_classes=N

Hardware: one accelerator; bfloat16. 100.3M parameters; they, EMA and Adam take 1.6 GB on each.
Cost: 26 TFLOP per update (XLA counts 67 GFLOP per forward pass and image), 5.2e18 FLOP for all 200,000: half a chip-day
at 110 TFLOP/s, a rate that is assumed, not measured.
Expect: not measured. Below some thousand images per class such models mostly repeat their training images.
"""

from cfg_jax.config import default


def get_config():
    config = default()
    config.data.source = 'folder'
    config.data.image_size = 64
    config.data.image_channels = 3
    config.data.num_classes = 2
    config.data.flip = True
    config.data.num_threads = 8

    config.model.channels = 128
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 2
    config.model.attention_resolutions = (16, 8)
    config.model.head_channels = 64
    config.model.dropout = 0.1
    config.model.dtype = 'bfloat16'

    config.loss.p_uncond = 0.1
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 1_000

    config.train.batch_size = 128
    config.train.num_steps = 200_000
    config.train.log_every = 100
    config.train.checkpoint_every = 2_000
    config.train.grid_every = 2_000

    config.sample.num_steps = 256
    return config
