r"""ADM's noisy classifier of ImageNet 64x64, 65.4M parameters (Dhariwal & Nichol 2021, table 12).

    python -m cfg_jax.main --config=configs/imagenet64_classifier.py --mode=convert \
        --config.convert.path=64x64_classifier.pt
    python -m cfg_jax.main --config=configs/imagenet64_classifier.py --config.data.data_dir=DIR

Data: none to use OpenAI's published weights (the first command). To train: `imagenet64_adm`, as
configs/adm64.py says.
Hardware: accelerators whose number divides the batch of 1024; bfloat16.
Expect accuracy by quarter of λ in metrics.jsonl; the paper states none. It guides configs/adm64.py.
"""

from cfg_jax.config import adm_classifier


def get_config():
    config = adm_classifier(64)

    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 4

    config.optim.learning_rate = 6e-4
    config.optim.weight_decay = 0.2

    config.train.batch_size = 1024
    config.train.num_steps = 300_000
    return config
