"""The judge of any labelled data set: a small classifier, trained on its clean images.

Its trunk is a perceptron. Convolutions halve images before it until they have 8 pixels a side or fewer, so the digits'
judge has none and is trained in seconds on a CPU. It shares nothing with the UNet that it judges.
"""

import hashlib
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from cfg_jax import files, metrics
from cfg_jax.data import spread
from cfg_jax.diffusion import to_unit_range
from cfg_jax.errors import UserError
from cfg_jax.evaluation.judges import Judge, Outputs
from cfg_jax.progress import Progress

_FEWEST = 5  # images, one of them held out
_MOST = 2**28  # bytes of images that it is trained on, as uint8; they are kept as float32
_CHUNK = 512  # images that are read at once, and judged at once if they are small
_WIDTH = 16  # channels of the first convolution
_MAPS = 2**28  # bytes of its output for the images that are judged at once
_WAIT = 20  # training steps that are dispatched before the first of them has ended
_SEED, _HELD_OUT = 0, 0.2
_VERSION = 1  # of the network and its training: another one does not read the files of this one


class Network(nn.Module):
    """Classifier of images float32 [B, H, W, C] in [-1, 1]: (features [B, 64], logits [B, num_classes])."""

    num_classes: int

    @nn.compact
    def __call__(self, x, *, train=False):
        width = _WIDTH
        while max(x.shape[1:3]) > 8:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            width *= 2
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
            x = nn.Dropout(0.3, deterministic=not train)(x)
        features = nn.relu(nn.Dense(64)(x))
        return features, nn.Dense(self.num_classes)(features)


# ---------------------------------------------------------------- training


def _optimizer(num_steps):
    return optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps), weight_decay=1e-2)


