"""The report of an evaluation: one HTML file with curves, samples, numbers and settings, which loads nothing else.

`render` is a pure function of plain values: the same values give the same text. The page contains its style and its
script; its content security policy names them by hash and lets nothing else load or run. The curves are SVG, drawn by
matplotlib, and show without the script, which links them to the table and adds sorting, copying and enlarging.
"""

import base64
import csv
import hashlib
import io
import struct
from collections.abc import Mapping
from html import escape
from pathlib import Path

from cfg_jax.evaluation import figures, values
from cfg_jax.evaluation.columns import column
from cfg_jax.evaluation.report import svg
from cfg_jax.evaluation.report.sweep import Sweep
from cfg_jax.evaluation.style import NUM_COLORS

_WIDE, _NARROW = (828, 632), (400, 286)  # the first figure on large screens, and every figure elsewhere
_FIGURES = (  # columns of x (None: what the curves are drawn over) and y, heading, how to read it
    ('inception_score', 'fid', 'FID against Inception score', 'Lower is closer to the data; right is clearer classes.'),
    ('precision', 'fid', 'FID against precision', 'Lower is closer to the data; right is more fidelity.'),  # instead
    (None, 'fid', 'FID', 'Lower is better.'),
    (None, 'inception_score', 'Inception score', 'Higher is better.'),
    (None, 'precision', 'Precision', 'Fidelity: the share of samples that look like data.'),
    (None, 'recall', 'Recall', 'Variety: the share of the data that the samples cover.'),
    ('precision', 'recall', 'Recall against precision', 'Up is more variety; right is more fidelity.'),
)
_CHOOSING = (
    ' A name in the legend hides and shows its curve; a double click, or Shift with a click or Enter, shows it alone.'
)


def render(
    *,
    title,
    rows,
    columns,
    settings,
    references,
    grids=(),
    notes=(),
    real=None,
    ranking=(),
    ranking_columns=(),
    ranking_note='',
):
    """Return the report as HTML text.

    rows: dicts as `values` describes them, in the order to be shown, one for each guidance weight, sampler and number
    of steps. columns: the columns to tabulate; `columns.column` gives their labels and formats, and a column without
    any value is left out. settings: the config as nested dicts. references: {name: text}, what else is needed to repeat
    the numbers: judge, reference and its sha256, training step, version, date, command. grids: pairs (one of the rows,
    PNG bytes); the PNG is embedded as it is. notes: sentences that a reader must see first. real: {column: value} of
    real images, drawn as lines. ranking: a row for each curve in order, as the module `ranking` makes them, tabulated
    with its columns above all else. ranking_note: what a reader must know of it.
    """
    rows, columns = [dict(row) for row in rows], list(columns)
    sweep = Sweep(rows)
    style, script = (Path(__file__).with_name(name).read_text(encoding='utf-8') for name in ('report.css', 'report.js'))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    return _lines(
        '<!DOCTYPE html>',
        '<html lang="en">',
        '<head>',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f'<title>{_text(title)}</title>',
        f'<style>{style}</style>',
        '</head>',
        '<body>',
        '<main>',
        _header(title, rows, sweep, notes),
        _ranking_section(rows, ranking, ranking_columns, ranking_note, sweep),
        _figures_section(rows, sweep, real or {}),
        _samples_section(grids, sweep),
        _table_section(rows, columns, sweep),
        _references_section(references),
        _settings_section(settings),
        '</main>',
        '<footer><p>Made by cfg_jax. This file loads nothing else: it can be kept or sent as it is.</p>',
        '</footer>',
        '<div id="tip" role="tooltip" hidden></div>',
        f'<script>{script}</script>',
        '</body>',
        '</html>\n',
    )


