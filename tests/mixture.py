"""Three classes, a round Gaussian each, whose denoisers are exact (CFG paper, figure 2)."""

import jax.numpy as jnp
import numpy as np

from cfg_jax.mixtures import Mixture

NULL = 3
MEANS = jnp.array([[0.0, 0.9], [0.8, -0.5], [-0.8, -0.5]])  # class c is N(MEANS[c], SCALE² I), each a third of the data
SCALE = 0.3
_mixture = Mixture(np.asarray(MEANS), np.stack([SCALE**2 * np.eye(2)] * 3), np.full(3, 1 / 3), np.arange(3))
model, log_posterior = _mixture.model, _mixture.log_prob


def most_likely(x):
    """Return the likeliest class of each x [B, 2]: int [B]."""
    return np.argmax(_mixture.log_posterior(x), axis=1)
