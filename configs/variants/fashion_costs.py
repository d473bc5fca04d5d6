r"""What guidance costs and what it yields on Fashion-MNIST: the teacher's two forwards per step and its students' one.

    python -m cfg_jax.main --workdir=runs/fashion_mnist --mode=evaluate --config.eval.folder=costs \
        --config.eval.variants=configs/variants/fashion_costs.py

runs/fashion_mnist is the teacher. The students are those of configs/fashion_mnist_distilled.py and
configs/fashion_mnist_progressive.py.
Cost: eval.num_samples images at each weight of each variant; on an Intel Xeon with AVX-512, 12 CPU minutes for 10,000
images of the teacher with guidance, half of it without or by the distilled student.
"""

FEW = {
    'workdir': 'runs/fashion_mnist_progressive',
    'sample.sampler': 'ddim',
    'sample.grid': 'u_open',
    'sample.logsnr_min': None,
    'sample.logsnr_max': None,
    'eval.guidance_weights': (0.3, 1.0),
}
WEIGHTS = {'eval.guidance_weights': (0.3, 0.5, 1.0, 4.0)}

VARIANTS = {
    'no guidance': {'eval.guidance_weights': (0.0,)},
    'classifier-free': WEIGHTS,
    'distilled': {**WEIGHTS, 'workdir': 'runs/fashion_mnist_distilled'},
    'progressive, 4 steps': {**FEW, 'sample.num_steps': 4},
    'progressive, 1 step': {**FEW, 'sample.num_steps': 1},
}
