"""Checkpoints on Orbax: the state, the data's position and the config, each step in a folder of its own."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cfg_jax.distributed import processes
from cfg_jax.distributed.job import the_job
from cfg_jax.errors import UserError, first_line, system_error, unusable
from cfg_jax.training.meta import checksum

_MISSING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # errors of the system that damage shows as


def config_differences(config, saved, prefix='config'):
    """Return the fields of the nested dict `config` that differ in `saved`: a list of texts."""
    differences = []
    for key, here in config.items():
        there, name = saved.get(key), f'{prefix}.{key}'
        if isinstance(here, dict) and isinstance(there, dict):
            differences += config_differences(here, there, name)
        elif here != there:
            differences.append(f'{name} is {here!r} now and was {there!r} when saved')
    return differences


def merged(defaults, values):
    """Return the nested dict `values` with missing entries taken from `defaults`."""
    both = {key: merged(defaults[key], values[key]) for key in defaults.keys() & values.keys()
            if isinstance(defaults[key], dict) and isinstance(values[key], dict)}  # fmt: skip
    return {**defaults, **values, **both}


@partial(jax.jit, static_argnames='shape')
def _checksum(block, start, shape):
    """Return the sum, modulo 2^32, of one number per word of a block, mixed from the word and its place in the array.

    The mixing is MurmurHash3's last step: one changed bit changes half of the number's bits, so changes do not cancel.
    """
    words = block if block.dtype.itemsize == 4 else block.astype(jnp.float32)  # shorter types fit exactly
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    place = jnp.zeros(block.shape, jnp.uint32)
    for axis, begin in enumerate(start):
        places = jax.lax.broadcasted_iota(jnp.uint32, block.shape, axis) + begin
        place += places * np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    mixed = words ^ (place * np.uint32(0x9E3779B1) + np.uint32(1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def checksums(trees):
    """Return a checksum for each of {name: tree of arrays}, {name: int}. All processes call it together.

    A changed tree keeps its checksum in one of 2^32 cases. Checksums do not depend on how the arrays are sharded. Each
    device sums its own blocks: blocks of one shape share a program, while a single program for all arrays of a large
    network takes minutes to compile. No program spans several processes: many such programs at once can deadlock.
    """

    def blocks(array):
        for shard in jnp.asarray(array).addressable_shards:
            if shard.replica_id == 0:
                start = tuple(np.uint32(part.start or 0) for part in shard.index)
                yield _checksum(shard.data, start, shape=array.shape)

    found = {name: [list(blocks(leaf)) for leaf in jax.tree.leaves(tree)] for name, tree in trees.items()}
    local = {
        name: sum((2 * i + 1) * int(number) for i, numbers in enumerate(leaves) for number in numbers)
        for name, leaves in jax.device_get(found).items()
    }
    every = processes.of_all(local)
    return {name: sum(each[name] for each in every) % 2**32 for name in local}


def check_folder(folder, field):
    """Raise UserError if a folder's whole path holds characters for which Orbax writes files that it cannot read.

    It takes * ? and [ for a pattern, and a backslash for a slash.

    field: the flag or config field that gave the folder.
    """
    path = str(Path(folder).absolute())
    found = [character for character in '*?[\\' if character in path]
    if found:
        raise UserError(
            f"checkpoints cannot be kept in {path}: the library that writes them misreads '{found[0]}' in a path; use "
            f'one without * ? [ and \\, or a symbolic link to this one ({field}).'
        )


def as_json(values):
    """Return the values as they read back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(values))


