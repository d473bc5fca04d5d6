r"""ADM's noisy classifier of ImageNet 128x128, 42.6M parameters (Dhariwal & Nichol 2021, table 12).

    python -m cfg_jax.main --config=configs/imagenet128_classifier.py --mode=convert \
        --config.convert.path=128x128_classifier.pt
    python -m cfg_jax.main --config=configs/imagenet128_classifier.py --config.data.data_dir=DIR

Data: none to use OpenAI's published weights (the first command). To train: `imagenet128_adm`, as
configs/adm128.py says.
Hardware: accelerators whose number divides the batch of 256; bfloat16.
Expect accuracy by quarter of λ in metrics.jsonl; the paper states none. It guides configs/adm128.py.
"""

from cfg_jax.config import adm_classifier


def get_config():
    config = adm_classifier(128)

    config.model.channel_mult = (1, 1, 2, 3, 4)
    config.model.num_blocks = 2

    config.optim.learning_rate = 3e-4
    config.optim.weight_decay = 0.05

    config.train.batch_size = 256
    config.train.num_steps = 300_000
    return config
