"""Errors that are meant for the user: one line each."""

import contextlib
import errno
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, what is allowed and which config field to change.

    The command line prints it without a traceback and exits with status 2.
    """


@contextlib.contextmanager
def disk_errors(workdir):
    """Context manager: turn errors of the disk that concern `workdir` into a UserError that names it."""
    try:
        yield
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        place, folder = Path(error.filename or '/').absolute(), Path(workdir).absolute()
        if folder not in (place, *place.parents) and place not in folder.parents:
            raise
        raise UserError(f'{workdir} cannot be written: {error.strerror}: {error.filename} (--workdir).') from error
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(f'{workdir} cannot be written: {error.strerror} (--workdir).') from error
