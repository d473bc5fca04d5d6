"""Twenty ways to guide one trained model, to be compared in one evaluation: what to move away from, how, and when.

    python -m cfg_jax.main --workdir=runs/digits --mode=evaluate --config.eval.variants=configs/variants/guidance.py \\
        --config.eval.folder=guidance --config.eval.num_samples=2000 --config.eval.guidance_weights='(0.0,0.2,0.5,1.0)'

Each entry of VARIANTS is the name of a curve and what it changes in the config: fields of config.guidance and
config.sample, and the weights of its sweep (eval.guidance_weights, eval.classifier_weights). {} is the config as it is.
At w = 0 all of them are the conditional model, so that its images are drawn once. Intervals and norms are those that
suit 8x8 digits; EARLIER is a checkpoint that configs/digits.py keeps.
Cost: eval.num_samples images at each weight of each variant, and a compilation for each variant.
"""

EARLIER = {'guidance.weak': 'checkpoint', 'guidance.weak_step': 500}
MEDIUM = {'guidance.interval': (-2.0, 4.0)}

VARIANTS = {
    'CFG': {},
    # when
    'interval': MEDIUM,
    'interval of low noise': {'guidance.interval': (0.0, 20.0)},
    'interval of high noise': {'guidance.interval': (-20.0, 0.0)},
    'linear schedule': {'guidance.schedule': 'linear'},
    'cosine schedule': {'guidance.schedule': 'cosine'},
    # how
    'rescale': {'guidance.rule': 'rescale'},
    'APG': {'guidance.rule': 'apg', 'guidance.apg_norm_threshold': 2.0, 'guidance.momentum': -0.5},
    'CFG-Zero star': {'guidance.rule': 'zero_star'},
    'TCFG': {'guidance.rule': 'tangential'},
    'dynamic threshold': {'guidance.rule': 'dynamic_threshold'},
    # its strength is another at each step: see docs/guidance.md
    'CFG++': {'guidance.rule': 'cfgpp', 'eval.guidance_weights': (-0.8, -0.7, -0.6, -0.5)},
    # what from
    'random label': {'guidance.weak': 'random_label'},
    'wrong time': {'guidance.weak': 'time'},
    'attention': {'guidance.weak': 'attention'},
    'earlier checkpoint': EARLIER,
    'earlier checkpoint, no label': {**EARLIER, 'guidance.weak_conditional': False},
    # together
    'APG in an interval': {**MEDIUM, 'guidance.rule': 'apg', 'guidance.momentum': -0.5},
    'random label in an interval': {**MEDIUM, 'guidance.weak': 'random_label'},
    'earlier checkpoint in an interval': {**EARLIER, **MEDIUM},
}
