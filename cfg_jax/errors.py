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


def unusable(path, what, field):
    """Return the UserError that says what is wrong with `path`, a file or folder that config field `field` gave."""
    return UserError(f'{path} {what} ({field}).')


def first_line(error):
    """Return the first line of an exception's message, or the exception's class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(name):
    """Return the name of a file or class, which may hold any bytes, as text that fits into one line."""
    return name if name.isprintable() else ascii(name)[1:-1]
