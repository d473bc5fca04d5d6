"""Mixtures of Gaussians with classes: data whose score, posterior, samples and guided target are known at every λ.

A `Mixture` is a model (z, λ, labels) -> Prediction and a classifier (z, λ, labels) -> log p(c | z, λ), so that every
guidance and every sampler takes it. z is [B, D], or images [B, H, W, C] of D = H W C values. λ is a scalar or [B];
λ = inf stands for the data themselves. Labels are 0 .. num_classes - 1; num_classes is the null label, which means the
whole mixture. Equations are the CFG paper's.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import diffusion
from cfg_jax.diffusion import Prediction
from cfg_jax.typing import Array, Float, Int, Integer, Key, PerImage, Real, Scalar

LabelOrLabels = int | Integer[Array, ''] | Integer[Array, ' B'] | None  # one for all, one each, or None: the null label


class WeightedSamples(NamedTuple):
    """Samples x of one distribution that stand for another one by their weights: log of them, up to a constant."""

    x: Float[Array, 'N D']
    log_weights: Float[Array, ' N']

    @property
    def normalised(self) -> Float[Array, ' N']:
        """The weights, which sum to 1."""
        return jax.nn.softmax(self.log_weights)

    @property
    def effective_size(self) -> Float[Array, '']:
        """(Σ w)² / Σ w²: about as many samples of the other distribution would be as good."""
        return 1.0 / jnp.sum(self.normalised**2)

    def mean(self, values: Float[Array, ' N *S']) -> tuple[Float[Array, '*S'], Float[Array, '*S']]:
        """Return (the mean of values under the other distribution, its standard error). values: one for each x."""
        weights = diffusion.broadcast_to_images(self.normalised, values)
        mean = jnp.sum(weights * values, axis=0)
        return mean, jnp.sqrt(jnp.sum((weights * (values - mean)) ** 2, axis=0))

    def resample(self, key: Key[Array, ''], n: int) -> Float[Array, 'n D']:
        """Draw n of the samples with replacement, by weight: approximately samples of the other distribution."""
        return jax.random.choice(key, self.x, (n,), p=self.normalised)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The data p(x) = Σ_k w_k N(μ_k, Σ_k), where component k belongs to class labels[k].

    weights: positive; they are scaled to sum to 1. labels: every class 0 .. n-1 at least once. Covariances have to be
    symmetric and positive definite. A pytree, whose labels are static. Raises ValueError for anything else.
    """

    means: Real[Array, '...']  # [K, D]; shapes are checked below, with errors that say more
    covariances: Real[Array, '...']  # [K, D, D]
    weights: Real[Array, '...']  # [K]
    labels: Real[Array, '...']  # int [K]
    # Σ_k = axes_k diag(variances_k) axes_kᵀ; so is every alpha² Σ_k + sigma² I, with other variances
    axes: Float[Array, 'K D D'] = dataclasses.field(init=False, repr=False)
    variances: Float[Array, 'K D'] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        means, covariances, weights, labels = _checked(self.means, self.covariances, self.weights, self.labels)
        variances, axes = np.linalg.eigh(covariances)
        for k, least in enumerate(variances.min(axis=1)):
            if least <= 1e-12 * variances[k].max():
                raise ValueError(f'covariances[{k}] is not positive definite: its least eigenvalue is {least:.3g}')
        fields = {'means': means, 'covariances': covariances, 'weights': weights, 'axes': axes, 'variances': variances}
        for name, value in fields.items():
            object.__setattr__(self, name, np.float32(value))
        object.__setattr__(self, 'labels', labels)

    def tree_flatten(self):
        names = ('means', 'covariances', 'weights', 'axes', 'variances')
        return [getattr(self, name) for name in names], tuple(self.labels.tolist())

    @classmethod
    def tree_unflatten(cls, labels, arrays):
        mixture = object.__new__(cls)
        for name, value in zip(('means', 'covariances', 'weights', 'axes', 'variances'), arrays):
            object.__setattr__(mixture, name, value)
        object.__setattr__(mixture, 'labels', np.int32(labels))
        return mixture

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def null_label(self) -> int:
        """The label of the whole mixture, num_classes."""
        return self.num_classes

    @property
    def dimensions(self) -> int:
        """D."""
        return self.means.shape[1]

    # ------------------------------------------------------------ p(x | c) = Σ_k w_k N(μ_k, Σ_k), over k of class c

    def class_weights(self, label: int | None = None) -> Float[Array, ' K']:
        """Return each component's share of class `label`, of all for None or the null label."""
        return self._shares()[self._row(label)]

    def moments(
        self, label: int | None = None, logsnr: Scalar = math.inf
    ) -> tuple[Float[Array, ' D'], Float[Array, 'D D']]:
        """Return (mean, covariance) of p(z_λ | label), of all classes for None."""
        alpha, sigma = diffusion.alpha_sigma(jnp.float32(logsnr))
        shares = self.class_weights(label)
        mean = shares @ self.means
        apart = self.means - mean
        covariance = jnp.einsum('k,kde->de', shares, self.covariances + apart[:, :, None] * apart[:, None, :])
        return alpha * mean, alpha**2 * covariance + sigma**2 * jnp.eye(self.dimensions)

    def sample_with_labels(self, key: Key[Array, ''], n: int) -> tuple[Float[Array, 'n D'], Int[Array, ' n']]:
        """Draw n samples of p(x) and their classes."""
        return self._draw(key, n, None)

    def sample(self, key: Key[Array, ''], n: int, label: LabelOrLabels = None) -> Float[Array, 'n D']:
        """Draw n samples of p(x | label), of p(x) for None. label: one for all, or one for each."""
        return self._draw(key, n, label)[0]

    def _draw(self, key, n, label):
        component_key, noise_key = jax.random.split(key)
        log_shares = jnp.broadcast_to(jnp.log(self._shares()[self._row(label)]), (n, len(self.weights)))
        component = jax.random.categorical(component_key, log_shares)
        noise = jax.random.normal(noise_key, (n, self.dimensions)) * jnp.sqrt(jnp.asarray(self.variances)[component])
        x = jnp.asarray(self.means)[component] + jnp.einsum('ndi,ni->nd', jnp.asarray(self.axes)[component], noise)
        return x, jnp.asarray(self.labels)[component]

    # ------------------------------------------------------------ p(z | c) = Σ_k w_k N(α μ_k, α² Σ_k + σ² I)

    def log_density(
        self, z: Float[Array, ' B *D'], logsnr: PerImage = math.inf, label: LabelOrLabels = None
    ) -> Float[Array, ' B']:
        """Return log p(z_λ | label), of p(z_λ) for None, in nats."""
        flat, logsnr = self._flat(z, logsnr)
        of_noise = -0.5 * jnp.sum(flat**2, axis=1) - 0.5 * self.dimensions * math.log(2.0 * math.pi)
        log_shares = jnp.log(self._shares()[self._row(label)])
        return of_noise + jax.nn.logsumexp(self._log_ratios(flat, logsnr) + log_shares, axis=1)

    def score(
        self, z: Float[Array, ' B *D'], logsnr: PerImage = math.inf, label: LabelOrLabels = None
    ) -> Float[Array, ' B *D']:
        """Return ∇_z log p(z_λ | label), of p(z_λ) for None."""
        flat, logsnr = self._flat(z, logsnr)
        distance, variance = self._in_axes(flat, logsnr)
        of_each = -jnp.einsum('bki,kdi->bkd', distance / variance, self.axes)
        return jnp.einsum('bk,bkd->bd', self._responsibilities(flat, logsnr, label), of_each).reshape(z.shape)

    def expected_x(
        self, z: Float[Array, ' B *D'], logsnr: PerImage, label: LabelOrLabels = None
    ) -> Float[Array, ' B *D']:
        """Return E[x | z_λ, label], without a label for None."""
        flat, logsnr = self._flat(z, logsnr)
        distance, variance = self._in_axes(flat, logsnr)
        alpha, _ = diffusion.alpha_sigma(logsnr[:, None, None])
        of_each = self.means + jnp.einsum('bki,kdi->bkd', alpha * self.variances * distance / variance, self.axes)
        return jnp.einsum('bk,bkd->bd', self._responsibilities(flat, logsnr, label), of_each).reshape(z.shape)

    # ------------------------------------------------------------ section 2: eps(z, λ, c) = -sigma ∇_z log p(z | c)

    def model(self, z: Float[Array, ' B *D'], logsnr: PerImage, labels: LabelOrLabels) -> Prediction:
        """Return the exact eps of p(z_λ | label): what a network that has learned everything would predict.

        In the noisier half it is (z - alpha E[x | z]) / sigma, which keeps the digits that guidance subtracts.
        """
        of_images = diffusion.broadcast_to_images(self._flat(z, logsnr)[1], z)
        alpha, sigma = diffusion.alpha_sigma(of_images)
        noisy = of_images < 0.0
        of_x = (z - alpha * self.expected_x(z, logsnr, labels)) / jnp.where(noisy, sigma, 1.0)
        return Prediction(jnp.where(noisy, of_x, -sigma * self.score(z, logsnr, labels)))

    # ------------------------------------------------------------ section 3.1: p(c | z) = p(z | c) p(c) / p(z)

    def log_posterior(self, z: Float[Array, ' B *D'], logsnr: PerImage = math.inf) -> Float[Array, 'B C']:
        """Return log p(c | z_λ) of every class."""
        flat, logsnr = self._flat(z, logsnr)
        logits = self._log_ratios(flat, logsnr) + jnp.log(self.weights)
        # the greatest is subtracted before the sums, so that log p near 0 keeps its digits
        logits = logits - jax.lax.stop_gradient(logits.max(axis=1, keepdims=True))
        by_class = jnp.where(self._members()[:-1], logits[:, None], -jnp.inf)
        return jax.nn.logsumexp(by_class, axis=2) - jax.nn.logsumexp(logits, axis=1)[:, None]

    def log_prob(self, z: Float[Array, ' B *D'], logsnr: PerImage, labels: LabelOrLabels) -> Float[Array, ' B']:
        """Return log p(label | z_λ) of each image: the exact classifier of noisy images; 0 for the null label."""
        every = self.log_posterior(z, logsnr)
        every = jnp.concatenate([every, jnp.zeros_like(every[:, :1])], axis=1)
        rows = jnp.broadcast_to(jnp.asarray(self._row(labels)), every.shape[:1])
        return jnp.take_along_axis(every, rows[:, None], axis=1)[:, 0]

    # ------------------------------------------------------------ section 3.1: the guided target p(x | c) p(c | x)^w

    def target_log_density(
        self, z: Float[Array, ' B *D'], label: LabelOrLabels, weight: PerImage, logsnr: PerImage = math.inf
    ) -> Float[Array, ' B']:
        """Return log p(z_λ | c) + w log p(c | z_λ), not normalised. Its gradient is the guided score of eq. 6."""
        return self.log_density(z, logsnr, label) + weight * self.log_prob(z, logsnr, label)

    def target_samples(self, key: Key[Array, ''], n: int, label: int, weight: Scalar) -> WeightedSamples:
        """Draw n samples of p(x | c), whose weights p(c | x)^w make them samples of the target at the data."""
        x = self.sample(key, n, label)
        return WeightedSamples(x, weight * self.log_prob(x, math.inf, label))

    def target_normaliser(
        self, key: Key[Array, ''], n: int, label: int, weight: Scalar
    ) -> tuple[Float[Array, ''], Float[Array, '']]:
        """Return (∫ p(x | c) p(c | x)^w dx, its standard error), by n samples."""
        values = jnp.exp(self.target_samples(key, n, label, weight).log_weights)
        return values.mean(), values.std() / math.sqrt(n)

    def target_mass(
        self, key: Key[Array, ''], n: int, label: int, weight: Scalar
    ) -> tuple[Float[Array, ' C'], Float[Array, ' C']]:
        """Return (the target's mass where each class is the likeliest, its standard error), by n weighted samples."""
        samples = self.target_samples(key, n, label, weight)
        likeliest = jnp.argmax(self.log_posterior(samples.x), axis=1)
        return samples.mean(jax.nn.one_hot(likeliest, self.num_classes))

    # ------------------------------------------------------------ the parts of these sums, one for each component

    def _flat(self, z, logsnr):
        """Return (z as [B, D], λ as [B])."""
        size = math.prod(z.shape[1:])
        if size != self.dimensions:
            raise ValueError(f'z has shape {tuple(z.shape)}; a mixture in {self.dimensions} dimensions takes z [B, *D] '
                             f'whose *D has {self.dimensions} values')  # fmt: skip
        return z.reshape(len(z), size), jnp.broadcast_to(jnp.asarray(logsnr, jnp.float32), z.shape[:1])

    def _members(self):
        """Return which component belongs to which label, bool [C + 1, K]; all to the null label, the last row."""
        of_class = np.arange(self.num_classes)[:, None] == self.labels
        return np.concatenate([of_class, np.ones_like(of_class[:1])])

    def _shares(self):
        """Return the share of each component in each label, the null label last: [C + 1, K]."""
        shares = jnp.where(self._members(), jnp.asarray(self.weights), 0.0)
        return shares / shares.sum(axis=1, keepdims=True)

    def _row(self, label):
        """Return the label as a number of `_members`' rows; ValueError if it is known and is none."""
        if label is None:
            return self.null_label
        if not isinstance(label, jax.core.Tracer):
            known = np.asarray(label)  # numpy, since within jit jnp would trace the comparison
            if not np.all((known >= 0) & (known <= self.null_label)):
                allowed = f'0 to {self.num_classes - 1}, and {self.null_label} for the whole mixture'
                raise ValueError(f'label is {label}; allowed: {allowed}')
        return label

    def _in_axes(self, z, logsnr):
        """Return (z - alpha μ_k along the component's axes, the variances of z along them), [B, K, D] each."""
        alpha, sigma = diffusion.alpha_sigma(logsnr[:, None, None])
        apart = z[:, None] - alpha * self.means
        return jnp.einsum('bkd,kdi->bki', apart, self.axes), alpha**2 * self.variances + sigma**2

    def _log_ratios(self, z, logsnr):
        """Return log N(z; alpha μ_k, alpha² Σ_k + sigma² I) - log N(z; 0, I) of each component, [B, K].

        Near pure noise the two are almost equal; there the difference is summed from terms that vanish with alpha.
        """
        distance, variance = self._in_axes(z, logsnr)
        alpha, _ = diffusion.alpha_sigma(logsnr[:, None, None])
        along = jnp.einsum('bd,kdi->bki', z, self.axes)
        mean = alpha * jnp.einsum('kd,kdi->ki', self.means, self.axes)
        excess = jnp.maximum(alpha**2 * (self.variances - 1.0), -0.5)  # variance - 1, above -1/2 where it is used
        noisy = jnp.log1p(excess) - (excess * along**2 + 2.0 * along * mean - mean**2) / variance
        clean = jnp.log(variance) + distance**2 / variance - along**2
        return -0.5 * jnp.sum(jnp.where(logsnr[:, None, None] < 0.0, noisy, clean), axis=2)

    def _responsibilities(self, z, logsnr, label):
        """Return p(k | z, label) of each component, [B, K]."""
        return jax.nn.softmax(self._log_ratios(z, logsnr) + jnp.log(self._shares()[self._row(label)]), axis=1)


