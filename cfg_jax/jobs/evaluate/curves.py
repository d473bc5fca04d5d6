"""The curves of an evaluation, and the points on them."""

import dataclasses

from cfg_jax import build_sampling
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.evaluation import columns


@dataclasses.dataclass(frozen=True)
class Point:
    """One place of a curve: its two weights, and its name, such as 'w=0.3'."""

    guidance_weight: float
    classifier_weight: float
    name: str


def sweep(config):
    """Return the `Point`s of a curve by increasing weight, and the name of the weight that varies."""
    if config.eval.classifier_weights:
        over, weight = 'classifier_weight', build_sampling.guidance_weight(config)
        pairs = [(weight, each) for each in sorted(set(config.eval.classifier_weights))]
    else:
        over, weight = 'guidance_weight', config.guidance.classifier_weight
        pairs = [(each, weight) for each in sorted(set(config.eval.guidance_weights))]
    symbol = columns.SYMBOLS[over]
    return [Point(*pair, f'{symbol}={pair[over == "classifier_weight"]:g}') for pair in pairs], over


def curves(config):
    """Return a config per curve: every sampler of config.eval.samplers with every number of config.eval.num_steps."""
    configs = []
    for sampler in dict.fromkeys(config.eval.samplers or (config.sample.sampler,)):
        for num_steps in dict.fromkeys(config.eval.num_steps or (config.sample.num_steps,)):
            curve = changed(config, {'sample.sampler': sampler, 'sample.num_steps': num_steps})
            check_config(curve)
            configs.append(curve)
    return configs


def curve_suffix(config):
    """Return the part of a file name that tells one of several curves from the others; '' if there is only one."""
    several = len(config.eval.samplers) > 1 or len(config.eval.num_steps) > 1
    return f'_{config.sample.sampler}{len(build_sampling.sampling_logsnrs(config))}' if several else ''
