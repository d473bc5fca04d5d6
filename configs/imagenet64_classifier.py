r"""ADM's noisy classifier of ImageNet 64x64, 65.4M parameters (Dhariwal & Nichol 2021, table 12).

    python -m cfg_jax.main --config=configs/imagenet64_classifier.py --mode=convert \
        --config.convert.path=64x64_classifier.pt
    python -m cfg_jax.main --config=configs/imagenet64_classifier.py --config.data.data_dir=DIR

Data: none to use OpenAI's published weights (the first command). To train: as configs/imagenet64.py says, named by
config.data.name.
Hardware: accelerators whose number divides the batch of 1024; bfloat16.
Expect accuracy by quarter of λ in metrics.jsonl; the paper states none. It guides configs/adm64.py.
"""

from cfg_jax.config import default


def get_config():
    config = default()

    config.data.source = 'tfds'
    config.data.name = 'imagenet_resized/64x64'
    config.data.image_size = 64
    config.data.image_channels = 3
    config.data.num_classes = 1000
    config.data.flip = True
    config.data.random_crop = True
    config.data.num_threads = 16

    config.diffusion.schedule = 'adm_cosine'

    config.model.kind = 'classifier'
    config.model.channels = 128
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 4
    config.model.attention_resolutions = (32, 16, 8)
    config.model.head_channels = 64
    config.model.dtype = 'bfloat16'

    config.optim.name = 'adamw'
    config.optim.learning_rate = 6e-4
    config.optim.weight_decay = 0.2
    config.optim.clip_norm = 0.0
    config.optim.ema_decay = 0.0  # what guides is the parameters themselves

    config.train.batch_size = 1024
    config.train.num_steps = 300_000
    config.train.log_every = 100
    config.train.checkpoint_every = 10_000
    return config
