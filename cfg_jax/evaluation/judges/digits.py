"""The judge of small data sets: a classifier trained on clean images in seconds.

It is a perceptron, not a convolutional network: it shares nothing with the UNet that it judges, and it trains quickly
on a CPU in one compiled loop (where the gradients of convolutions are slow).
"""

import hashlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfg_jax.diffusion import to_unit_range
from cfg_jax.errors import UserError
from cfg_jax.evaluation.judges import Judge, Outputs

_FEWEST = 5  # images, one of them held out


class Network(nn.Module):
    """Perceptron from images float32 [B, H, W, C] in [-1, 1] to (features [B, 64], logits [B, num_classes])."""

    num_classes: int

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
            x = nn.Dropout(0.3, deterministic=not train)(x)
        features = nn.relu(nn.Dense(64)(x))
        return features, nn.Dense(self.num_classes)(features)


@partial(jax.jit, static_argnames=('num_classes', 'num_steps', 'batch_size'))
def _train(images, labels, key, *, num_classes, num_steps, batch_size=128):
    module = Network(num_classes)
    init_key, key = jax.random.split(key)
    params = module.init(init_key, images[:1])['params']
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps), weight_decay=1e-2)

    def step(carry, step_key):
        params, opt_state = carry
        batch_key, shift_key, dropout_key = jax.random.split(step_key, 3)
        chosen = jax.random.randint(batch_key, (batch_size,), 0, len(images))
        # Shifts by up to one pixel keep the judge from memorising positions.
        dy, dx = jax.random.randint(shift_key, (2,), -1, 2)
        x = jnp.roll(images[chosen], (dy, dx), axis=(1, 2))

        def loss(params):
            _, logits = module.apply({'params': params}, x, train=True, rngs={'dropout': dropout_key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, num_steps))[0][0]


def train(images, labels, num_classes, *, num_steps=2000, seed=0, held_out=0.2):
    """Train the judge on uint8 images [N, H, W, C] and int labels [N]: (parameters, accuracy on the held-out part)."""
    order = np.random.default_rng(seed).permutation(len(images))
    test, rest = np.split(order, [int(held_out * len(images))])
    sizes = {'num_classes': num_classes, 'num_steps': num_steps}
    params = _train(to_unit_range(images[rest]), labels[rest], jax.random.key(seed), **sizes)
    _, logits = judging(params, num_classes)(images[test])
    return params, float(np.mean(np.argmax(logits, axis=1) == labels[test]))


def judging(params, num_classes):
    """Return a function from uint8 images [N, H, W, C] to (features [N, 64], logits [N, num_classes]), numpy."""
    apply = jax.jit(Network(num_classes).apply)
    return lambda images: tuple(np.asarray(out) for out in apply({'params': params}, to_unit_range(images)))


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None):
    """Return the `Judge`, trained for num_steps on four fifths of `data`; does not use weights and mesh.

    Raises UserError for fewer than five images.
    """
    if len(data) < _FEWEST:
        raise UserError(
            f"the judge 'digits' trains on four fifths of the data and needs {_FEWEST} or more images, but there are "
            f'{len(data)} (config.eval.judge).'
        )
    examples = data.batch(np.arange(len(data)))
    params, accuracy = train(examples['image'], examples['label'], num_classes, num_steps=num_steps)
    print(f'judge  accuracy {accuracy:.4f} on the held-out fifth of the images', flush=True)
    digest = hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
    judge = judging(params, num_classes)
    return Judge('digits', f'digits:sha256:{digest[:16]}', lambda images: Outputs(*judge(images)), True)
