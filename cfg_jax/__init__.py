"""Guided diffusion models in JAX and Flax: classifier-free guidance and classifier guidance.

From Python: `cfg_jax.load`, `train`, `evaluate`, `grid`, `read_config`; see `cfg_jax.api`.
"""

__version__ = '0.1.0'
_OF_API = ('evaluate', 'grid', 'load', 'read_config', 'train', 'Model')


def __getattr__(name):
    """Return what `cfg_jax.api` offers; it is imported at the first use, since it brings JAX."""
    if name in _OF_API:
        from cfg_jax import api

        return getattr(api, name)
    if name == 'UserError':
        from cfg_jax.errors import UserError

        return UserError
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return [*globals(), *_OF_API, 'UserError']
