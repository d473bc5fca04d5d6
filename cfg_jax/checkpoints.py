"""Checkpoints on Orbax: the state, the data's position and the config, each step in a folder of its own."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from cfg_jax.errors import UserError


def config_differences(config, saved, prefix='config'):
    """Fields of the nested dict `config` that differ in `saved`: a list of 'config.a.b is 1 here and 2 there'."""
    differences = []
    for key, here in config.items():
        there, name = saved.get(key), f'{prefix}.{key}'
        if isinstance(here, dict) and isinstance(there, dict):
            differences += config_differences(here, there, name)
        elif here != there:
            differences.append(f'{name} is {here!r} here and {there!r} there')
    return differences


def merged(defaults, values):
    """The nested dict `values` with what it lacks taken from `defaults`."""
    both = {key: merged(defaults[key], values[key]) for key in defaults.keys() & values.keys()
            if isinstance(defaults[key], dict) and isinstance(values[key], dict)}  # fmt: skip
    return {**defaults, **values, **both}


class Restored(NamedTuple):
    """What a checkpoint held: the tree asked for, the step it was saved after, and what was saved beside it.

    batches: how many this process had read. class_names, num_images: the data set's. config: the whole, a nested dict.
    """

    tree: Any
    step: int
    batches: int
    class_names: tuple[str, ...]
    config: dict
    num_images: int | None = None


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous and atomic; `close` waits for the last one.

    identity: nested dict of plain values, the part of a config that fixes what the checkpoints mean: each field of it
    has to be the saved one's. defaults: the values of fields that did not exist yet when a checkpoint was saved.
    read_only: changes nothing on disk, for jobs that may read while another one trains.
    """

    def __init__(self, directory, identity, *, defaults=None, keep=2, read_only=False):
        self.directory = Path(directory).absolute()
        self._identity, self._defaults = _as_json(identity), _as_json(defaults or {})
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            cleanup_tmp_directories=not read_only,  # what a kill left half-written
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step, state, *, config, class_names, batches=0, num_images=None):
        """Saves in the background; waits only for the save before. `Restored` says what the arguments are."""
        meta = {'config': _as_json(config), 'class_names': list(class_names), 'batches': batches}
        meta['num_images'] = num_images
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def latest_step(self):
        """The newest step saved, or None."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def path(self, step):
        """The folder of a step."""
        return self.directory / str(step)

    def close(self):
        self._manager.wait_until_finished()
        self._manager.close()

    def restore(self, abstract_state):
        """The newest readable state as `Restored`; None where there is no checkpoint.

        abstract_state: the state's shapes, dtypes and shardings. A checkpoint that cannot be read is moved aside, into
        the folder damaged_checkpoints beside this one, once an older one has been read in its place.
        Raises UserError where none can be read, or where they are another config's.
        """

        def restore_step(step):
            wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            return self._manager.restore(step, args=wanted).state

        return self._newest_readable(restore_step)

    def restore_ema(self, abstract_params):
        """As `restore`, but the EMA parameters alone."""
        wanted = {'ema_params': abstract_params}
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )

        def restore_step(step):
            return ocp.PyTreeCheckpointer().restore(self.path(step) / 'state', args=arguments)['ema_params']

        return self._newest_readable(restore_step)

    def saved_config(self):
        """The config of the newest readable checkpoint, as the nested dict that it was saved with; None without any."""
        restored = self._newest_readable(lambda step: None)
        return restored and restored.config

    def condemn(self, step):
        """Moves a checkpoint aside, like a damaged one."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            aside = self.directory.parent / 'damaged_checkpoints'
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            shutil.move(self.path(step), aside / str(step))
        self._manager.reload()

    def _newest_readable(self, restore_step):
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                self._check_identity(merged(self._defaults, meta['config']))
                tree = restore_step(step)
            except (UserError, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # damage shows as ValueError, KeyError, OSError, ... by the file that it hit
                damaged[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                continue
            for bad, reason in damaged.items():
                print(f'checkpoint {bad} is damaged ({reason}); going on from step {step} instead', flush=True)
                if not self._read_only:
                    self.condemn(bad)
            data = {'class_names': tuple(meta['class_names']), 'num_images': meta.get('num_images')}
            return Restored(tree, step, meta['batches'], config=meta['config'], **data)
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f'none of the {len(damaged)} checkpoints in {self.directory} can be read (step {step}: {reason}); '
                'restore them or use another --workdir.'
            )
        return None

    def _check_identity(self, saved):
        differences = config_differences(self._identity, saved)
        if differences:
            more = f' (and {len(differences) - 1} more fields)' if len(differences) > 1 else ''
            raise UserError(
                f"{self.directory.parent} holds another config's checkpoints: {differences[0]}{more}; "
                'use another --workdir, or the config it was trained with.'
            )


def _as_json(values):
    """As it reads back from a file: tuples become lists."""
    return json.loads(json.dumps(values))
