"""The CSV files of an evaluation: tradeoff.csv and costs.csv of a folder, results.csv of a whole workdir."""

import csv
import io

from cfg_jax.errors import UserError
from cfg_jax.evaluation.columns import NUMERIC, RESULTS


def as_csv(rows, columns):
    """Return the rows as CSV text with these columns; numbers have six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n', extrasaction='ignore')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def read_csv(path):
    """Read a file that `as_csv` wrote: a list of rows, with floats in the columns of numbers."""
    try:
        return [
            {key: float(value or 'nan') if key in NUMERIC else value for key, value in row.items()}
            for row in csv.DictReader(path.read_text().splitlines())
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be read: {error} (config.eval.compare_with).') from None


def read_curve(folder):
    """Read the rows of an evaluation's folder, with their costs."""
    return [{**row, **cost} for row, cost in zip(read_csv(folder / 'tradeoff.csv'), read_csv(folder / 'costs.csv'))]


def read_all(path):
    """Read a results.csv, which may have columns of its owner's: (columns, rows). A missing file has no rows."""
    try:
        former = csv.DictReader(path.read_text().splitlines()) if path.exists() else None
        rows = list(former or ())
        if any(None in row for row in rows):
            raise ValueError('a row has more fields than the first line has names')
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be read to add rows to it: {error}; repair or rename it.') from None
    return list(dict.fromkeys([*(former.fieldnames or () if former else ()), *RESULTS])), rows


def accuracy_table(class_names, by_class):
    """Return CSV text with a row for each class and a column for each (name, accuracies by class) of `by_class`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['class', *(name for name, _ in by_class)])
    for label, class_name in enumerate(class_names):
        writer.writerow([class_name, *(f'{accuracies[label]:.4g}' for _, accuracies in by_class)])
    return text.getvalue()