def _checked(means, covariances, weights, labels):
    """Return the fields of a `Mixture` as float64 arrays and int32 labels; ValueError if they do not fit together."""
    means, covariances, weights = (np.asarray(value, np.float64) for value in (means, covariances, weights))
    labels = np.asarray(labels)
    if means.ndim != 2 or not means.size:
        raise ValueError(f'means have shape {means.shape}; they must be [K, D], one for each component')
    K, D = means.shape
    for name, value, shape in (
        ('covariances', covariances, (K, D, D)), ('weights', weights, (K,)), ('labels', labels, (K,))
    ):  # fmt: skip
        if value.shape != shape:
            raise ValueError(f'{name} have shape {value.shape}; for means of {means.shape} it must be {shape}')
    for name, value in (('means', means), ('covariances', covariances), ('weights', weights)):
        if not np.isfinite(value).all():
            raise ValueError(f'{name} are not all finite')
    if not (weights > 0.0).all():
        raise ValueError(f'weights are {weights.tolist()}; they must be positive')
    classes = np.unique(labels)
    if not np.issubdtype(labels.dtype, np.integer) or not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(f'labels are {labels.tolist()}; they must be whole numbers, each of 0 .. n-1 at least once')
    for k, covariance in enumerate(covariances):
        if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-7 * np.abs(covariance).max()):
            raise ValueError(f'covariances[{k}] is not symmetric')
    return means, 0.5 * (covariances + covariances.swapaxes(1, 2)), weights / weights.sum(), np.int32(labels)


def star(num_classes: int, *, radii: Sequence[float] = (1.0,), std: float = 0.35, dimensions: int = 2) -> Mixture:
    """Return classes on rays around the origin, each with a round Gaussian at each of the radii, all alike.

    With one radius and three classes this is the CFG paper's figure 2. Class 0 points up, the others follow clockwise,
    in the first two of the dimensions.
    """
    angles = np.pi / 2.0 - 2.0 * np.pi * np.repeat(np.arange(num_classes), len(radii)) / num_classes
    K = len(angles)
    means = np.zeros((K, dimensions))
    means[:, :2] = np.tile(radii, num_classes)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    covariances = np.broadcast_to(std**2 * np.eye(dimensions), (K, dimensions, dimensions))
    return Mixture(means, covariances, np.full(K, 1.0 / K), np.repeat(np.arange(num_classes), len(radii)))
