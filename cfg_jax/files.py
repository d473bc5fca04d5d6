"""Files that are written whole or not at all, and one process keeping others out."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from cfg_jax.errors import UserError


@contextlib.contextmanager
def whole(path):
    """Within, the path of a temporary file beside `path`, which then takes its place; after an error it is removed."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path, data):
    """Writes bytes to `path`; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(data)


def write_json(path, content):
    """Writes plain values as JSON."""
    write(path, (json.dumps(content, indent=1) + '\n').encode())


@contextlib.contextmanager
def locked(path, held, *, seconds=0):
    """Within, this process alone holds the file `path`, where its file system has locks; makes its folder.

    Where another process still holds it after so many seconds: UserError, of the text `held`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - start >= seconds:
                    raise UserError(held) from None
                if not told:
                    print(f'waiting, {seconds} s at most: {held}', flush=True)
                told = True
                time.sleep(0.5)
                continue
            except OSError:
                pass  # no locks there; then it is the user who sees to it
            break
        yield
