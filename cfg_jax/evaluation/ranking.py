"""The ranking of curves by their least FID: ranking.csv, a table of the report, and lines to print."""

import math

import numpy as np

from cfg_jax import metrics
from cfg_jax.evaluation import values
from cfg_jax.evaluation.columns import column
from cfg_jax.evaluation.report.sweep import Sweep

SIGMAS = 2  # standard errors of a difference below which two FIDs tie
COLUMNS = (
    *(
        'rank',
        'variant',
        'fid',
        'fid_error',
        'tie',
        'fid_above',
        'fid_above_error',
        'guidance_weight',
        'classifier_weight',
        'interval',
    ),
    *('search_fid', 'precision', 'recall', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('num_samples', 'sampler', 'num_steps', 'overrides'),
)
IN_REPORT = tuple(
    name
    for name in COLUMNS
    if name not in ('rank', 'fid_error', 'fid_above_error', 'num_samples', 'sampler', 'num_steps')
)
MEANING = f'tie: no more than {SIGMAS} standard errors of the difference above the first'


def rank(rows, influences=None):
    """Return a row for each curve, its row of least FID with 'rank' and 'tie', by increasing FID.

    rows: of all curves. variant: the name of the curve. fid_above: how far FID is above the first's, with the error of
    that difference. tie: 'first' for the first, then 'yes' where the difference is within SIGMAS errors, 'no' where it
    is more, '' where an error is not known. Curves without FID come last, with the first of their rows and without a
    rank. influences: of each row's images on its FID, [N]. With them, image i of one set is paired with image i of the
    other, which starts from the same noise if the seeds are equal; without them the sets count as independent.
    """
    influences = [None] * len(rows) if influences is None else influences
    sweep = Sweep(rows)
    best = []
    for name, members in sweep.curves.items():
        place = members[values.best_row([rows[index] for index in members], 'fid') or 0]
        best.append(({**rows[place], 'variant': name}, influences[place]))
    best.sort(key=lambda pair: pair[0]['fid'] if values.has(pair[0], 'fid') else math.inf)
    ranked, first = [], best[0]
    for number, each in enumerate(best, 1):
        row, known = each[0], values.has(each[0], 'fid')
        found = {'rank': number if known else None, 'tie': 'first' if known and number == 1 else ''}
        if known and number > 1 and (error := _error_of_difference(first, each)) is not None:
            above = row['fid'] - first[0]['fid']
            found |= {'fid_above': above, 'fid_above_error': error, 'tie': 'yes' if above <= SIGMAS * error else 'no'}
        ranked.append({**row, **found})
    return ranked


def _error_of_difference(first, other):
    """Return the standard error of the difference of two FIDs, each a (row, influences); None if it is not known."""
    (row_a, a), (row_b, b) = first, other
    if a is not None and b is not None and len(a) == len(b):
        return metrics.standard_error(np.asarray(a) - np.asarray(b))
    if values.has(row_a, 'fid_error') and values.has(row_b, 'fid_error'):
        return math.hypot(row_a['fid_error'], row_b['fid_error'])
    return None


def columns_of(ranked, columns=COLUMNS):
    """Return those of these columns that some row needs: not, say, those of searches where there was none."""
    optional = (
        'fid_above',
        'fid_above_error',
        'classifier_weight',
        'classifier_gradients',
        'interval',
        'search_fid',
        'overrides',
    )
    return [name for name in columns if name not in optional or any(row.get(name) for row in ranked)]


def note(ranked, *, searched=False):
    """Return the sentences that a reader of the ranking needs."""
    if len(ranked) < 2:
        return ''
    tied = sum(row['tie'] == 'yes' for row in ranked)
    text = (
        f'By the least FID of each. A tie is within {SIGMAS} standard errors of the difference to the first, so that '
        f'these samples cannot tell the two apart: {tied or "none"} of {len(ranked) - 1}.'
    )
    return text if searched else f'{text} The least of several is too low on average, the more so with more weights.'


def where(row):
    """Return the place of a row on its curve: 'w = 0.3', 'w = 0, c = 2, λ from -3 to 2'."""
    parts = [f'w = {values.show(row, "guidance_weight")[0]}'] if values.has(row, 'guidance_weight') else []
    if values.has(row, 'classifier_weight') and row['classifier_weight']:
        parts.append(f'c = {values.show(row, "classifier_weight")[0]}')
    if not values.is_missing(row.get('interval')):
        parts.append(f'λ {row["interval"]}')
    return ', '.join(parts)


def lines(ranked):
    """Return a ranking as lines of text to print, in columns."""
    table = [('', 'variant', 'FID', 'above the first', '', 'at', 'precision', 'recall', 'evaluations', 's / image')]
    for row in ranked:
        fid, error = values.show(row, 'fid')
        tie = 'tie' if row['tie'] == 'yes' else ''
        rest = (values.show(row, key)[0] for key in ('precision', 'recall', 'network_evaluations', 'seconds_per_image'))
        fid += f' ± {error}' if error else ''
        above = ' ± '.join(filter(None, values.show(row, 'fid_above'))) if values.has(row, 'fid_above') else ''
        table.append((values.show(row, 'rank')[0], str(row['variant']), fid, above, tie, where(row), *rest))
    widths = [max(map(len, cells)) for cells in zip(*table)]
    text = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return [f'ranking by {column("fid").label} ({MEANING})', *text]
