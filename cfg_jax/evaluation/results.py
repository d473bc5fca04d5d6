"""The tables of an evaluation: tradeoff.csv and costs.csv of a folder, results.csv of everything in a workdir."""

import csv
import io

from cfg_jax.errors import UserError

COLUMNS = (
    'guidance_weight',
    'fid',
    'inception_score',
    'precision',
    'recall',
    'accuracy',
    'spread',
    'num_samples',
    'num_steps',
    'sampler',
    'seed',
)
# costs.csv: what one image of each row costs, and what it was measured with
COSTS = (
    'guidance_weight',
    'classifier_weight',
    'network_evaluations',
    'classifier_gradients',
    'seconds_per_image',
    'judge',
    'reference_sha256',
)
# results.csv, to which every evaluation adds its rows
RESULTS = (
    *('date', 'samples', 'step', 'sampler', 'num_steps', 'guidance_weight', 'classifier_weight'),
    *('fid', 'fid_error', 'fid_infinity', 'sfid', 'inception_score', 'inception_score_error', 'precision'),
    *('precision_error', 'recall', 'recall_error', 'kernel_distance', 'kernel_distance_error', 'accuracy', 'spread'),
    *('num_samples', 'seed', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('judge', 'reference', 'reference_sha256', 'samples_sha256'),
)


def as_csv(rows, columns):
    """The rows as CSV text with these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n', extrasaction='ignore')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def read_csv(path):
    """A file of `as_csv` as rows of numbers, where they are numbers."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        numbers = set(COLUMNS + COSTS) - {'sampler', 'judge', 'reference_sha256'}
        return [{key: float(value or 'nan') if key in numbers else value for key, value in row.items()} for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be read: {error} (config.eval.compare_with).') from None


def read_curve(folder):
    """The rows that an evaluation wrote into a folder, with their costs."""
    return [{**row, **cost} for row, cost in zip(read_csv(folder / 'tradeoff.csv'), read_csv(folder / 'costs.csv'))]


def read_all(path):
    """(columns, rows) of a results.csv, which may have columns of its owner's; RESULTS and none where there is none."""
    try:
        former = csv.DictReader(path.read_text().splitlines()) if path.exists() else None
        rows = list(former or ())
        if any(None in row for row in rows):
            raise ValueError('a row has more fields than the first line has names')
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be added to: {error}; move it aside.') from None
    return list(dict.fromkeys([*(former.fieldnames or () if former else ()), *RESULTS])), rows


def accuracy_table(class_names, by_class):
    """CSV text: a row a class, a column for each (name, accuracy of every class) of `by_class`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['class', *(name for name, _ in by_class)])
    for label, class_name in enumerate(class_names):
        writer.writerow([class_name, *(f'{accuracies[label]:.4g}' for _, accuracies in by_class)])
    return text.getvalue()
