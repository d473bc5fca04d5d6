r"""What guidance costs and what it yields, each way at its own weights, on models of one size: the digits'.

    python -m cfg_jax.main --workdir=runs/digits_v --mode=evaluate --config.eval.variants=configs/variants/costs.py \
        --config.eval.folder=costs --config.eval.num_samples=5000

runs/digits_v is the teacher, whose command is in configs/digits_distilled.py. The others are trained by that config,
configs/digits_progressive.py, configs/digits_guidance_free.py (--workdir=runs/digits_guidance_free) and, the weak
model, configs/digits_weak.py with --config.diffusion.prediction=v --config.loss.target=v --workdir=runs/digits_weak_v.
Cost: eval.num_samples images at each weight of each variant, and a compilation for each variant.
"""

WEAK = {'guidance.weak': 'checkpoint', 'guidance.weak_workdir': 'runs/digits_weak_v'}
FEW = {'workdir': 'runs/digits_progressive', 'sample.sampler': 'ddim', 'sample.grid': 'u_open'}
WEIGHTS = {'eval.guidance_weights': (0.1, 0.3, 0.5, 1.0)}

VARIANTS = {
    'no guidance': {'eval.guidance_weights': (0.0,)},
    'classifier-free': WEIGHTS,
    'classifier-free in an interval': {**WEIGHTS, 'guidance.interval': (-2.0, 4.0)},
    'autoguidance by a smaller model': {**WEAK, 'eval.guidance_weights': (0.3, 0.5, 1.0, 2.0)},
    'distilled': {**WEIGHTS, 'workdir': 'runs/digits_distilled'},
    'guidance-free training': {**WEIGHTS, 'workdir': 'runs/digits_guidance_free'},
    'progressive, 8 steps': {**FEW, **WEIGHTS, 'sample.num_steps': 8},
    'progressive, 4 steps': {**FEW, **WEIGHTS, 'sample.num_steps': 4},
    'progressive, 1 step': {**FEW, **WEIGHTS, 'sample.num_steps': 1},
}
