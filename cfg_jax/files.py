"""Files that are written whole or not at all."""

import contextlib
import json
import os
from pathlib import Path


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
