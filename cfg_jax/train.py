"""The training job: one loop, from top to bottom."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

from cfg_jax import build, figures, optim, sampling, sharding
from cfg_jax.checkpoints import Checkpoints
from cfg_jax.errors import UserError
from cfg_jax.train_state import TrainState
from cfg_jax.writers import MetricWriter, Progress


def identity(config):
    """The part of the config that a resumed run shares with the one it resumes, as a nested dict of plain values.

    How long it runs, where the data lies, how it is read, logged and sampled may change.
    """
    plain = config.to_dict()
    data = {key: plain['data'][key] for key in ('source', 'name', 'split', 'flip')}
    model = {key: value for key, value in plain['model'].items() if key != 'remat'}
    update = {key: plain['train'][key] for key in ('batch_size', 'accumulation_steps')}
    rest = {section: plain[section] for section in ('seed', 'diffusion', 'loss', 'optim')}
    return {**rest, 'data': data | build.model_identity(config)['data'], 'model': model, 'train': update}


def quarter_edges(config):
    """λ at u = 1/4, 1/2, 3/4: the edges of four quarters that training draws equally often. Increasing."""
    return build.schedule(config)(jnp.array([0.75, 0.5, 0.25]))


def make_train_step(config):
    """(state, {'image', 'label'}, key) -> (state, metrics). key: the run's; the step's is fold_in(key, state.step).

    metrics: 'loss' and 'grad_norm' scalars; sums and counts [4] by quarter of λ, [2] by conditional/null label.
    """
    loss_fn, optimizer, edges = build.loss(config), build.optimizer(config), quarter_edges(config)
    parts = config.train.accumulation_steps

    def mean_loss(params, images, labels, key):
        per_image = loss_fn(params, build.to_unit_range(images), labels, key)
        return per_image.loss.mean(), per_image

    def loss_and_gradients(params, images, labels, key):
        (_, per_image), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params, images, labels, key)
        return per_image, gradients

    def accumulated(params, images, labels, key):
        # Part p is every parts-th image: each device keeps the images that it has.
        strided = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (images, labels))

        def body(total, part):
            index, (images, labels) = part
            per_image, gradients = loss_and_gradients(params, images, labels, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, gradients), per_image

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, per_image = jax.lax.scan(body, zeros, (jnp.arange(parts), strided))
        return jax.tree.map(jnp.ravel, per_image), jax.tree.map(lambda g: g / parts, total)

    def train_step(state, batch, key):
        gradients_of = loss_and_gradients if parts == 1 else accumulated
        step_key = jax.random.fold_in(key, state.step)
        per_image, gradients = gradients_of(state.params, batch['image'], batch['label'], step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        quarters = jax.nn.one_hot(jnp.searchsorted(edges, per_image.logsnr), 4)
        kinds = jax.nn.one_hot(per_image.dropped.astype(jnp.int32), 2)
        metrics = {
            'loss': per_image.loss.mean(),
            'grad_norm': optax.tree.norm(gradients),
            'quarter_sums': _sums(quarters, per_image.loss),
            'quarter_counts': quarters.sum(0),
            'kind_sums': _sums(kinds, per_image.loss),
            'kind_counts': kinds.sum(0),
        }
        ema_params = optim.ema(state.ema_params, params, config.optim.ema_decay)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def _sums(membership, loss):
    # where, not a product: one NaN loss must not spread to the other groups
    return jnp.where(membership > 0, loss[:, None], 0.0).sum(0)


def summarise(collected):
    """The means of a list of steps' metrics, as {name: float}; NaN where a group saw no image."""
    total = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *collected)
    with np.errstate(invalid='ignore'):
        quarters = total['quarter_sums'] / total['quarter_counts']
        conditional, null = total['kind_sums'] / total['kind_counts']
    return {
        'loss': total['loss'] / len(collected),
        'grad_norm': total['grad_norm'] / len(collected),
        **{f'loss_logsnr_q{i + 1}': value for i, value in enumerate(quarters)},
        'loss_conditional': conditional,
        'loss_null': null,
    }


