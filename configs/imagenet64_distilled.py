r"""A student of the paper's ImageNet 64x64 model that takes the guidance weight: the first stage of Meng et al. 2023.

    python -m cfg_jax.main --config=configs/imagenet64.py --config.diffusion.prediction=v --workdir=runs/imagenet64_v
    python -m cfg_jax.main --config=configs/imagenet64_distilled.py
    python -m cfg_jax.main --config=configs/imagenet64_distilled.py --mode=sample --config.sample.guidance_weight=0.3

The first command trains the teacher, the second its student, which samples at any w from 0 to 4 with one forward per
step. Few steps are the second stage: --config.distill.method=progressive, with config.distill.rounds (see
configs/digits_progressive.py), --config.loss.weighting=truncated_snr, --config.sample.sampler=ddim,
--config.sample.grid=u_open, --config.sample.num_steps of a round, and the student as the teacher.
Settings are those of the authors' public config: v, the error weighted by SNR (that on eps), no dropout, batch 256,
learning rate 3e-4. It has no fixed number of steps (their later stages start from step 20,000 of a longer run); 100,000
is chosen here.
Hardware: accelerators whose number divides the batch of 256; bfloat16. The teacher's parameters add 1.2 GB to the 4.7
GB of the training state on each.
Cost: not measured. An update computes the teacher's forward on twice the batch beside the student's forward and
backward pass: 5/3 of the FLOPs of ordinary training, 0.27 PFLOP.
Expect: not measured here. The paper reports samples like the teacher's from as few as 4 steps after its second stage.
"""

from pathlib import Path

from cfg_jax import config_files


def get_config():
    return config_files.read(
        Path(__file__).with_name('imagenet64.py'),
        {
            'diffusion.prediction': 'v',
            'model.dropout': 0.0,
            'model.guidance_input': True,
            'guidance.function': 'learned',
            'loss.p_uncond': 0.0,
            'distill.method': 'guided',
            'distill.teacher': 'runs/imagenet64_v',
            'optim.warmup_steps': 0,
            'train.batch_size': 256,
            'train.num_steps': 100_000,
        },
    )
