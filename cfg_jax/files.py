"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path


def write(path, data):
    """Writes bytes to `path` through a temporary file beside it; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk was full


def write_json(path, content):
    """Writes plain values as JSON."""
    write(path, (json.dumps(content, indent=1) + '\n').encode())
