"""The training job: one loop, from top to bottom."""

import contextlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

from cfg_jax import build, files
from cfg_jax.checks import check_config, check_judge
from cfg_jax.config import default
from cfg_jax.data.sources import spread
from cfg_jax.distributed import processes
from cfg_jax.distributed.job import Preempted, the_job
from cfg_jax.errors import UserError
from cfg_jax.evaluation import figures
from cfg_jax.progress import Progress
from cfg_jax.sampling import generate
from cfg_jax.training import optim, sharding
from cfg_jax.training.checkpoints import Checkpoints, config_differences
from cfg_jax.training.train_state import TrainState
from cfg_jax.training.writers import MetricWriter, SilentWriter

_LOCK_SECONDS = 120  # longer than a file server remembers a machine that is gone


def quarter_edges(config):
    """λ at u = 1, 3/4, 1/2, 1/4, 0: [5], the edges of four quarters that training draws equally often. Increasing."""
    return build.schedule(config)(jnp.array([1.0, 0.75, 0.5, 0.25, 0.0]))


def make_train_step(config, mesh=None):
    """(state, {'image', 'label'}, key) -> (state, metrics). key: the run's; the step's is fold_in(key, state.step).

    metrics: scalars, of the step but for 'param_norm', which is of the parameters after it; sums and counts [4] by
    quarter of λ, [2] by conditional/null label. mesh: where a state lies that is split by config.train.fsdp; its
    parameters are gathered for the network, and the gradients split like them.
    """
    loss_fn, optimizer, edges = build.loss(config), build.optimizer(config), quarter_edges(config)
    rate_at, parts = build.learning_rate(config), config.train.accumulation_steps

    def constrained(tree, fsdp):
        """The same numbers, whole on every device or split as a state is."""
        if mesh is None or not config.train.fsdp:
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding.state_shardings(tree, mesh, fsdp))

    def mean_loss(params, images, labels, key):
        per_image = loss_fn(params, build.to_unit_range(images), labels, key)
        return per_image.loss.mean(), per_image

    def loss_and_gradients(params, images, labels, key):
        whole = constrained(params, fsdp=False)
        (_, per_image), gradients = jax.value_and_grad(mean_loss, has_aux=True)(whole, images, labels, key)
        return per_image, constrained(gradients, fsdp=True)

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
        quarters = jax.nn.one_hot(jnp.searchsorted(edges[1:-1], per_image.logsnr), 4)
        kinds = jax.nn.one_hot(per_image.dropped.astype(jnp.int32), 2)
        metrics = {
            'loss': per_image.loss.mean(),
            'grad_norm': optax.tree.norm(gradients),
            'param_norm': optax.tree.norm(params),
            'learning_rate': rate_at(state.step),
            'quarter_sums': _sums(quarters, per_image.loss),
            'quarter_counts': quarters.sum(0),
            'kind_sums': _sums(kinds, per_image.loss),
            'kind_counts': kinds.sum(0),
        }
        if per_image.correct is not None:
            metrics['quarter_correct'] = _sums(quarters, per_image.correct)
        ema_params = optim.ema(state.ema_params, params, config.optim.ema_decay)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def sharded(config, mesh):
    """(init, abstract state, training step), jitted for the devices of `mesh`, which need not be there.

    init: () -> the first state. abstract state: its shapes, dtypes and shardings, by config.train.fsdp. The step is
    that of `make_train_step`; it donates the state.
    """
    init_key, _ = jax.random.split(build.training_key(config))
    optimizer = build.optimizer(config)

    def init():
        return TrainState.create(build.init_params(config, init_key), optimizer)

    shapes = jax.eval_shape(init)
    shardings = sharding.state_shardings(shapes, mesh, config.train.fsdp)
    step = jax.jit(
        make_train_step(config, mesh), donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))
    )
    return jax.jit(init, out_shardings=shardings), sharding.abstract(shapes, shardings), step


def _sums(membership, loss):
    # where, not a product: one NaN loss must not spread to the other groups
    return jnp.where(membership > 0, loss[:, None], 0.0).sum(0)


