"""The training job: one loop, from top to bottom."""

import contextlib
import functools
import math
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from cfg_jax import build, build_sampling, files, trained
from cfg_jax.checks import check_config, check_judge, check_training
from cfg_jax.config import changed, default
from cfg_jax.data import spread
from cfg_jax.distributed import processes
from cfg_jax.distributed.job import the_job
from cfg_jax.evaluation import grids
from cfg_jax.progress import Progress, rounded, shown
from cfg_jax.sampling.labels import parse_labels
from cfg_jax.training import sharding, snapshots
from cfg_jax.training.checkpoints import Checkpoints, as_json, config_differences, merged
from cfg_jax.training.checks import check_finite, check_same_classes
from cfg_jax.training.step import summarise
from cfg_jax.training.writers import MetricWriter, SilentWriter

_LAGGING = 0.1  # share of the first parameters in the last average, from which on it is said
_LOCK_SECONDS = 120  # a file server may take so long to release the lock of a machine that is gone


def run(config, workdir, *, report=None):
    """Train in `workdir` up to config.train.num_steps, from its newest checkpoint if it has one.

    Returns the last `TrainState`. Raises Stopped when SIGTERM or Ctrl-C has stopped it. report(step, values): called at
    each progress line with the numbers that go to metrics.jsonl.
    """
    check_config(config)
    check_training(config)
    workdir = Path(workdir)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, config.train.accumulation_steps, mesh)
    source = build.source(config)
    if config.eval.at_end:  # mistakes that the jobs after training would find only days later
        check_judge(config)
        build.held_out_source(config)
        parse_labels(config.sample.labels, source.class_names)
    in_use = f'another job is training in {workdir}; wait until it ends, or use another --workdir.'
    with contextlib.ExitStack() as stack:

        def lock():
            stack.enter_context(files.locked(workdir / '.lock', in_use, seconds=_LOCK_SECONDS))

        processes.first_alone(lock)
        return _train(config, workdir, mesh, source, report)


def _train(config, workdir, mesh, source, report):
    """Train, after the checks, while nobody else writes into `workdir`."""
    with contextlib.ExitStack() as stack:  # what is opened later is left first, and all of it after the last save
        run = {'identity': build.run_identity(config), 'defaults': default().to_dict()}
        with contextlib.ExitStack() as saving:
            kept = {
                'keep': config.train.keep_checkpoints,
                'keep_every': config.train.keep_every,
                'keep_steps': build.round_ends(config),
            }
            checkpoints = saving.enter_context(Checkpoints(workdir / 'checkpoints', **run, **kept))
            averages = None
            if config.optim.ema_lengths:
                averages = saving.enter_context(snapshots.open_to_write(workdir, **run))
            state = _train_steps(config, workdir, mesh, source, checkpoints, averages, stack, report)
        stopped = the_job.stopped(int(state.step)) if the_job.stopping else None
    if stopped:
        raise stopped
    return state


def _train_steps(config, workdir, mesh, source, checkpoints, averages, stack, report):
    """Train up to the last step, or the one to stop at, which is saved; return the state. `stack` closes the rest.

    averages: the `Checkpoints` of snapshots, or None.
    """
    _, step_key = build.training_keys(config)
    init, abstract_state, train_step = build.sharded_training(config, mesh)
    start_round = build.distillation_start(config, abstract_state) if config.distill.method else None
    restored = _restore(config, workdir, source, checkpoints, abstract_state)
    if restored:
        state, first_step = restored.tree, restored.step
    else:
        with shown('initialising the network'):
            state, first_step = init(), 0
            if config.distill.method:
                state = start_round(state, _teacher_params(config, mesh, source))
    _print_start(config, workdir, mesh, source, state, first_step)
    batches = build.train_batches(config, source, mesh)
    stack.callback(batches.close)
    batches.seek(restored.batches if restored else 0)
    writer = MetricWriter(workdir, first_step) if processes.is_first() else SilentWriter()
    stack.callback(writer.close)
    metrics = _Metrics(config, checkpoints, writer, first_step, restored.metrics if restored else (), report)
    show_grid = _grids(config, workdir, mesh, source.class_names, writer)
    saved_with = {'config': config.to_dict(), 'class_names': source.class_names, 'num_images': len(source)}
    save = functools.partial(checkpoints.save, **saved_with)
    of_averages = _Snapshots(config, averages, saved_with)
    of_averages.resume(first_step, state)

    if restored and processes.of_first(not _grid_path(workdir, first_step).exists()):
        show_grid(first_step, state)  # the run was stopped before it drew it
    on_devices = sharding.prefetch(batches, mesh)
    position, round_ends = restored.batches if restored else 0, build.round_ends(config)
    pending = None  # the metrics of the step before, fetched once the next step has been dispatched
    for step in range(first_step + 1, config.train.num_steps + 1):
        read = the_job.unless_stopped(functools.partial(next, on_devices))
        if read is None:
            if pending is not None:  # not saved yet
                metrics.add(*pending)
                save(step - 1, state, batches=position, metrics=metrics.unlogged)
            break
        batch, position = read
        if step == first_step + 1:
            # CPUs wait 30 s for each other when they first meet, and compiling may take some longer.
            with shown('compiling the training step'):
                # in a thread: Python crashes if an interrupt is raised within the compilation
                the_job.unless_stopped(train_step.lower(state, batch, step_key).compile)
            stack.enter_context(the_job.stepping(first_step))  # from here on there is something to save
            processes.wait_for_all('compiled')
            metrics.progress.restart(first_step)
        if step - 1 in round_ends:
            num_steps = build.student_steps(config, step)
            print(f'step {step}: the student so far is now the teacher of one of {num_steps} steps', flush=True)
            state = start_round(state, state.ema_params)
        state, of_step = train_step(state, batch, step_key)
        if pending is not None:
            metrics.add(*pending)
        pending = step, of_step
        checkpoints.check()
        of_averages.check()
        ends, stop = step == config.train.num_steps or step in round_ends, the_job.reached(step)
        is_saved = ends or stop or step % config.train.checkpoint_every == 0
        if is_saved or of_averages.is_due(step):
            metrics.add(*pending)  # a state that is not finite is not saved
            pending = None
        if of_averages.is_due(step):
            of_averages.save(step, state)
        if is_saved:
            save(step, state, batches=position, metrics=metrics.unlogged)
        if stop:
            break  # without a grid: there may be no time for one
        show_grid(step, state)
    return state