class Restored(NamedTuple):
    """The content of a checkpoint.

    tree: the arrays asked for. step: training steps done. batches: how many this process had read. class_names,
    num_images: the data set's. config: the whole config as a nested dict. metrics: trees of numbers of the steps that
    no line of metrics.jsonl covers yet.
    """

    tree: Any
    step: int
    batches: int
    class_names: tuple[str, ...]
    config: dict
    num_images: int | None = None
    metrics: tuple = ()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which also keeps the error of a save in the background.

    When several processes save together, Orbax raises the error only after all have ended the save, and the others
    never do: they wait for this one's part.
    """

    failure = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous and atomic; `close` waits for the last one.

    A context manager too, which closes them; an open one leaves threads to Orbax that outlive the program's errors.

    All processes of a job make the same calls, and write and read each checkpoint together: if any of them cannot read
    it, it counts as damaged for all.

    identity: nested dict of plain values, the part of a config that fixes the meaning of the checkpoints; each of its
    fields must equal the saved one. defaults: values for fields that did not exist when a checkpoint was saved.
    keep: so many of the newest stay (None: all), and with them those of a multiple of keep_every steps, unless it is 0,
    and those of keep_steps. read_only: change nothing on disk, for jobs that may read while another one trains.
    saving: what to do in order to need less room on the disk, for an error.
    """

    def __init__(
        self,
        directory,
        identity,
        *,
        defaults=None,
        keep=2,
        keep_every=0,
        keep_steps=(),
        read_only=False,
        saving='lower config.train.keep_checkpoints',
    ):
        check_folder(directory, '--workdir')
        self.directory = Path(directory).absolute()
        self._identity, self._defaults = as_json(identity), as_json(defaults or {})
        self._read_only, self._saving = read_only, saving
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policy(keep, keep_every, keep_steps),
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            cleanup_tmp_directories=not read_only,  # half-written ones of a killed job
            single_host_load_and_broadcast=jax.process_count() > 1,  # others may see a new file later than the first
            # two runs of saves at a time, of the state and of snapshots, must not take each other's barriers for theirs
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.directory.name),
        )
        self._manager = _Manager(self.directory, options=options)

    def __enter__(self):
        """Close at the end of the context: Orbax's threads must not outlive an error at the program's exit."""
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.abandon()
        else:
            self.close()

    def save(self, step, state, *, config, class_names, batches=0, num_images=None, metrics=()):
        """Save in the background, waiting only for the save before. `Restored` describes the arguments.

        Raises UserError if the disk has no room for this checkpoint or the one before.
        """
        meta = {'config': as_json(config), 'class_names': list(class_names), 'batches': batches}
        meta |= {'num_images': num_images, 'metrics': jax.tree.map(lambda a: np.asarray(a).tolist(), list(metrics))}
        meta['mixed_checksums'] = checksums(_parts(state))  # the older 'checksums' missed changes of two signs
        meta['checksum'] = checksum(meta)
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(_parts(state)), meta=ocp.args.JsonSave(meta))
        self._waiting(lambda: self._manager.save(step, args=arguments))

    def check(self):
        """Raise the UserError of a save that has failed in the background; do not wait for one that is running."""
        if self._manager.failure is not None:
            self._waiting(lambda: None)

    def latest_step(self):
        """Return the newest step saved, or None."""
        self._waiting(self._manager.wait_until_finished)
        return self._manager.latest_step()

    def steps(self):
        """Return all steps saved, increasing."""
        self._waiting(self._manager.wait_until_finished)
        return sorted(self._manager.all_steps())

    def require(self, step):
        """Raise UserError unless there is a checkpoint of this step."""
        steps = self.steps()
        if step not in steps:
            there = ', '.join(map(str, reversed(steps)))
            raise UserError(f'no checkpoint of step {step} in {self.directory}; there are {there}.')

    def remove_after(self, step):
        """Remove the checkpoints of all later steps."""
        later = [each for each in self.steps() if each > step]
        if later and processes.is_first():
            for each in later:
                shutil.rmtree(self.path(each))
        if later:
            self._manager.reload()  # waits for the first process

    def path(self, step):
        """Return the folder of a step."""
        return self.directory / str(step)

    def close(self):
        """Wait for the save in progress, and close."""
        self._waiting(self._manager.wait_until_finished)
        self._manager.close()

    def abandon(self):
        """Close after an error. With several processes do not wait: a failed process never writes its part."""
        if jax.process_count() == 1:
            self._quietly_wait()
            self._manager.close()

    def _waiting(self, call):
        """Make a call that starts a save or waits for one; turn a full disk into a UserError."""
        try:
            with self._written():
                self._let_saves_end()
                call()
        except Exception as error:
            full = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
            reasons = [text for text in full if text in _all_text(error)]
            if not reasons:
                raise
            steps = [int(path.name) for path in self.directory.glob('*') if path.name.isdigit()]
            kept = f'the last saved checkpoint is {self.path(max(steps))}' if steps else 'no checkpoint is saved yet'
            raise UserError(
                f'a checkpoint cannot be written to {self.directory}: {reasons[0]}; {kept}. Free some space, or '
                f'{self._saving}.'
            ) from error

    def _written(self):
        """Return a context in which a signal ends the job if this process's checkpoints stop growing."""

        def size():
            return sum(path.stat().st_size for path in self.directory.rglob('*') if path.is_file())

        return the_job.waiting('writing a checkpoint', size)

    def _let_saves_end(self):
        """Wait until saves end, and raise the error of one that failed; with several processes, as soon as it fails."""
        if jax.process_count() > 1:
            ending = threading.Thread(target=self._quietly_wait, daemon=True)
            ending.start()
            while ending.is_alive() and self._manager.failure is None:
                ending.join(0.05)
        if self._manager.failure is not None:
            raise self._manager.failure

    def _quietly_wait(self):
        with contextlib.suppress(Exception), self._written():  # kept as `failure`, or raised in another waiting thread
            self._manager.wait_until_finished()

    def restore(self, abstract_state):
        """Return the newest readable state as `Restored`; None if there is no checkpoint.

        abstract_state: the state's shapes, dtypes and shardings. A checkpoint that cannot be read is moved to the
        folder damaged_checkpoints beside this one, after an older one has been read in its place.
        Raises UserError if none can be read, or if they belong to another config.
        """

        def restore_step(step):
            reader = self._reader(ocp.StandardCheckpointHandler())
            parts = reader.restore(self.path(step) / 'state', args=ocp.args.StandardRestore(_parts(abstract_state)))
            return dataclasses.replace(abstract_state, **parts)

        return self._newest_readable(restore_step, _parts)

    def restore_params(self, abstract_params, *, step=None, ema=True):
        """Return the newest readable parameters as `Restored`, in the way of `restore`.

        ema: take their average. step: read this checkpoint, not the newest. Raises UserError if there is none of it.
        """
        name = 'ema_params' if ema else 'params'
        restored = self.restore_parts({name: abstract_params}, step=step)
        return restored and restored._replace(tree=restored.tree[name])

    def restore_parts(self, wanted, *, step=None):
        """Return some parts of the newest readable state as `Restored`, in the way of `restore_params`.

        wanted: {name: abstract tree}, as is the tree that is returned.
        """
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )

        def restore_step(step):
            reader = self._reader(ocp.PyTreeCheckpointHandler())
            return reader.restore(self.path(step) / 'state', args=arguments)

        return self._newest_readable(restore_step, dict, step)

    def saved_config(self):
        """Return the config saved in the newest readable checkpoint, a nested dict; None if there is no checkpoint."""
        restored = self._newest_readable(lambda step: None, lambda nothing: {})
        return restored and restored.config

    def saved_class_names(self):
        """Return the class names saved in the newest readable checkpoint, a tuple; empty if there is no checkpoint."""
        restored = self._newest_readable(lambda step: None, lambda nothing: {})
        return restored.class_names if restored else ()

    def condemn(self, step):
        """Move a checkpoint aside, as a damaged one is."""
        self._waiting(self._manager.wait_until_finished)
        if processes.is_first():
            aside = self.directory.parent / 'damaged_checkpoints'
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            shutil.move(self.path(step), aside / str(step))
        self._manager.reload()  # waits for the first process and takes over its list of steps

    def _reader(self, handler):
        """Return a reader that does not wait for other processes, whose copy may differ."""
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f'process{jax.process_index()}',
        )
        return ocp.Checkpointer(handler, multiprocessing_options=alone)

    def _newest_readable(self, restore_step, parts, only=None):
        """Return the newest step that all processes can read. parts: restored tree -> {name: tree} with checksums.

        only: the one step to look at.
        """
        if only is not None:
            self.require(only)
        damaged = {}
        for step in reversed(self.steps()) if only is None else [only]:
            meta, tree, reason = self._read(step, restore_step)
            reason = _agreed(reason)
            if not reason:  # all processes have read it, so that they can compute checksums together
                found, saved = checksums(parts(tree)), meta.get('mixed_checksums', {})
                reason = _agreed('checksum mismatch' if saved and found.items() - saved.items() else '')
            if reason:
                damaged[step] = reason
                continue
            for bad, reason in damaged.items():
                print(f'checkpoint {bad} is damaged ({reason}); using step {step} instead', flush=True)
                if not self._read_only:
                    self.condemn(bad)
            data = {'class_names': tuple(meta['class_names']), 'num_images': meta.get('num_images')}
            metrics = tuple({key: np.array(value) for key, value in each.items()} for each in meta.get('metrics', ()))
            return Restored(tree, step, meta['batches'], config=meta['config'], metrics=metrics, **data)
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f'none of the {len(damaged)} checkpoints in {self.directory} can be read (step {step}: {reason}); '
                'restore them from a copy, or use another --workdir.'
            )
        return None

    def _read(self, step, restore_step):
        """Return (meta, tree, '') of a step, or (None, None, the damage that this process found).

        Raises UserError if the system does not let it be read, which says nothing about the checkpoint.
        """
        try:
            meta = self._reader(ocp.JsonCheckpointHandler()).restore(self.path(step) / 'meta')
            if 'checksum' in meta and meta.pop('checksum') != checksum(meta):
                raise ValueError('checksum mismatch in its config')
            self._check_identity(merged(self._defaults, meta['config']))
            return meta, restore_step(step), ''
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # damage appears as ValueError, KeyError, OSError, ..., depending on the file
            if (code := system_error(error)) not in _MISSING:
                raise unusable(self.path(step), f'cannot be read: {os.strerror(code)}', '--workdir') from error
            return None, None, first_line(error)[:200]

    def _check_identity(self, saved):
        differences = config_differences(self._identity, saved)
        if differences:
            raise UserError(
                f"{self.directory.parent} holds another config's checkpoints: {'; '.join(differences)}. Use another "
                '--workdir, or leave --config out: then the config that they were trained with is used.'
            )


def _policy(keep, keep_every, keep_steps):
    """Return Orbax's policy of which checkpoints stay."""
    policies = ocp.checkpoint_managers
    every = [policies.EveryNSteps(keep_every)] if keep_every else []
    return policies.AnyPreservationPolicy([policies.LatestN(keep), policies.CustomSteps(keep_steps), *every])


def _parts(state):
    """Return the parts of a state, a dataclass or a dict of them, that are not None: {name: tree}."""
    if not isinstance(state, dict):
        state = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in state.items() if tree is not None}


def _agreed(text):
    """Return, in all processes, the text of the first process that has one; '' if none has."""
    for index, said in enumerate(processes.of_all(text)):
        if said:
            return f'{said}, in process {index}' if index else said
    return ''


def _all_text(error):
    """Return the texts of an exception and of the exceptions that led to it."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return '\n'.join(texts)