def _hash(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(value):
    return escape(str(value))


def _lines(*parts):
    return '\n'.join(filter(None, parts))


def _section(name, heading, *parts):
    return _lines(f'<section aria-labelledby="{name}">', f'<h2 id="{name}">{_text(heading)}</h2>', *parts, '</section>')


# ---------------------------------------------------------------- header


def _header(title, rows, sweep, notes):
    facts = ''.join(
        f'<div><dt>{_text(name)}</dt><dd><b>{_text(value)}</b>{f"<i> ± {_text(error)}</i>" if error else ""}'
        f'<span>{_text(where)}</span></dd></div>'
        for name, value, error, where in _facts(rows, sweep)
    )
    notes = ''.join(f'<li>{_text(note)}</li>' for note in notes)
    return _lines(
        '<header>',
        '<p class="kind">Evaluation</p>',
        f'<h1>{_text(title)}</h1>',
        facts and f'<dl class="facts">{facts}</dl>',
        notes and f'<ul class="notes" aria-label="Notes">{notes}</ul>',
        '</header>',
    )


def _facts(rows, sweep):
    """Yield (name, value, its error or '', where) of the numbers that a reader looks for first."""
    several = len(rows) > 1
    for key, most, name in (('fid', 'Lowest ', 'FID'), ('inception_score', 'Highest ', 'Inception score')):
        if (index := values.best_row(rows, key)) is not None:
            row = rows[index]
            yield most * several + name, *values.show(row, key), sweep.full_name(row)
    best = values.best_row(rows, 'fid')
    if best is not None and values.has(rows[best], 'precision', 'recall'):
        precision, recall = (values.show(rows[best], key)[0] for key in ('precision', 'recall'))
        yield 'Precision / recall', f'{precision} / {recall}', '', 'at the lowest FID' if several else ''
    counts = {row['num_samples'] for row in rows if values.has(row, 'num_samples')}
    if len(counts) == 1:
        yield 'Samples', f'{counts.pop():,.0f}', '', f'at each of {len(rows)} points' if several else ''


# ---------------------------------------------------------------- the ranking


def _ranking_section(rows, ranked, columns, note, sweep):
    """Return a table with the best point of each curve; its lines are marked with their points in the figures."""
    if not ranked:
        return ''
    head = ''.join(_head(ranked, key, sweep) for key in columns)
    body = []
    for row in ranked:
        style = sweep.styles[row['variant']]
        cells = ''.join(_cell(ranked, row, key, None, _swatch(style) if key == 'variant' else '') for key in columns)
        members = sweep.curves[row['variant']]
        index = members[values.best_row([rows[index] for index in members], 'fid') or 0]
        body.append(f'<tr data-row="{index}" data-curve="{style}"{" class=tied" * (row["tie"] == "yes")}>{cells}</tr>')
    return _section(
        'ranking',
        'Ranking',
        f'<p class="lead">{_text(note)}</p>',
        '<div class="scroll" role="region" aria-labelledby="ranking" tabindex="0">',
        '<table class="numbers">',
        f'<thead><tr>{head}</tr></thead>',
        '<tbody>',
        *body,
        '</tbody>',
        '</table>',
        '</div>',
    )


# ---------------------------------------------------------------- figures


def _figures_section(rows, sweep, real):
    drawn = [_figure(rows, sweep, real, *figure) for figure in _FIGURES] if len(rows) > 1 else []
    if not any(drawn):
        return ''
    legend = ''.join(
        f'<li data-curve="{style}">{_swatch(style, line=True)}<span>{_text(name)}</span></li>'
        for name, style in sweep.styles.items()
    )
    several = len(sweep.styles) > 1
    keys = {key for figure in _FIGURES for key in figure[:2] if key}
    bars = any(values.error(row, key) for row in rows for key in keys)
    known = values.best_row(rows, 'fid') is not None
    return _section(
        'curves',
        'Fidelity and variety',
        f'<p class="lead">{"Bars show ± one standard error. " * bars}{"The ring marks the lowest FID. " * known}'
        '<span class="scripted">Point at a mark to see all of its numbers; the arrow keys walk along a curve.'
        f'{several * _CHOOSING}</span></p>',
        f'<ul class="legend">{legend}</ul>',
        '<div class="charts">',
        *drawn,
        '</div>',
    )


def _figure(rows, sweep, real, x, y, heading, caption):
    """Return a <figure>, or '' where no row has both values or nothing varies along x."""
    hero, over = x is not None and y == 'fid', x is None
    x = x or sweep.over
    left_out = (over and not sweep.varies) or (hero and x != figures.fidelity(rows))
    if left_out or not any(values.has(row, x, y) for row in rows):
        return ''
    heading += f' over {sweep.symbol}' * over
    of_curves = {name: [rows[index] for index in members] for name, members in sweep.curves.items()}
    curves = [
        figures.Curve(of_curve, sweep.over_of(of_curve), name, sweep.styles[name], sweep.curves[name])
        for name, of_curve in of_curves.items()
    ]
    shown = [key for key in (x, y) if key != sweep.over]
    texts = [f'{sweep.full_name(row)}: {", ".join(values.show_named(row, key) for key in shown)}' for row in rows]
    charts = []
    for css, size in {'wide': _WIDE, 'narrow': _NARROW}.items() if hero else [('', _NARROW)]:
        options = {'best': values.best_row(rows, 'fid'), 'real': real, 'salt': heading + css}
        drawn = figures.chart(curves, x, y, size=size, **options)
        charts.append(svg.as_html(drawn, name=heading, css=css, texts=texts))
    return _lines(
        '<figure class="hero">' if hero else '<figure>',
        f'<figcaption><h3>{_text(heading)}</h3><p>{_text(caption)}</p></figcaption>',
        *charts,
        '</figure>',
    )


def _swatch(number, *, line=False):
    """Return the marker of a curve, and if asked for its line, as it stands in legends."""
    css = f'swatch k{number % NUM_COLORS}' + f' line {figures.dash(number)}' * line
    return f'<span class="{css}" aria-hidden="true"><b>{figures.swatch(number)}</b></span>'


# ---------------------------------------------------------------- samples


def _samples_section(grids, sweep):
    """Return pictures of the same noise side by side, a group for each curve."""
    groups = {}
    for row, png in grids:
        groups.setdefault(sweep.name(row), []).append((row, png))
    if not groups:
        return ''
    parts = []
    if any(len(members) > 1 for members in groups.values()):
        parts.append(
            f'<p class="lead">The same noise at every {sweep.symbol}.<span class="scripted"> Click a picture to '
            'enlarge it; the arrow keys then show its neighbours in the same place.</span></p>'
        )
    for name, members in groups.items():
        if len(groups) > 1:
            parts.append(f'<h3 class="group">{_swatch_of(sweep, members[0][0])}{_text(name)}</h3>')
        parts += ['<div class="samples">', *(_sample(sweep, row, png) for row, png in members), '</div>']
    return _section('samples', 'Samples', *parts)


def _sample(sweep, row, png):
    if png[:8] != b'\x89PNG\r\n\x1a\n':
        raise ValueError('a grid of samples must be a PNG file')
    width, height = struct.unpack('>II', png[16:24])  # of its header
    keys = [key for key in ('fid', 'inception_score') if values.has(row, key)]
    shown = ' · '.join(values.show_named(row, key, with_error=False) for key in keys)
    alt = f'Samples at {sweep.full_name(row)}' if sweep.weight(row) else 'Samples'
    small = ' class="pixelated"' if width < 160 else ''  # it is shown enlarged
    return (
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" width="{width}" height="{height}" '
        f'loading="lazy" decoding="async"{small} alt="{_text(alt)}">'
        f'<figcaption><b>{_text(sweep.weight(row) or sweep.name(row))}</b> <span>{_text(shown)}</span></figcaption>'
        '</figure>'
    )


def _swatch_of(sweep, row):
    """Return the marker of the row's curve, if there are several curves."""
    style = sweep.styles.get(sweep.name(row))
    return _swatch(style) if style is not None and len(sweep.styles) > 1 else ''


# ---------------------------------------------------------------- tables


def _table_section(rows, columns, sweep):
    errors = {f'{key}_error' for key in columns}
    shown = [key for key in columns if key not in errors and any(not values.is_missing(row.get(key)) for row in rows)]
    best = {key: values.best_value(rows, key) for key in shown}
    head = ''.join(_head(rows, key, sweep) for key in shown)
    body = [
        f'<tr data-row="{index}" data-curve="{sweep.styles[sweep.name(row)]}" '
        f'data-name="{_text(sweep.full_name(row))}">'
        + ''.join(_cell(rows, row, key, best[key], _swatch_of(sweep, row) if key == shown[0] else '') for key in shown)
        + '</tr>'
        for index, row in enumerate(rows)
    ]
    marked = any(value is not None for value in best.values())
    letters = ''.join(f'{each.label}: {each.meaning}. ' for each in map(column, shown) if each.label == each.symbol)
    return _section(
        'numbers',
        'All numbers',
        f'<p class="lead">{_text(letters)}{"The best value of each column is underlined. " * marked}'
        '<span class="scripted">Click a column’s name to sort by it. '
        '<button type="button" id="copy">Copy as CSV</button></span></p>',
        '<div class="scroll" role="region" aria-labelledby="numbers" tabindex="0">',
        '<table id="results" class="numbers">',
        f'<thead><tr>{head}</tr></thead>',
        '<tbody>',
        *body,
        '</tbody>',
        '</table>',
        '</div>',
        f'<textarea id="csv" readonly hidden aria-label="The table as CSV">\n{_text(_as_csv(rows, columns))}'
        '</textarea>',
    )


def _as_csv(rows, columns):
    """Return the rows as CSV in full precision, each column followed by its error if any row has one."""
    keys = []
    for key in columns:
        errors = [f'{key}_error'] if any(values.has(row, f'{key}_error') for row in rows) else []
        keys += [each for each in (key, *errors) if each not in keys]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(keys)
    for row in rows:
        writer.writerow(['' if values.is_missing(row.get(key)) else row[key] for key in keys])
    return text.getvalue()


def _head(rows, key, sweep):
    """Return a column's head. data-name is its name in a point's list of numbers, '' if the list's title states it."""
    shown, kind = column(key), '' if values.is_textual(rows, key) else ' class="number"'
    name = '' if key in sweep.naming else shown.label
    arrow = f' <i>{shown.arrow}</i>' if shown.arrow else ''
    return (
        f'<th scope="col"{kind} data-name="{_text(name)}" title="{_text(shown.meaning)}">'
        f'{_text(shown.label)}{arrow}</th>'
    )


def _cell(rows, row, key, best, swatch):
    value, kind = row.get(key), '' if values.is_textual(rows, key) else ' class="number"'
    sort = '' if values.is_missing(value) else _text(float(value) if values.is_number(value) else value)
    shown, error = map(_text, values.show(row, key))
    if best is not None and values.has(row, key) and value == best:
        shown = f'<strong>{shown}<span class="unseen"> (best)</span></strong>'
    if error:
        shown += f'<i> ± {error}</i>'
    return f'<td{kind} data-value="{sort}">{swatch}{shown}</td>'


def _references_section(references):
    items = ''.join(
        f'<div><dt>{_text(name)}</dt><dd>{_words(values.MISSING if values.is_missing(value) else value)}</dd></div>'
        for name, value in references.items()
    )
    return items and _section('origin', 'Where the numbers come from', f'<dl class="origin">{items}</dl>')


def _words(value):
    """Return the words of a text so that lines break between them and not at the hyphens of flags."""
    return ' '.join(f'<span>{_text(word)}</span>' for word in str(value).split(' '))


def _settings_section(settings):
    """Return a foldable table for each part of the config, and one for the fields outside all parts."""
    parts = {'general': {key: value for key, value in settings.items() if not isinstance(value, Mapping)}}
    parts |= {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    folds = [
        f'<details><summary>{_text(name)}</summary><table><tbody>{_settings_lines(part)}</tbody></table></details>'
        for name, part in parts.items()
        if part
    ]
    return folds and _section('settings', 'Settings', '<div class="folds">', *folds, '</div>')


def _settings_lines(part):
    return ''.join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(_setting(value))}</td></tr>' for key, value in _flat(part)
    )


def _flat(part, prefix=''):
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def _setting(value):
    """Return a setting's value as text; empty texts and sequences are written as '' and ()."""
    if isinstance(value, (list, tuple)):
        return ', '.join(map(str, value)) or '()'
    return "''" if value == '' else value
