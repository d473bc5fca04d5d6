"""Errors that are meant for the user: one line each."""

import contextlib
import errno
import os
import re
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INVALID = (errno.EINVAL, errno.EOVERFLOW)  # a damaged file makes its reader seek to no place
_NO_FOLDER = (errno.EACCES, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, what is allowed and which config field to change.

    The command line prints it without a traceback and exits with status 2; a notebook shows the line alone.
    """

    def _render_traceback_(self):
        """Return the lines that IPython shows in place of a traceback."""
        return [f'error: {self}']


@contextlib.contextmanager
def disk_errors(workdir):
    """Context manager: turn errors of the disk that concern `workdir` into a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(f'{workdir} cannot be written: {error.strerror} (--workdir).') from error
        place, folder = Path(error.filename or '/').absolute(), Path(workdir).absolute()
        concerned = folder in (place, *place.parents) or place in folder.parents
        # a folder such as /proc/x cannot be made, and its error says that it is missing
        if not concerned or not (error.errno in _NO_FOLDER or (error.errno == errno.ENOENT and not folder.exists())):
            raise
        raise UserError(f'{workdir} cannot be written: {error.strerror}: {error.filename} (--workdir).') from error


def unusable(path, what, field):
    """Return the UserError that says what is wrong with `path`, a file or folder that config field `field` gave."""
    return UserError(f'{path} {what} ({field}).')


def first_line(error):
    """Return the first line of an exception's message, or the exception's class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_error(error):
    """Return the errno, an int, if the system did not let a file be read; None if the file itself is the cause.

    TensorStore and ArrayRecord tell the system's error only in the text of their own exceptions.
    """
    if isinstance(error, OSError):
        return None if error.errno in _INVALID else error.errno
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return int(found[1])
    text = first_line(error).split(';')[0]
    codes = [code for code in errno.errorcode if code not in _INVALID and text.endswith(os.strerror(code))]
    return codes[0] if codes else None


def printable(name):
    """Return the name of a file or class, which may hold any bytes, as text that fits into one line."""
    return name if name.isprintable() else ascii(name)[1:-1]
