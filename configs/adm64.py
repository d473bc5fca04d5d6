r"""ADM's class-conditional ImageNet 64x64 model, 295.9M parameters (Dhariwal & Nichol 2021, tables 4 and 5).

    python -m cfg_jax.main --config=configs/adm64.py --mode=convert \
        --config.convert.path=64x64_diffusion.pt
    python -m cfg_jax.main --config=configs/adm64.py --mode=sample \
        --config.guidance.classifier_weight=1.0 --config.guidance.classifier_workdir=runs/imagenet64_classifier

Data: none to sample with OpenAI's published weights. To train: --mode=prepare with
--config.prepare.path=ILSVRC2012_img_train.tar makes `imagenet64_adm`, scaled as ADM does.
Hardware: sampling runs on a CPU too, at minutes per image; training needs accelerators, in bfloat16.
Expect, with the published weights and 50k samples in 250 steps: FID 2.07, sFID 4.29, precision 0.74, recall 0.63 (the
published samples score 2.61). Classifier guidance makes the FID at this size worse.
Learned variances, cosine schedule of 1000 steps, sampled in 250. It has no null label: a classifier guides it.
"""

from cfg_jax.config import adm


def get_config():
    config = adm(64)

    config.model.channels = 192
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.head_channels = 64
    config.model.dropout = 0.1

    config.optim.learning_rate = 3e-4

    config.train.batch_size = 2048
    config.train.num_steps = 540_000

    config.convert.new_attention_order = True
    return config