def summarise(collected):
    """The means of a list of steps' metrics, as {name: float}; NaN where a group saw no image."""
    total = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *collected)
    with np.errstate(invalid='ignore'):
        quarters = total['quarter_sums'] / total['quarter_counts']
        conditional, null = total['kind_sums'] / total['kind_counts']
        correct = total['quarter_correct'] / total['quarter_counts'] if 'quarter_correct' in total else []
    return {
        **{key: total[key] / len(collected) for key in ('loss', 'grad_norm', 'param_norm', 'learning_rate')},
        **{f'loss_logsnr_q{i + 1}': value for i, value in enumerate(quarters)},
        **{f'accuracy_logsnr_q{i + 1}': value for i, value in enumerate(correct)},
        **({} if 'quarter_correct' in total else {'loss_conditional': conditional, 'loss_null': null}),
    }


def check_finite(config, step, metrics, checkpoints):
    """Raises UserError with the step, the quarter of λ and the last good checkpoint if a number is not finite."""
    if all(np.isfinite(metrics[key]) for key in ('loss', 'grad_norm', 'param_norm')):
        return
    edges = quarter_edges(config).tolist()
    bad = [
        f'{low:.3g} to {high:.3g}'
        for low, high, value in zip(edges[:-1], edges[1:], metrics['quarter_sums'])
        if not np.isfinite(value)
    ]
    what = f'loss is not finite at λ in {" and ".join(bad)}' if bad else 'gradient or the update is not finite'
    if bad and checkpoints.latest_step() == step - 1:
        checkpoints.condemn(step - 1)  # its parameters are those that gave this loss
    last = checkpoints.latest_step()
    kept = 'there is no checkpoint' if last is None else f'the last good checkpoint is {checkpoints.path(last)}'
    raise UserError(
        f'step {step}: the {what}; {kept}. To go on from it, lower config.optim.learning_rate or '
        "config.optim.clip_norm, or compute in config.model.dtype='float32'."
    )


def check_same_classes(here, there, workdir):
    """Raises UserError unless the data's classes are, in their order, those that the checkpoint was trained on."""
    if there == tuple(map(str, range(len(there)))):
        return  # an imported checkpoint, which knows no names
    for label, (ours, theirs) in enumerate(zip(here, there)):
        if ours != theirs:
            raise UserError(
                f'label {label} is {ours!r} in the data and {theirs!r} in the checkpoints of {workdir}; use the data '
                'that they were trained on, or another --workdir (config.data.data_dir).'
            )


def run(config, workdir):
    """Trains in `workdir` up to config.train.num_steps, from its newest checkpoint if it has one."""
    check_config(config)
    workdir = Path(workdir)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, config.train.accumulation_steps, mesh)
    source = build.source(config)
    if config.eval.at_end:  # what only the jobs after training would find wrong, days later
        check_judge(config)
        generate.parse_labels(config.sample.labels, source.class_names)
    held = f'another job trains in {workdir}; wait for its end, or use another --workdir.'
    with contextlib.ExitStack() as stack:
        # One that was killed may hold it for a while still, where the disk is another machine's.
        processes.first_alone(lambda: stack.enter_context(files.locked(workdir / '.lock', held, seconds=_LOCK_SECONDS)))
        return _train(config, workdir, mesh, source)


