"""Guided diffusion models in JAX and Flax: classifier-free guidance and classifier guidance."""

__version__ = '0.1.0'
