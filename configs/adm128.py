r"""ADM's class-conditional ImageNet 128x128 model, 421.5M parameters (Dhariwal & Nichol 2021, tables 4 and 5).

    python -m cfg_jax.main --config=configs/adm128.py --mode=convert \
        --config.convert.path=128x128_diffusion.pt
    python -m cfg_jax.main --config=configs/adm128.py --mode=sample \
        --config.guidance.classifier_weight=0.5 --config.guidance.classifier_workdir=runs/imagenet128_classifier

Data: none to sample with OpenAI's published weights. To train: --mode=prepare with
--config.prepare.path=ILSVRC2012_img_train.tar makes `imagenet128_adm`, scaled as ADM does.
Hardware: sampling runs on a CPU too, at minutes per image; training needs accelerators, in bfloat16.
Expect, with the published weights and 50k samples in 250 steps: FID 5.91, sFID 5.09, precision 0.70, recall 0.65; with
the classifier at 0.5: 2.97, 5.09, 0.78, 0.59.
Learned variances, linear schedule of 1000 steps, sampled in 250. It has no null label: a classifier guides it.
"""

from cfg_jax.config import adm


def get_config():
    config = adm(128)

    config.model.channels = 256
    config.model.channel_mult = (1, 1, 2, 3, 4)
    config.model.num_blocks = 2
    config.model.num_heads = 4
    config.model.dropout = 0.0

    config.optim.learning_rate = 1e-4

    config.train.batch_size = 256
    config.train.num_steps = 4_360_000

    config.convert.new_attention_order = False
    return config