def _restore(config, workdir, source, checkpoints, abstract_state):
    """Return the newest checkpoint as `Restored`, after saying so and what has changed since; None without one.

    The source then has the checkpoint's classes in its order; raises UserError if it has others.
    """
    restored = checkpoints.restore(abstract_state)
    if restored:
        source.order_classes(restored.class_names)
        check_same_classes(source.class_names, restored.class_names, workdir)
        print(f'resuming from {checkpoints.path(restored.step)}', flush=True)
        print_changes(config, source, restored)
    return restored


def _teacher_params(config, mesh, source):
    """Return the parameters of config.distill.teacher. The source then has the teacher's classes in its order."""
    teacher = trained.load_teacher(config, mesh)
    source.order_classes(teacher.class_names)
    check_same_classes(source.class_names, teacher.class_names, config.distill.teacher)
    return teacher.params


def _print_start(config, workdir, mesh, source, state, first_step):
    """Print what is trained, on what, and where; the table of parameters becomes a file."""
    parameters = f'{parameter_overview.count_parameters(state.params):,} parameters'
    if processes.is_first():
        table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        files.write(workdir / 'parameters.txt', f'{table}\n'.encode())
        parameters += f' ({workdir / "parameters.txt"})'
    on = f'{mesh.size} {jax.devices()[0].platform} device{"s" if mesh.size > 1 else ""}'
    print(f'{parameters}, {len(source):,} images, {on}', flush=True)
    shortest = min((length for _, length in config.distill.rounds), default=config.train.num_steps)
    if (first := config.optim.ema_decay**shortest) > _LAGGING:
        print(
            f'after {shortest} steps {first:.0%} of the average will still be the first parameters; a lower '
            'config.optim.ema_decay forgets them sooner',
            flush=True,
        )
    if first_step >= config.train.num_steps:
        print(f'nothing to train: config.train.num_steps is {config.train.num_steps}', flush=True)


class _Snapshots:
    """The snapshots of the averages: of each multiple of config.optim.ema_snapshot_every, and of the last step.

    opened: their `Checkpoints`, or None if the run keeps no averages; nothing is then done. saved_with: what
    `Checkpoints.save` takes besides the step and the averages.
    """

    def __init__(self, config, opened, saved_with):
        self._steps = frozenset(build.snapshot_steps(config))
        self._opened, self._saved_with = opened, saved_with

    def is_due(self, step):
        """Return True if a snapshot of this step is to be saved."""
        return step in self._steps

    def save(self, step, state):
        """Save a snapshot in the background; that of the step before is on the disk when this returns."""
        self._opened.save(step, state.averages, **self._saved_with)

    def check(self):
        """Raise the UserError of a snapshot that could not be saved."""
        if self._opened is not None:
            self._opened.check()

    def resume(self, step, state):
        """Make the snapshots on the disk those of a run that has come to this step: none that is later.

        A job may have been killed when the checkpoint of a step was written and its snapshot was not.
        """
        if self._opened is not None:
            self._opened.remove_after(step)
            if step and self.is_due(step) and step not in self._opened.steps():
                self.save(step, state)


