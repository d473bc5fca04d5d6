"""Checkpoints on Orbax: the state, the data's position and the config, each step in a folder of its own."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from grain import checkpoint as grain_checkpoint

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


class Restored(NamedTuple):
    """What a checkpoint held: the tree asked for, the step it was saved after, the data set's class names."""

    tree: Any
    step: int
    class_names: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous and atomic; `close` waits for the last one.

    config: nested dict of plain values that fixes what the checkpoints mean. Another config's are refused: every field
    of it has to be the saved one's. class_names: the data set's, saved along. read_only: changes nothing on disk, for
    jobs that may read while another one trains.
    """

    def __init__(self, directory, config, *, class_names=(), keep=2, read_only=False):
        self.directory = Path(directory).absolute()
        self._config = json.loads(json.dumps(config))  # as it reads back: tuples become lists
        self._class_names = class_names
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # what a kill left half-written
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step, state, data_iterator):
        """Saves in the background; waits only for the save before."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain_checkpoint.CheckpointSave(data_iterator),
                meta=ocp.args.JsonSave({'config': self._config, 'class_names': list(self._class_names)}),
            ),
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

    def restore(self, abstract_state, data_iterator):
        """The newest readable state, with `data_iterator` moved to its position; None where there is no checkpoint.

        abstract_state: the state's shapes, dtypes and shardings. A checkpoint that cannot be read is moved aside, into
        the folder damaged_checkpoints beside this one, once an older one has been read in its place.
        Raises UserError where none can be read, or where they are another config's.
        """
        return self._newest_readable(
            lambda step: (
                self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state),
                        data=grain_checkpoint.CheckpointRestore(data_iterator),
                    ),
                ).state
            )
        )

    def restore_ema(self, abstract_params):
        """As `restore`, but the EMA parameters alone."""
        return self._newest_readable(
            lambda step: ocp.PyTreeCheckpointer().restore(
                self.path(step) / 'state',
                args=ocp.args.PyTreeRestore(
                    {'ema_params': abstract_params},
                    restore_args=ocp.checkpoint_utils.construct_restore_args({'ema_params': abstract_params}),
                    partial_restore=True,
                ),
            )['ema_params']
        )

    def _newest_readable(self, restore_step):
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                self._check_config(meta['config'])
                tree = restore_step(step)
            except UserError:
                raise
            except Exception as error:  # damage shows as ValueError, KeyError, OSError, ... by the file that it hit
                damaged[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                continue
            for bad, reason in damaged.items():
                print(f'checkpoint {bad} is damaged ({reason}); going on from step {step} instead', flush=True)
                if not self._read_only:
                    self._move_aside(bad)
            return Restored(tree, step, tuple(meta['class_names']))
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f'none of the {len(damaged)} checkpoints in {self.directory} can be read (step {step}: {reason}); '
                'restore them or use another --workdir.'
            )
        return None

    def _check_config(self, saved):
        differences = config_differences(self._config, saved)
        if differences:
            more = f' (and {len(differences) - 1} more fields)' if len(differences) > 1 else ''
            raise UserError(
                f"{self.directory.parent} holds another config's checkpoints: {differences[0]}{more}; "
                'use another --workdir, or the config it was trained with.'
            )

    def _move_aside(self, step):
        if jax.process_index() == 0:
            aside = self.directory.parent / 'damaged_checkpoints'
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            shutil.move(self.path(step), aside / str(step))
        self._manager.reload()
