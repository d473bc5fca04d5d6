r"""Losses of five recipes on the digits, all of the same network, steps and sampler.

    python -m cfg_jax.main --workdir=runs/digits_v --mode=evaluate --config.eval.variants=configs/variants/losses.py \
        --config.eval.folder=losses --config.eval.num_samples=1000

The runs are those of configs/digits.py, each in its --workdir, with --config.eval.at_end=False and
    runs/digits_v              --config.diffusion.prediction=v --config.loss.target=v
    runs/digits_min_snr        --config.diffusion.prediction=v --config.loss.weighting=min_snr
    runs/digits_sigmoid        --config.diffusion.prediction=v --config.loss.weighting=sigmoid
    runs/digits_logit_normal   --config.diffusion.prediction=v --config.loss.target=v --config.loss.times=logit_normal
    runs/digits_edm            --config.diffusion.prediction=edm --config.loss.weighting=edm --config.loss.times=edm
Cost: eval.num_samples images at each weight of each variant, and a compilation for each variant.
"""

WEIGHTS = {'eval.guidance_weights': (0.0, 0.3)}

VARIANTS = {
    'v': WEIGHTS,
    'v, min-SNR': {**WEIGHTS, 'workdir': 'runs/digits_min_snr'},
    'v, sigmoid': {**WEIGHTS, 'workdir': 'runs/digits_sigmoid'},
    'v, logit-normal times': {**WEIGHTS, 'workdir': 'runs/digits_logit_normal'},
    'EDM': {**WEIGHTS, 'workdir': 'runs/digits_edm'},
}
