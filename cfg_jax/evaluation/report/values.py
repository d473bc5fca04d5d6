"""What rows of an evaluation mean and how their numbers are written: columns, curves, CSV. The standard library alone.

A row is a dict of numbers and texts. What is absent, None, '' or not finite is missing; the error of a column stands
under '<column>_error'.
"""

import csv
import io
import math
import numbers
from typing import NamedTuple

MISSING = '–'
# What a curve may be drawn over, the first that varies: its sign and its name.
OVER = {
    'guidance_weight': ('w', 'guidance weight w'),
    'classifier_weight': ('c', 'classifier weight c'),
    'num_steps': ('T', 'steps T'),
}


class Column(NamedTuple):
    """How a value is shown. better: 'lower', 'higher', or '' where neither is."""

    label: str
    spec: str = '.6g'
    better: str = ''
    meaning: str = ''

    @property
    def arrow(self):
        return {'lower': '↓', 'higher': '↑', '': ''}[self.better]


COLUMNS = {
    'guidance_weight': Column('w', 'g', meaning='guidance weight; 0 is no guidance'),
    'classifier_weight': Column('c', 'g', meaning='weight of the classifier’s gradient; 0 is none'),
    'sampler': Column('sampler'),
    'num_steps': Column('steps', ',.0f', meaning='steps of the sampler'),
    'fid': Column('FID', '.3f', 'lower', 'Fréchet distance to the reference'),
    'fid_infinity': Column('FID∞', '.3f', 'lower', 'FID extrapolated to infinitely many samples'),
    'sfid': Column('sFID', '.3f', 'lower', 'Fréchet distance of spatial features'),
    'kernel_distance': Column('KID', '.5f', 'lower', 'unbiased squared kernel distance'),
    'inception_score': Column('IS', '.3f', 'higher', 'Inception score'),
    'precision': Column('precision', '.3f', 'higher', 'share of the samples within the reference’s manifold'),
    'recall': Column('recall', '.3f', 'higher', 'share of the reference within the samples’ manifold'),
    'accuracy': Column('accuracy', '.4f', 'higher', 'share of the samples that the judge puts into their class'),
    'spread': Column('spread', '.3f', meaning='root mean squared distance to the class mean of the features'),
    'num_samples': Column('samples', ',.0f'),
    'seed': Column('seed', '.0f'),
    'seconds_per_image': Column('s / image', '.3g', meaning='seconds an image'),
    'network_evaluations': Column('evaluations', ',.0f', meaning='evaluations of the network for one image'),
    'classifier_gradients': Column('gradients', ',.0f', meaning='gradients of the classifier for one image'),
}


def column(key):
    return COLUMNS.get(key) or Column(str(key).replace('_', ' '))


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_missing(value):
    return value is None or value == '' or (is_number(value) and not math.isfinite(value))


def has(row, *keys):
    """Whether the row has a finite number under each key."""
    return all(is_number(row.get(key)) and not is_missing(row[key]) for key in keys)


def error(row, key):
    """The error of a column's value, 0 where it is unknown."""
    return float(row[f'{key}_error']) if has(row, f'{key}_error') else 0.0


def show(row, key):
    """The value as text, and its error as text, '' where it is unknown."""
    value, spec = row.get(key), column(key).spec
    if is_missing(value):
        return MISSING, ''
    if not is_number(value):
        return str(value), ''
    return f'{float(value):{spec}}', f'{error(row, key):{spec}}' if has(row, f'{key}_error') else ''


def show_named(row, key, *, with_error=True):
    """'FID 1.080 ± 0.021'."""
    value, deviation = show(row, key)
    return f'{column(key).label} {value}' + (f' ± {deviation}' if deviation and with_error else '')


def is_textual(rows, key):
    """Whether a column holds anything but numbers."""
    return any(not is_missing(row.get(key)) and not is_number(row[key]) for row in rows)


def best_row(rows, key):
    """The index of the first row with the best value of a column, or None."""
    sign = -1 if column(key).better == 'higher' else 1
    known = [index for index, row in enumerate(rows) if has(row, key)]
    return min(known, key=lambda index: sign * rows[index][key], default=None)


def best_value(rows, key):
    """The value to mark in a column, or None where there is nothing to choose."""
    differ = len({row[key] for row in rows if has(row, key)}) > 1
    return rows[best_row(rows, key)][key] if differ and column(key).better else None


class Sweep:
    """How rows fall into curves: what they are drawn over, and what tells one curve from another.

    curves: {name: indices of its rows, in the order of the weight}.
    """

    def __init__(self, rows):
        varying = [key for key in OVER if len({row[key] for row in rows if has(row, key)}) > 1]
        self.varies = bool(varying)
        self.over = varying[0] if varying else 'guidance_weight'
        self.symbol, self.axis = OVER[self.over]
        self._apart = [key for key in varying[1:] if key != 'num_steps']  # steps are named in any case
        order = sorted(range(len(rows)), key=lambda index: rows[index][self.over] if has(rows[index], self.over) else 0)
        names = dict.fromkeys(map(self.name, rows))
        self.curves = {name: [index for index in order if self.name(rows[index]) == name] for name in names}
        self.styles = {name: style for style, name in enumerate(self.curves)}
        self.naming = {self.over, 'sampler', 'num_steps', *self._apart}  # the columns that full_name states

    def name(self, row):
        """What the row's curve is called."""
        parts = [] if is_missing(row.get('sampler')) else [str(row['sampler'])]
        if has(row, 'num_steps') and self.over != 'num_steps':
            parts.append(f'{show(row, "num_steps")[0]} steps')
        parts += [f'{OVER[key][0]} = {show(row, key)[0]}' for key in self._apart]
        return ', '.join(parts) or 'samples'

    def weight(self, row):
        """'w = 0.3'."""
        return f'{self.symbol} = {show(row, self.over)[0]}'

    def full_name(self, row):
        return f'{self.weight(row)}, {self.name(row)}'


def as_csv(rows, columns):
    """The rows in full precision, each column followed by its error where there is one; missing values are empty."""
    keys = []
    for key in columns:
        errors = [f'{key}_error'] if any(has(row, f'{key}_error') for row in rows) else []
        keys += [each for each in (key, *errors) if each not in keys]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(keys)
    for row in rows:
        writer.writerow(['' if is_missing(row.get(key)) else row[key] for key in keys])
    return text.getvalue()
