"""The ranking of curves by their least FID: ranking.csv, a table of the report, and lines to print."""

import math

from cfg_jax.evaluation import values
from cfg_jax.evaluation.columns import column
from cfg_jax.evaluation.report.sweep import Sweep

SIGMAS = 2  # standard errors of a difference below which two FIDs tie
COLUMNS = (
    *('rank', 'variant', 'fid', 'fid_error', 'tie', 'guidance_weight', 'classifier_weight', 'interval'),
    *('search_fid', 'precision', 'recall', 'network_evaluations', 'classifier_gradients', 'seconds_per_image'),
    *('num_samples', 'sampler', 'num_steps', 'overrides'),
)
IN_REPORT = tuple(name for name in COLUMNS if name not in ('rank', 'fid_error', 'num_samples', 'sampler', 'num_steps'))
MEANING = f'tie: no more than {SIGMAS} standard errors of the difference, sqrt(e1² + e2²), above the first'


def rank(rows):
    """Return a row for each curve, its row of least FID with 'rank' and 'tie', by increasing FID.

    rows: of all curves. variant: the name of the curve. tie: 'first' for the first, then 'yes' where FID is within
    SIGMAS combined standard errors of the first's, 'no' where it is above, '' where an error is not known. Curves
    without FID come last, with the first of their rows and without a rank.
    """
    sweep = Sweep(rows)
    best = []
    for name, members in sweep.curves.items():
        of_curve = [rows[index] for index in members]
        place = values.best_row(of_curve, 'fid')
        best.append({**of_curve[place or 0], 'variant': name})
    best.sort(key=lambda row: row['fid'] if values.has(row, 'fid') else math.inf)
    ranked = []
    for number, row in enumerate(best, 1):
        known = values.has(row, 'fid')
        ranked.append({**row, 'rank': number if known else None, 'tie': _tie(best[0], row, number) if known else ''})
    return ranked


def _tie(first, row, number):
    """Return the value of the column 'tie'."""
    if number == 1:
        return 'first'
    if not values.has(first, 'fid_error') or not values.has(row, 'fid_error'):
        return ''
    combined = math.hypot(first['fid_error'], row['fid_error'])
    return 'yes' if row['fid'] - first['fid'] <= SIGMAS * combined else 'no'


def columns_of(ranked, columns=COLUMNS):
    """Return those of these columns that some row needs: not, say, those of searches where there was none."""
    optional = ('classifier_weight', 'classifier_gradients', 'interval', 'search_fid', 'overrides')
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
    table = [('', 'variant', 'FID', '', 'at', 'precision', 'recall', 'evaluations', 's / image')]
    for row in ranked:
        fid, error = values.show(row, 'fid')
        tie = 'tie' if row['tie'] == 'yes' else ''
        rest = (values.show(row, key)[0] for key in ('precision', 'recall', 'network_evaluations', 'seconds_per_image'))
        fid += f' ± {error}' if error else ''
        table.append((values.show(row, 'rank')[0], str(row['variant']), fid, tie, where(row), *rest))
    widths = [max(map(len, cells)) for cells in zip(*table)]
    text = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return [f'ranking by {column("fid").label} ({MEANING})', *text]
