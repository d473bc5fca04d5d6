r"""FID over the evaluations of an image on Fashion-MNIST: the students of each round, and their teacher's solvers.

    python -m cfg_jax.main --workdir=runs/fashion_mnist_progressive --mode=evaluate --config.eval.folder=steps \
        --config.eval.variants=configs/variants/fashion_steps.py --config.eval.steps='()' --config.eval.num_samples=3000

runs/fashion_mnist_progressive is the workdir of configs/fashion_mnist_progressive.py, and runs/fashion_mnist that of
the first teacher, which evaluates its network twice per step.
Cost: eval.num_samples images for each number of steps of each variant.
"""

STEPS = {'eval.guidance_weights': (0.3,), 'eval.num_steps': (1, 2, 4, 8, 16)}
TEACHER = {**STEPS, 'workdir': 'runs/fashion_mnist'}

VARIANTS = {
    'students, DDIM': STEPS,
    'teacher, DDIM': {**TEACHER, 'sample.sampler': 'ddim'},
    'teacher, 2M': {
        **TEACHER,
        'sample.sampler': 'dpmpp_2m',
        'sample.grid': 'logsnr',
        'sample.logsnr_min': -9.0,
        'sample.logsnr_max': 9.0,
    },
}