def check_finite(config, step, metrics, checkpoints):
    """Raises UserError with the step, the quarter of λ and the last good checkpoint if the loss is not finite."""
    if np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm']):
        return
    edges = [config.diffusion.logsnr_min, *quarter_edges(config).tolist(), config.diffusion.logsnr_max]
    bad = [
        f'{low:.3g} to {high:.3g}'
        for low, high, value in zip(edges[:-1], edges[1:], metrics['quarter_sums'])
        if not np.isfinite(value)
    ]
    what = f'loss is not finite at λ in {" and ".join(bad)}' if bad else 'gradient is not finite'
    last = checkpoints.latest_step()
    kept = 'no checkpoint was saved yet' if last is None else f'the last good checkpoint is {checkpoints.path(last)}'
    raise UserError(
        f'step {step}: the {what}; {kept}. Lower config.optim.learning_rate or config.optim.clip_norm, '
        "or compute in config.model.dtype='float32'."
    )


def run(config, workdir):
    """Trains in `workdir` up to config.train.num_steps, from its newest checkpoint if it has one."""
    build.check(config)
    workdir = Path(workdir)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, config.train.accumulation_steps, mesh)
    source = build.source(config)
    batches = build.train_batches(config, source)
    optimizer, key = build.optimizer(config), jax.random.key(config.seed)

    def init():
        init_key, _ = jax.random.split(key)
        return TrainState.create(build.init_params(config, init_key), optimizer)

    whole = sharding.replicated(mesh)
    abstract_state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), jax.eval_shape(init)
    )
    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        identity(config),
        class_names=source.class_names,
        keep=config.train.keep_checkpoints,
    )
    restored = checkpoints.restore(abstract_state, batches)
    state, first_step = (restored.tree, restored.step) if restored else (jax.jit(init, out_shardings=whole)(), 0)
    if restored:
        print(f'resuming from {checkpoints.path(first_step)}', flush=True)
    else:
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    print(f'{parameter_overview.count_parameters(state.params):,} parameters, {len(source):,} images, '
          f'{mesh.size} {jax.devices()[0].platform} devices', flush=True)  # fmt: skip

    train_step = jax.jit(make_train_step(config), donate_argnums=0)
    _, step_key = jax.random.split(key)
    rate_at = build.learning_rate(config)
    draw_grid = grid_drawer(config, mesh, source.class_names, workdir)
    writer = MetricWriter(workdir, first_step)
    progress, collected = Progress(config.train.num_steps, first_step), []

    def log(step):
        values = summarise(collected)
        steps_per_second, left = progress.rate(step)
        values |= {
            'images_per_second': steps_per_second * config.train.batch_size,
            'learning_rate': float(rate_at(step - 1)),
        }
        writer.scalars(step, values)
        print(
            f'step {step}/{config.train.num_steps}  loss {values["loss"]:.4f}  '
            f'{values["images_per_second"]:.0f} images/s  {left} left',
            flush=True,
        )
        collected.clear()

    def collect(step, metrics):
        metrics = jax.device_get(metrics)
        check_finite(config, step, metrics, checkpoints)
        collected.append(metrics)
        if step % config.train.log_every == 0 or step == config.train.num_steps:
            log(step)

    try:
        pending = None  # the metrics of the step before, fetched once the next one is on its way
        for step in range(first_step + 1, config.train.num_steps + 1):
            batch = sharding.to_devices(next(batches), mesh)
            state, metrics = train_step(state, batch, step_key)
            if pending is not None:
                collect(*pending)
            pending = step, metrics
            last = step == config.train.num_steps
            if last or step % config.train.checkpoint_every == 0:
                collect(*pending)  # only a state whose loss was finite is saved
                pending = None
                checkpoints.save(step, state, batches)
            if config.train.grid_every and (last or step % config.train.grid_every == 0):
                writer.image(step, 'samples', draw_grid(step, state.ema_params))
    finally:
        checkpoints.close()
        writer.close()
    return state


def grid_drawer(config, mesh, class_names, workdir):
    """(step, ema_params) -> uint8 picture, also written to workdir/samples: the same noise and labels every time."""
    sample = sampling.image_batches(config, mesh)
    # All classes, or as many, evenly spread, as give a square picture.
    rows = min(len(class_names), max(math.isqrt(config.train.grid_images), 1))
    ids = np.linspace(0, len(class_names) - 1, rows).round().astype(int)
    labels = np.resize(ids, config.train.grid_images)

    def draw(step, ema_params):
        images = np.concatenate(list(sample(ema_params, labels, build.guidance_weight(config), config.sample.seed)))
        picture = figures.class_grid(images, labels)
        figures.save_png(workdir / 'samples' / f'step_{step:08d}.png', picture)
        return picture

    return draw
