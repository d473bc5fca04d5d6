r"""A noisy classifier of the digits, to guide with its gradient: classifier guidance, beside configs/digits.py.

    python -m cfg_jax.main --config=configs/digits_classifier.py
    python -m cfg_jax.main --config=configs/digits.py --mode=evaluate --config.eval.folder=classifier \
        --config.guidance.function=unconditional --config.guidance.classifier_workdir=runs/digits_classifier \
        --config.eval.classifier_weights='(0.0,1.0,2.0,4.0)' --config.eval.compare_with=.

Hardware: two CPU cores. Cost: 45 seconds, and 80 for the four weights.
Expect accuracy 0.21, 0.59, 0.92, 0.997 in the quarters of λ, the noisiest first; guiding the unconditional digits at
weights 0, 1, 2, 4: IS 7.50, 7.52, 8.50, 8.97, accuracy 0.10, 0.75, 0.92, 0.95, FID 11.0, 11.5, 5.5, 3.5.
"""

from cfg_jax.config import default


def get_config():
    config = default()

    config.model.kind = 'classifier'
    config.model.channels = 16
    config.model.channel_mult = (1, 2)
    config.model.attention_resolutions = (4,)
    config.model.num_heads = 2
    config.model.num_groups = 8

    config.optim.name = 'adamw'
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.05
    config.optim.decay = 'cosine'
    config.optim.warmup_steps = 100
    config.optim.ema_decay = 0.0  # what guides is the parameters themselves

    config.train.batch_size = 64
    config.train.num_steps = 1500
    config.train.log_every = 100
    config.train.checkpoint_every = 500
    return config
