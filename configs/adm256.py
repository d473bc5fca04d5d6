r"""ADM's class-conditional ImageNet 256x256 model, 553.8M parameters (Dhariwal & Nichol 2021, tables 4 and 5).

    python -m cfg_jax.main --config=configs/adm256.py --mode=convert \
        --config.convert.path=256x256_diffusion.pt
    python -m cfg_jax.main --config=configs/adm256.py --mode=sample \
        --config.guidance.classifier_weight=1.0 --config.guidance.classifier_workdir=runs/imagenet256_classifier

Data: none to sample with OpenAI's published weights. To train: --mode=prepare with
--config.prepare.path=ILSVRC2012_img_train.tar makes `imagenet256_adm`, scaled as ADM does.
Hardware: sampling runs on a CPU too, at minutes per image; training needs accelerators, in bfloat16.
Expect, with the published weights and 50k samples in 250 steps: FID 10.94; with the classifier at 1.0: 4.59.
Learned variances, linear schedule of 1000 steps, sampled in 250. It has no null label: a classifier guides it.
"""

from cfg_jax.config import adm


def get_config():
    config = adm(256)

    config.model.channels = 256
    config.model.channel_mult = (1, 1, 2, 2, 4, 4)
    config.model.num_blocks = 2
    config.model.head_channels = 64
    config.model.dropout = 0.0

    config.optim.learning_rate = 1e-4

    config.train.batch_size = 256
    config.train.num_steps = 1_980_000

    config.convert.new_attention_order = False
    return config