def _train(config, workdir, mesh, source):
    """`run`, once all is checked and nobody else writes into `workdir`."""
    batches = build.train_batches(config, source, mesh)
    _, step_key = jax.random.split(build.training_key(config))
    init, abstract_state, train_step = sharded(config, mesh)
    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        build.run_identity(config),
        defaults=default().to_dict(),
        keep=config.train.keep_checkpoints,
    )
    restored = checkpoints.restore(abstract_state)
    if restored:
        state, first_step = restored.tree, restored.step
        check_same_classes(source.class_names, restored.class_names, workdir)
        if restored.num_images not in (None, len(source)):
            print(
                f'changed since: {len(source):,} images here and {restored.num_images:,} there; their order is another'
            )
        batches.seek(restored.batches)
        print(f'resuming from {checkpoints.path(first_step)}', flush=True)
        changed = {key: config.to_dict()[key] for key in ('model', 'optim')}
        for difference in config_differences(json.loads(json.dumps(changed)), restored.config):
            print(f'changed since: {difference}', flush=True)
    else:
        state, first_step = init(), 0
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    print(
        f'{parameter_overview.count_parameters(state.params):,} parameters, {len(source):,} images, '
        f'{mesh.size} {jax.devices()[0].platform} devices',
        flush=True,
    )

    if first_step >= config.train.num_steps:
        print(f'nothing to train: config.train.num_steps is {config.train.num_steps}', flush=True)
    grids = config.train.grid_every and config.model.kind == 'unet'
    draw_grid = grid_drawer(config, source.class_names, workdir) if grids and processes.is_first() else None
    writer = MetricWriter(workdir, first_step) if processes.is_first() else SilentWriter()
    progress = Progress(config.train.num_steps, first_step)
    collected = list(restored.metrics) if restored else []  # of the steps since the last line

    def log(step):
        values = summarise(collected)
        steps_per_second, left = progress.rate(step)
        values['images_per_second'] = steps_per_second * config.train.batch_size
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

    def show_grid(step, state):
        """At the steps that have one. All processes call it together."""
        if not grids or (step < config.train.num_steps and step % config.train.grid_every):
            return
        ema_params = sharding.gathered(state.ema_params, mesh) if config.train.fsdp else state.ema_params
        if draw_grid:
            writer.image(step, 'samples', draw_grid(step, ema_params))

    try:
        with the_job.stepping(first_step):
            if restored and processes.of_first(not _grid_path(workdir, first_step).exists()):
                show_grid(first_step, state)  # it was stopped before that
            on_devices = sharding.prefetch(batches, mesh)
            pending = None  # the metrics of the step before, fetched once the next one is on its way
            for step in range(first_step + 1, config.train.num_steps + 1):
                batch, position = next(on_devices)
                if step == first_step + 1:
                    # CPUs wait 30 s for each other when they first meet, and compilations may differ by more.
                    train_step.lower(state, batch, step_key).compile()
                    processes.wait_for_all('compiled')
                state, metrics = train_step(state, batch, step_key)
                if pending is not None:
                    collect(*pending)
                pending = step, metrics
                checkpoints.check()
                last, stop = step == config.train.num_steps, the_job.reached(step)
                if last or stop or step % config.train.checkpoint_every == 0:
                    collect(*pending)  # a state that is not finite is not saved
                    pending = None
                    checkpoints.save(
                        step,
                        state,
                        config=config.to_dict(),
                        class_names=source.class_names,
                        batches=position,
                        num_images=len(source),
                        metrics=collected,
                    )
                if stop:
                    break  # without a grid, for which there may be no time
                show_grid(step, state)
            checkpoints.close()
    except BaseException:
        checkpoints.abandon()
        raise
    finally:
        batches.close()
        writer.close()
    if the_job.stopping:
        raise Preempted(f'preempted: step {int(state.step)} is saved; the same command goes on from it')
    return state


def grid_drawer(config, class_names, workdir):
    """(step, ema_params) -> uint8 picture, also written to workdir/samples: the same noise and labels every time."""
    a_device = math.ceil(config.train.grid_images / sharding.local_mesh().size)
    sample = generate.image_batches(config, batch_size=a_device)
    # All classes, or as many as give a square picture.
    rows = max(math.isqrt(config.train.grid_images), 1)
    labels = np.resize(spread(len(class_names), rows).astype(np.int32), config.train.grid_images)

    def draw(step, ema_params):
        images = np.concatenate(list(sample(ema_params, labels, build.guidance_weight(config), config.sample.seed)))
        picture = figures.class_grid(images, labels)
        figures.save_png(_grid_path(workdir, step), picture)
        return picture

    return draw


def _grid_path(workdir, step):
    return workdir / 'samples' / f'step_{step:08d}.png'
