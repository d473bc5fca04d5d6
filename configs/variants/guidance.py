"""Ways to draw with one trained model, to be compared in one evaluation: rules and times of guidance, and solvers.

    python -m cfg_jax.main --workdir=runs/digits --mode=evaluate --config.eval.variants=configs/variants/guidance.py \\
        --config.eval.folder=variants

Each entry of VARIANTS is the name of a curve and what it changes in the config: fields of config.guidance and
config.sample, and the weights of its sweep (eval.guidance_weights, eval.classifier_weights). {} is the config as it is.
Cost: eval.num_samples images at each weight of each variant, and a compilation for each variant.
"""

VARIANTS = {
    'as configured': {},
    'ancestral 16': {'sample.sampler': 'ancestral', 'sample.num_steps': 16},
    'ddim 16': {'sample.sampler': 'ddim', 'sample.num_steps': 16},
    'ddim 32': {'sample.sampler': 'ddim', 'sample.num_steps': 32},
    'ddim 32, eta 1': {'sample.sampler': 'ddim', 'sample.num_steps': 32, 'sample.eta': 1.0},
    'dpmpp_2m 16': {'sample.sampler': 'dpmpp_2m', 'sample.num_steps': 16},
    'apg': {'guidance.rule': 'apg', 'guidance.momentum': -0.5},
    'rescale': {'guidance.rule': 'rescale'},
    'cosine in time': {'guidance.schedule': 'cosine'},
    'interval -3 to 5': {'guidance.interval': (-3.0, 5.0)},
    'random label': {'guidance.weak': 'random_label'},
    'no guidance': {'guidance.function': 'conditional', 'eval.guidance_weights': (0.0,)},
}
