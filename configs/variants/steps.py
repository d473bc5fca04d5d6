r"""FID over the evaluations of an image: the students of each round of distillation, and their teacher's solvers.

    python -m cfg_jax.main --workdir=runs/digits_progressive --mode=evaluate --config.eval.folder=steps \
        --config.eval.variants=configs/variants/steps.py --config.eval.steps='()' --config.eval.num_samples=5000

runs/digits_progressive is the workdir of configs/digits_progressive.py, and runs/digits_v that of the first teacher,
which evaluates its network twice per step.
Cost: eval.num_samples images for each number of steps of each variant.
"""

W = {'eval.guidance_weights': (0.3,)}
TEACHER = {**W, 'workdir': 'runs/digits_v', 'eval.num_steps': (1, 2, 4, 8, 16, 32)}

VARIANTS = {
    'students, DDIM': {**W, 'eval.num_steps': (1, 2, 4, 8, 16, 32)},
    'teacher, DDIM': {**TEACHER, 'sample.sampler': 'ddim'},
    'teacher, 2M': {
        **TEACHER,
        'sample.sampler': 'dpmpp_2m',
        'sample.grid': 'logsnr',
        'sample.logsnr_min': -9.0,
        'sample.logsnr_max': 9.0,
    },
    'guided student, DDIM': {**W, 'workdir': 'runs/digits_distilled', 'eval.num_steps': (1, 2, 4, 8, 16, 32)},
}