@partial(jax.jit, static_argnames=('num_classes', 'num_steps', 'batch_size'), donate_argnums=0)
def _step(carry, images, labels, key, *, num_classes, num_steps, batch_size):
    """Take one step. carry: (parameters, state of the optimizer). images: float32 [N, H, W, C]."""
    module, (params, opt_state) = Network(num_classes), carry
    batch_key, shift_key, dropout_key = jax.random.split(key, 3)
    chosen = jax.random.randint(batch_key, (batch_size,), 0, len(images))
    # Shifts by up to one pixel keep the judge from memorising positions.
    dy, dx = jax.random.randint(shift_key, (2,), -1, 2)
    x = jnp.roll(images[chosen], (dy, dx), axis=(1, 2))

    def loss(params):
        _, logits = module.apply({'params': params}, x, train=True, rngs={'dropout': dropout_key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

    updates, opt_state = _optimizer(num_steps).update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(images, labels, num_classes, *, num_steps=2000, seed=_SEED, held_out=_HELD_OUT, batch_size=128):
    """Train the judge on uint8 images [N, H, W, C] and int labels [N]: (parameters, confusion on the held-out part).

    confusion: `metrics.confusion_matrix` of the held-out images.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    test, rest = np.split(order, [int(held_out * len(images))])
    init_key, key = jax.random.split(jax.random.key(seed))
    params = jax.jit(Network(num_classes).init)(init_key, to_unit_range(images[:1]))['params']
    carry, step_keys = (params, _optimizer(num_steps).init(params)), jax.random.split(key, num_steps)
    sizes = {'num_classes': num_classes, 'num_steps': num_steps, 'batch_size': batch_size}
    images_there, labels_there = to_unit_range(images[rest]), jnp.asarray(labels[rest])
    progress = Progress(num_steps, compiles=True)
    with progress.watched('judge  trained for', unit='steps'):
        for number, step_key in enumerate(step_keys, 1):  # not a scan: in loops XLA computes convolutions in one thread
            carry = _step(carry, images_there, labels_there, step_key, **sizes)
            if number % _WAIT == 0 or number == num_steps:
                jax.block_until_ready(carry)
                progress.show(number, 'judge  trained for', unit='steps')
    params = carry[0]
    apply, logits = judging(params, num_classes), np.empty((len(test), num_classes), np.float32)
    chunk = _judged_at_once(images.shape[1:])
    for start in range(0, len(test), chunk):
        rows = slice(start, start + chunk)
        logits[rows] = apply(images[test[rows]])[1]
    return params, metrics.confusion_matrix(logits, labels[test], num_classes)


def _judged_at_once(image_shape):
    """Return a number of images whose features fit in memory: fewer of large images."""
    return int(np.clip(_MAPS // (4 * _WIDTH * np.prod(image_shape[:2])), 1, _CHUNK))


def judging(params, num_classes):
    """Return a function from uint8 images [N, H, W, C] to (features [N, 64], logits [N, num_classes]), numpy."""
    apply = jax.jit(Network(num_classes).apply)
    return lambda images: tuple(np.asarray(out) for out in apply({'params': params}, to_unit_range(images)))


# ---------------------------------------------------------------- the judge


def open_judge(data, num_classes, *, weights='', num_steps=2000, mesh=None, cache=None):
    """Return the `Judge`, trained for num_steps on four fifths of `data`; does not use weights and mesh.

    It is kept in the folder `cache` under a hash of the images and labels, and read from there the next time. Of data
    beyond 256 MiB it sees a part, evenly spread. Raises UserError for fewer than five images.
    """
    if len(data) < _FEWEST:
        raise UserError(
            f"the judge 'trained' trains on four fifths of the data and needs {_FEWEST} or more images, but there are "
            f'{len(data)} (config.eval.judge).'
        )
    images, labels = _read(data)
    digest = hashlib.sha256(f'{_VERSION} {num_classes} {num_steps} {images.shape}'.encode())
    digest.update(images)
    digest.update(labels)
    path = cache and Path(cache) / f'trained_judge_{digest.hexdigest()[:12]}.msgpack'
    kept = path and _load(path)
    if not kept:
        params, counts = train(images, labels, num_classes, num_steps=num_steps)
        kept = {'params': jax.device_get(params), 'confusion': counts}
        if path:
            _save(path, kept)
    params, counts = kept['params'], kept['confusion']
    accuracy = counts.trace() / counts.sum()
    print(f'judge  accuracy {accuracy:.4f} on the {counts.sum():,} images held out from its training', flush=True)
    weights_digest = hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))
    judge = judging(params, num_classes)
    identity = f'trained:sha256:{weights_digest.hexdigest()[:16]}'
    chunk = _judged_at_once(data.image_shape)
    return Judge('trained', identity, lambda images: Outputs(*judge(images)), True, chunk=chunk, confusion=counts)


def _read(data):
    """Return (images uint8 [N, H, W, C], labels int32 [N]) of as much of a source as the judge is trained on."""
    count = min(len(data), max(_MOST // int(np.prod(data.image_shape)), _FEWEST))
    chosen, progress = spread(len(data), count), Progress(count)
    images, labels = np.empty((count, *data.image_shape), np.uint8), np.empty(count, np.int32)
    for start in range(0, count, _CHUNK):
        rows = slice(start, start + _CHUNK)
        batch = data.batch(chosen[rows])
        images[rows], labels[rows] = batch['image'], batch['label']
        progress.show(min(start + _CHUNK, count), 'data  read for the judge')
    return images, labels


def _save(path, kept):
    """Write plain dicts of arrays, after a hash of them."""
    content = serialization.msgpack_serialize(kept)
    files.write(path, hashlib.sha256(content).digest() + content)


def _load(path):
    """Return what `_save` wrote; None if there is no such file, or a damaged one."""
    if not path.is_file():
        return None
    digest, content = (whole := path.read_bytes())[:32], whole[32:]
    return serialization.msgpack_restore(content) if hashlib.sha256(content).digest() == digest else None
