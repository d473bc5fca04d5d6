"""The part of a checkpoint that is a JSON file, read without JAX: the config that it was trained with."""

import json
import zlib
from pathlib import Path

from cfg_jax.errors import unusable


def checksum(meta):
    """Return a number that changes with any value of the nested dict `meta`."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def newest_config(workdir):
    """Return the config, a nested dict, in the newest readable checkpoint of `workdir`; None if there is none.

    Raises UserError if the system does not let it be read.
    """
    folders = [path for path in (Path(workdir) / 'checkpoints').glob('*') if path.name.isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
        try:
            meta = json.loads((folder / 'meta' / 'metadata').read_text())
            if meta.pop('checksum', None) in (None, checksum(meta)):
                return dict(meta['config'])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged
        except OSError as error:
            raise unusable(folder, f'cannot be read: {error.strerror}', '--workdir') from error
    return None
