"""The CSV files of an evaluation: tradeoff.csv and costs.csv of a folder, results.csv of a whole workdir."""

import csv
import io
import math

from cfg_jax.errors import UserError
from cfg_jax.evaluation.columns import IDENTITY, NUMERIC, RESULTS, column


def as_csv(rows, columns):
    """Return the rows as CSV text with these columns; numbers have six digits.

    Raises UserError for NaN and infinity.
    """
    return _written([list(columns), *([_cell(row.get(name), name) for name in columns] for row in rows)])


def _written(lines):
    """Return lists of texts as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(lines)
    return text.getvalue()


def _text(value):
    """Return a value as text of a file: bytes of file names that are not text become \\udcff."""
    return '' if value is None else str(value).encode(errors='backslashreplace').decode()


def _cell(value, name):
    """Return a value as it stands in a file."""
    if not isinstance(value, float):
        return _text(value)
    if not math.isfinite(value):
        raise UserError(
            f'{column(name).label} is {value}, not a finite number, and is not written: check the samples and the '
            'judge (config.eval.judge).'
        )
    return f'{value + 0.0:.6g}'  # 0.0 makes -0 a 0


def _read(path):
    """Return (columns, rows of texts) of a CSV file, with or without a spreadsheet's byte order mark.

    Of columns of the same name each row keeps the first that is not empty. Raises ValueError for any other file.
    """
    text = path.read_text('utf-8-sig') if path.exists() else ''
    names, *lines = list(csv.reader(io.StringIO(text, newline=''))) or [[]]
    if len(names) == 1 and ';' in names[0]:
        raise ValueError('its columns are separated by semicolons, not commas')
    rows = []
    for line in filter(None, lines):
        if len(line) > len(names):
            raise ValueError('a row has more fields than the first line has names')
        row = dict.fromkeys(names, '')
        for name, value in zip(names, line):
            row[name] = row[name] or value
        rows.append(row)
    return list(dict.fromkeys(names)), rows


def read_csv(path):
    """Read a file that `as_csv` wrote: a list of rows, with floats in the columns of numbers."""
    try:
        if not path.exists():
            raise OSError('no such file')
        return [
            {key: float(value or 'nan') if key in NUMERIC else value for key, value in row.items()}
            for row in _read(path)[1]
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be read: {error} (config.eval.compare_with).') from None


def read_curve(folder):
    """Read the rows of an evaluation's folder, with their costs."""
    return [{**row, **cost} for row, cost in zip(read_csv(folder / 'tradeoff.csv'), read_csv(folder / 'costs.csv'))]


def read_all(path):
    """Read a results.csv: (its columns, some of them perhaps its owner's, and ours; rows of texts, [] if missing)."""
    try:
        names, rows = _read(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be read to add rows to it: {error}; repair or rename it.') from None
    return list(dict.fromkeys([*names, *RESULTS])), rows


def merged(former, rows):
    """Return the rows of a results.csv with `rows` added: (rows of texts, the number of former rows replaced).

    A row of the same identity is replaced in its place; its owner's columns stay.
    """
    rows = [{name: _cell(row.get(name), name) for name in RESULTS} for row in rows]
    places = {}
    for place, row in enumerate(former):
        places.setdefault(_identity(row), place)
    every, replaced = list(former), 0
    for row in rows:
        place = places.setdefault(_identity(row), len(every))
        if place < len(every):
            every[place], replaced = {**every[place], **row}, replaced + 1
        else:
            every.append(row)
    return every, replaced


def _identity(row):
    """Return what tells the experiments of two rows of texts apart: the settings, and the images that were given."""
    given = ('samples_sha256',) if row.get('samples') else ()
    return tuple(_normal(row.get(name) or column(name).unset, name) for name in (*IDENTITY, *given))


def _normal(text, name):
    """Return a text as it is after spreadsheets have written numbers and True in their own way."""
    try:
        return float(text) if name in NUMERIC else text.strip().casefold()
    except ValueError:
        return text


def accuracy_table(class_names, by_class):
    """Return CSV text with a row for each class and a column for each (name, accuracies by class) of `by_class`.

    A class without images has no number.
    """
    lines = [['class', *(name for name, _ in by_class)]]
    for label, class_name in enumerate(class_names):
        values = (accuracies[label] for _, accuracies in by_class)
        lines.append([_text(class_name), *('' if math.isnan(value) else f'{value:.4g}' for value in values)])
    return _written(lines)
