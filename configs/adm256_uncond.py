r"""ADM's unconditional ImageNet 256x256 diffusion model (Dhariwal & Nichol 2021, table 4).

    python -m cfg_jax.main --config=configs/adm256_uncond.py --mode=convert \
        --config.convert.path=256x256_diffusion_uncond.pt
    python -m cfg_jax.main --config=configs/adm256_uncond.py --mode=sample --config.guidance.classifier_weight=10 \
        --config.guidance.classifier_workdir=runs/imagenet256_classifier

Data, Hardware: as configs/adm256.py.
Expect classes only with the classifier: at the scale 10 that the paper uses.
"""

import runpy
from pathlib import Path

conditional = runpy.run_path(str(Path(__file__).with_name('adm256.py')))['get_config']


def get_config():
    config = conditional()
    config.model.labels = 'none'
    config.guidance.function = 'unconditional'
    return config
