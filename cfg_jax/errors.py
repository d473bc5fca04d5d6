"""The one exception that is meant for the user, and what its one line is made of."""


class UserError(Exception):
    """Bad input: its text is one line saying what is wrong, what is allowed and which config field to change.

    The face prints it without a traceback and exits with status 2.
    """


def unusable(path, what, field):
    """Return the UserError that says what is wrong with `path`, a file or folder that config field `field` gave."""
    return UserError(f'{path} {what} ({field}).')


def first_line(error):
    """Return the first line of an exception's message, or the exception's class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(name):
    """Return the name of a file or class, which may hold any bytes, as text that fits into one line."""
    return name if name.isprintable() else ascii(name)[1:-1]
