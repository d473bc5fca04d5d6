"""The values of rows: which are missing, how they are written, which are best.

A row is a dict of numbers and texts. A value that is absent, None, '' or not finite is missing; the error of a
column stands under '<name>_error'.
"""

import math
import numbers

from cfg_jax.evaluation.columns import column

MISSING = '–'


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_missing(value):
    return value is None or value == '' or (is_number(value) and not math.isfinite(value))


def has(row, *names):
    """Return True if the row has a finite number under each name."""
    return all(is_number(row.get(name)) and not is_missing(row[name]) for name in names)


def error(row, name):
    """Return the error of a column's value, 0 if it is unknown."""
    return float(row[f'{name}_error']) if has(row, f'{name}_error') else 0.0


def show(row, name):
    """Return a value as text, and its error as text or ''."""
    value, spec = row.get(name), column(name).format
    if is_missing(value):
        return MISSING, ''
    if not is_number(value):
        return str(value), ''
    return f'{float(value):{spec}}', f'{error(row, name):{spec}}' if has(row, f'{name}_error') else ''


def show_named(row, name, *, with_error=True):
    """Return 'FID 1.080 ± 0.021'."""
    value, deviation = show(row, name)
    return f'{column(name).label} {value}' + (f' ± {deviation}' if deviation and with_error else '')


def is_textual(rows, name):
    """Return True if the column holds anything but numbers."""
    return any(not is_missing(row.get(name)) and not is_number(row[name]) for row in rows)


def best_row(rows, name):
    """Return the index of the first row with the best value of a column, or None."""
    sign = -1 if column(name).better == 'higher' else 1
    known = [index for index, row in enumerate(rows) if has(row, name)]
    return min(known, key=lambda index: sign * rows[index][name], default=None)


def best_value(rows, name):
    """Return the value to mark in a column, or None where there is nothing to choose."""
    differ = len({row[name] for row in rows if has(row, name)}) > 1
    return rows[best_row(rows, name)][name] if differ and column(name).better else None
