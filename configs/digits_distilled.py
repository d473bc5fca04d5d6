r"""A student of the digits' model that takes the guidance weight: guided sampling in one forward per step.

    python -m cfg_jax.main --config=configs/digits.py --config.diffusion.prediction=v --config.loss.target=v \
        --workdir=runs/digits_v
    python -m cfg_jax.main --config=configs/digits_distilled.py

The first command trains the teacher, the second its student: the first stage of Meng et al. 2023.
--config.distill.teacher is the workdir of the teacher.
Hardware: two CPU cores. Cost: 212 CPU seconds on an Intel Xeon with AVX-512; the teacher takes 168.
Expect, over 2,000 images: FID 0.66, 0.58, 0.73, 2.41 at w = 0.1, 0.3, 0.5, 1, where the teacher has 0.78, 0.53, 0.73,
1.97 with twice the evaluations (errors 0.13 to 0.4).
"""

from pathlib import Path

from cfg_jax import config_files


def get_config():
    return config_files.read(
        Path(__file__).with_name('digits.py'),
        {
            'diffusion.prediction': 'v',  # for configs/digits_progressive.py, which goes on from this student
            'loss.target': 'v',
            'loss.p_uncond': 0.0,
            'model.guidance_input': True,
            'guidance.function': 'learned',
            'distill.method': 'guided',
            'distill.teacher': 'runs/digits_v',
            'optim.learning_rate': 1e-3,
            'train.num_steps': 2000,
            'train.keep_every': 0,
        },
    )
