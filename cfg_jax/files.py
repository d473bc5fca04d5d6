"""Files that are written whole or not at all, locks, one spelling of names, and the headers of .npy and zip files."""

import contextlib
import fcntl
import json
import math
import os
import struct
import time
import unicodedata
from pathlib import Path

import numpy as np

from cfg_jax.errors import UserError

_unfinished = set()  # the temporary files that are being written
ZIP_HEADER_BYTES = 30  # the fixed part of the local header, which precedes the data of each member of a zip file


@contextlib.contextmanager
def whole(path):
    """Yield the path of a temporary file beside `path`; it then replaces `path`, or is deleted after an error."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    _unfinished.add(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def remove_unfinished():
    """Delete the temporary files that are being written, when the process ends without returning to their writers."""
    for temporary in tuple(_unfinished):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path, data):
    """Write bytes to `path`, whole or not at all; create its folder if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(data)


def write_json(path, content):
    """Write plain values as JSON, as `write` does. Raises UserError, and writes nothing, for NaN or infinity."""
    if not_finite := _not_finite(content):
        where, number = not_finite
        raise UserError(f'{path} is not written: {where or "its content"} is {number}, not a finite number.')
    write(path, (json.dumps(content, indent=1, allow_nan=False) + '\n').encode())


def _not_finite(content, where=''):
    """Return ('field.index', number) of the first number that JSON does not have, NaN or infinity; None if all are."""
    if isinstance(content, float):
        return None if math.isfinite(content) else (where, content)
    pairs = content.items() if isinstance(content, dict) else ()
    pairs = enumerate(content) if isinstance(content, (list, tuple)) else pairs
    found = (_not_finite(value, f'{where}.{key}'.lstrip('.')) for key, value in pairs)
    return next(filter(None, found), None)


@contextlib.contextmanager
def locked(path, message, *, seconds=0):
    """Hold the file `path` for this process alone; create its folder. Does nothing on file systems without locks.

    Raises a UserError of the text `message` if another process still holds the file after so many seconds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        start, announced = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - start >= seconds:
                    raise UserError(message) from None
                if not announced:
                    print(f'waiting for up to {seconds} s: {message}', flush=True)
                announced = True
                time.sleep(0.5)
                continue
            except OSError:
                pass  # no locks on this file system
            break
        yield


def composed(name):
    """Return a name in Unicode's composed form (NFC): accents may also be stored apart from their letters (NFD)."""
    return unicodedata.normalize('NFC', name)


def zip_header_size(header):
    """Return the size in bytes of a zip member's whole local header, after which its data begin.

    header: its fixed part, ZIP_HEADER_BYTES bytes, which ends with the lengths of the name and of the extra field.
    """
    return ZIP_HEADER_BYTES + sum(struct.unpack('<HH', header[26:]))


def read_npy_header(file):
    """Return (dtype, shape, True if in Fortran order) of an .npy file, and leave the file where the values begin.

    Raises ValueError if the header is damaged, NotImplementedError for a later format than 2.0.
    """
    version = np.lib.format.read_magic(file)
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if version[0] not in readers:
        raise NotImplementedError(f'.npy format {version[0]}.{version[1]}; only 1.0 and 2.0 are read')
    shape, fortran, dtype = readers[version[0]](file)
    return dtype, shape, fortran
