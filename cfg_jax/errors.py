"""The one exception that is meant for the user."""


class UserError(Exception):
    """Bad input: its text is one line saying what is wrong, what is allowed and which config field to change.

    The face prints it without a traceback and exits with status 2.
    """