class _Metrics:
    """The steps' metrics: checked one by one, then printed and written every config.train.log_every steps.

    unlogged: a list of those that no line covers yet. report(step, values), or None: called at each line.
    """

    def __init__(self, config, checkpoints, writer, first_step, unlogged, report):
        self._report = report
        self._train, self._checkpoints, self._writer = config.train, checkpoints, writer
        self._edges = build.quarter_edges(config).tolist()
        self.progress, self.unlogged = Progress(config.train.num_steps, first_step), list(unlogged)

    def add(self, step, metrics):
        """Fetch the metrics of a step. Raises UserError if they are not finite."""
        metrics = jax.device_get(metrics)
        check_finite(step, metrics, self._checkpoints, quarter_edges=self._edges)
        self.unlogged.append(metrics)
        if step % self._train.log_every == 0 or step == self._train.num_steps:
            with the_job.waiting('writing metrics'):
                values = self._log(step)
            if self._report:
                self._report(step, values)

    def _log(self, step):
        """Print and write the means of the metrics since the last line; return them."""
        values = summarise(self.unlogged)
        steps_per_second, left = self.progress.rate(step)
        values['images_per_second'] = steps_per_second * self._train.batch_size
        self._writer.scalars(step, values)
        print(
            f'step {step}/{self._train.num_steps}  loss {values["loss"]:.4f}  '
            f'{rounded(values["images_per_second"])} images/s  {left} left',
            flush=True,
        )
        self.unlogged.clear()
        return values


def _grids(config, workdir, mesh, class_names, writer):
    """Return the function (step, state) that draws the grid of a step that has one. All processes call it together."""
    if not config.train.grid_every or config.model.kind != 'unet':
        return lambda step, state: None

    @functools.cache
    def drawer(num_steps):
        drawn = config if num_steps is None else changed(config, {'sample.num_steps': num_steps})
        return grid_drawer(drawn, class_names, workdir)

    def show(step, state):
        if step < config.train.num_steps and step % config.train.grid_every:
            return
        ema_params = sharding.gathered(state.ema_params, mesh) if config.train.fsdp else state.ema_params
        if processes.is_first():
            with shown(f'drawing the images of step {step}'):
                picture = drawer(build.student_steps(config, step))(step, ema_params)
            with the_job.waiting('writing a picture'):
                writer.image(step, 'samples', picture)

    return show


def print_changes(config, source, restored):
    """Print what has changed since the checkpoint was saved, of the things that may change."""
    if restored.num_images not in (None, len(source)):
        print(
            f'changed since: the data has {len(source):,} images now and had {restored.num_images:,}; '
            'they come in another order'
        )
    free = {key: config.to_dict()[key] for key in ('model', 'optim')}
    free['train'] = {'accumulation_steps': config.train.accumulation_steps}
    saved = merged(as_json(default().to_dict()), restored.config)
    for difference in config_differences(as_json(free), saved):
        print(f'changed since: {difference}', flush=True)
    teacher = saved['distill']['teacher']
    if config.distill.teacher != teacher:
        print(
            f'the teacher stays {teacher!r}, whose parameters the checkpoint holds: to learn from '
            f'{config.distill.teacher!r}, start in another --workdir (config.distill.teacher)',
            flush=True,
        )
    moved = build.moved_learning_rate(config, saved, restored.step)
    if moved:
        print(moved, flush=True)


def grid_drawer(config, class_names, workdir):
    """Return the function (step, ema_params) -> uint8 picture, which also writes it to workdir/samples.

    Noise and labels are the same every time.
    """
    per_device = math.ceil(config.train.grid_images / sharding.local_mesh().size)
    weight, weak = build_sampling.guidance_weight(config), None
    if build_sampling.weak_name(config) == 'checkpoint' and trained.is_guided(config, weight):
        if config.guidance.weak_workdir:
            weak = trained.load_weak(config, workdir)
        elif weight:
            print('the grids are drawn at w = 0: the weak model is a checkpoint of this run', flush=True)
            weight = 0.0
    sample = trained.image_batches(config, trained.load_classifier(config), weak, batch_size=per_device)
    # all classes, or as many as make the picture square
    num_rows = max(math.isqrt(config.train.grid_images), 1)
    labels = np.resize(spread(len(class_names), num_rows).astype(np.int32), config.train.grid_images)

    def draw(step, ema_params):
        images = np.concatenate(list(sample(ema_params, labels, weight, config.sample.seed)))
        title = f'step {step:,}, {trained.drawn_with(config, weight, config.guidance.classifier_weight)}'
        picture = grids.class_grid(images, labels, class_names, title=title)
        with the_job.waiting('writing a picture'):
            grids.save_png(_grid_path(workdir, step), picture)
        return picture

    return draw


def _grid_path(workdir, step):
    return workdir / 'samples' / f'step_{step:08d}.png'
