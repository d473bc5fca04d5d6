"""The names of the modules of the mathematics, in one place for the tests that treat them alike."""

MATHEMATICS = (
    *('schedules', 'diffusion', 'denoisers', 'guidance', 'samplers', 'losses', 'distillation', 'metrics', 'mixtures'),
    'phema',
)
