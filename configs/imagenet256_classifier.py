r"""ADM's noisy classifier of ImageNet 256x256, 54.1M parameters (Dhariwal & Nichol 2021, table 12).

    python -m cfg_jax.main --config=configs/imagenet256_classifier.py --mode=convert \
        --config.convert.path=256x256_classifier.pt
    python -m cfg_jax.main --config=configs/imagenet256_classifier.py --config.data.data_dir=DIR

Data: none to use OpenAI's published weights (the first command). To train: `imagenet256_adm`, as
configs/adm256.py says.
Hardware: accelerators whose number divides the batch of 256; bfloat16.
Expect accuracy by quarter of λ in metrics.jsonl; the paper states none. It guides configs/adm256.py.
"""

from cfg_jax.config import adm_classifier


def get_config():
    config = adm_classifier(256)

    config.model.channel_mult = (1, 1, 2, 2, 4, 4)
    config.model.num_blocks = 2

    config.optim.learning_rate = 3e-4
    config.optim.weight_decay = 0.05

    config.train.batch_size = 256
    config.train.num_steps = 500_000
    return config
