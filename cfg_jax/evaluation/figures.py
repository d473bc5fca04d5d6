"""The plots of evaluations and of data sets, each as a `style.Picture`, or as SVG text for a page."""

import dataclasses
import textwrap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cfg_jax.evaluation import style, values
from cfg_jax.evaluation.columns import SYMBOLS, column
from cfg_jax.evaluation.style import NUM_COLORS, PALETTE

# matplotlib's markers, one for each colour, and the same as letters: full, and hollow
_MARKERS = (('o', '●○'), ('s', '■□'), ('^', '▲△'), ('D', '◆◇'), ('v', '▼▽'), ('P', '✚✛'))
DASHES = ('solid', 'dotted', 'dashed', 'dashdot')  # of the first six curves, the next six, ...
_REAL = {'inception_score': 'data', 'fid': 'data halves'}  # beside the lines of real images
_WRITTEN = 20  # more classes than these are drawn without their names and numbers
_CROWD = 6  # more curves than these have no labels but the best point's
# Distances of labels from their points, in pixels: the best point's, which has a ring; those of a curve's ends; others.
_DISTANCES = ((11, 17, 26, 38), (7, 13, 22), (7, 13))


@dataclasses.dataclass(frozen=True)
class Curve:
    """Rows to draw as one line, in order; a row without a value interrupts it.

    over: the column whose values are written beside the points. label: the name in a legend. style: the number of its
    colour and marker. ids: a number for each row, by default its place.
    """

    rows: Sequence[dict]
    over: str
    label: str = ''
    style: int = 0
    ids: Sequence[int] = ()

    def points(self, x, y):
        """Return the points' ids, their places and their errors, float [N, 2] each; missing places are NaN."""
        known = [(float(row[x]), float(row[y])) if values.has(row, x, y) else (np.nan, np.nan) for row in self.rows]
        errors = [(values.error(row, x), values.error(row, y)) for row in self.rows]
        return self.ids or range(len(self.rows)), np.array(known), np.array(errors)

    def tag(self, index, *, full=False):
        """Return the text beside a point: 'w = 0.3', or between the curve's ends '0.3'."""
        value = values.show(self.rows[index], self.over)[0]
        return f'{SYMBOLS[self.over]} = {value}' if full or index in (0, len(self.rows) - 1) else value


def swatch(number):
    """Return the marker of curves of this style as a letter."""
    return _marker(number)[1][_is_hollow(number)]


def dash(number):
    """Return the line of curves of this style, one of `DASHES`."""
    return DASHES[number // NUM_COLORS % len(DASHES)]


def _marker(number):
    """Return the entry of _MARKERS of a style: the third and fourth six have other markers in the same colours."""
    return _MARKERS[(number + 3 * (number // (2 * NUM_COLORS))) % NUM_COLORS]


def _is_hollow(number):
    return number // NUM_COLORS % 2 == 1


def _of(curve):
    """Return the word of a gid that tells the curve."""
    return f'curve{curve.style}'


def _color(curve):
    return PALETTE[f'c{curve.style % NUM_COLORS}']


def _look(curve):
    """Return the arguments of matplotlib that give a curve its colour, line and markers."""
    look = {'color': _color(curve), 'linestyle': dash(curve.style), 'marker': _marker(curve.style)[0]}
    return look | {'markerfacecolor': PALETTE['paper']} if _is_hollow(curve.style) else look


def chart(curves, x, y, *, size, salt, best=None, real=None):
    """Draw the column y over the column x, as SVG text.

    Every part of a curve has the word 'curve3' of its style in its gid. Of more than _CROWD curves, the labels have the
    word 'alone': they are for a page that shows that curve alone.

    size: (width, height) in pixels, of which letters have 12. salt: makes the ids within the SVG its own. best: the id
    of the point that gets a ring. real: {column: value} of real images, drawn as lines.
    """
    with style.figure(size, salt=salt) as (figure, axis):
        figure.patch.set_visible(False), axis.patch.set_visible(False)
        _write_labels(figure, [_draw(axis, curves, x, y, best=best, real=real)], alone=True)
        return style.svg(figure, fonts='letters')


def tradeoff(rows, *, title, over='guidance_weight', real=None):
    """Draw figures 1 and 4 of the CFG paper: FID against Inception score, and both over w; a `style.Picture`.

    Precision takes the Inception score's place where the judge has no logits.

    rows: dicts with fid, inception_score or precision, and the weight named by `over`, increasing. real: {column:
    value} of real images, drawn as lines.
    """
    curve, best = Curve(rows, over), values.best_row(rows, 'fid')
    measure = fidelity(rows)
    plots = (measure, 'fid'), (over, 'fid'), (over, measure)
    with style.figure((680, 440), mosaic='ab;ac', width_ratios=(1.6, 1)) as (figure, axes):
        options = {'best': best, 'real': real}
        labels = [_draw(axis, [curve], x, y, **options) for axis, (x, y) in zip(axes.values(), plots)]
        figure.suptitle(_title(title))
        _write_labels(figure, labels)
        return style.picture(figure)


def comparison(curves, *, title):
    """Draw FID against Inception score (or precision), a line for each of several ways to guide; a `style.Picture`.

    curves: {name: rows}; rows as in `tradeoff`, with guidance_weight, classifier_weight and the columns of costs.csv.
    """
    drawn = []
    for number, (name, rows) in enumerate(curves.items()):
        one = len({row['guidance_weight'] for row in rows}) == 1
        over = 'classifier_weight' if one and any(row['classifier_weight'] for row in rows) else 'guidance_weight'
        evaluations, gradients = (  # fewer at w = 0
            max(row[key] for row in rows) for key in ('network_evaluations', 'classifier_gradients')
        )
        cost = f'{evaluations:.0f} evaluation{"s" * (evaluations != 1)}'
        if gradients:
            cost += f', {gradients:.0f} classifier gradients'
        milliseconds = 1e3 * np.median([row['seconds_per_image'] for row in rows])
        drawn.append(Curve(rows, over, f'{style.drawable(name)}: {cost}, {milliseconds:.1f} ms per image', number))
    with style.figure((680, 440 + 20 * len(drawn))) as (figure, axis):
        labels = _draw(axis, drawn, fidelity([row for rows in curves.values() for row in rows]), 'fid')
        figure.legend(loc='outside lower left')
        figure.suptitle(_title(title))
        _write_labels(figure, [labels])
        return style.picture(figure)


def confusion(matrices, class_names, *, title):
    """Draw, side by side, which classes a judge puts images of each label into; a `style.Picture`.

    matrices: {name: int [K, K]}, labels in rows, answers in columns. Each row is shown in percent of its images.
    """
    number, columns = len(class_names), min(len(matrices), 4)
    rows, written = -(-len(matrices) // columns), number <= _WRITTEN
    side = 26 * number if written else 300
    shown = [style.drawable(name) for name in class_names]
    between = 90 if len(matrices) % columns and rows > 1 else 0  # names of classes between two rows
    size = (columns * (side + 16) + 110, rows * (side + 40) + 130 + between)
    with style.figure(size, rows=rows, columns=columns, squeeze=False, sharex=True, sharey=True) as (figure, axes):
        for axis in axes.flat[len(matrices) :]:
            axis.set_visible(False)
        for place, (axis, (name, counts)) in enumerate(zip(axes.flat, matrices.items())):
            totals = counts.sum(axis=1, keepdims=True)
            percents = 100.0 * counts / np.maximum(totals, 1)
            axis.imshow(percents, cmap=_heat(), vmin=0, vmax=100)
            accuracy = 100.0 * np.trace(counts) / max(counts.sum(), 1)
            axis.set_title(f'{name}: {accuracy:.1f}%')
            axis.grid(False)
            axis.tick_params(length=0, pad=4, labelbottom=place + columns >= len(matrices))  # nothing is below it
            if written:
                axis.set_xticks(range(number), shown, rotation=90, fontsize=10)
                axis.set_yticks(range(number), shown, fontsize=10)
                for (label, answer), percent in np.ndenumerate(percents):
                    if percent > 0.5:
                        ink = PALETTE['paper'] if percent > 50 else PALETTE['ink']
                        axis.text(answer, label, f'{percent:.0f}', color=ink, fontsize=8, ha='center', va='center')
        figure.supxlabel('class that the judge sees', fontsize=12)
        figure.supylabel('label', fontsize=12)
        figure.suptitle(_title(title))
        return style.picture(figure)


def _heat():
    """Return the colours of maps, from the paper's to the first curve's."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list('heat', [PALETTE['paper'], PALETTE['c0']])


def fid_map(rows, x, y, *, title):
    """Draw FID over two columns as coloured cells with their numbers, the least one framed; a `style.Picture`.

    Cells that no row has stay empty. The colours are logarithmic.
    """
    places = {name: sorted({row[name] for row in rows}, key=_ordered(rows, name)) for name in (x, y)}
    table = {(row[x], row[y]): row for row in rows if values.has(row, 'fid')}
    fid = np.array([[table[a, b]['fid'] if (a, b) in table else np.nan for a in places[x]] for b in places[y]])
    shades, best = np.log(np.maximum(fid, 1e-6)), rows[values.best_row(rows, 'fid')]
    middle = (np.nanmin(shades) + np.nanmax(shades)) / 2.0
    with style.figure((200 + 84 * len(places[x]), 150 + 44 * len(places[y]))) as (figure, axis):
        axis.imshow(shades, cmap=_heat().reversed(), aspect='auto')
        axis.grid(False)
        axis.tick_params(length=0, pad=6)
        for (below, along), shade in np.ndenumerate(shades):
            if np.isfinite(shade):
                row = table[places[x][along], places[y][below]]
                ink = PALETTE['paper'] if shade < middle else PALETTE['ink']
                text, error = values.show(row, 'fid')
                text += f'\n± {error}' if error else ''
                axis.text(along, below, text, color=ink, fontsize=10, ha='center', va='center')
        corner = places[x].index(best[x]) - 0.5, places[y].index(best[y]) - 0.5
        axis.add_patch(_frame(corner))
        for name, side in ((x, axis.xaxis), (y, axis.yaxis)):
            texts = [values.show({name: value}, name)[0] for value in places[name]]
            side.set_ticks(range(len(texts)), texts)
            side.set_label_text(column(name).axis)
        figure.suptitle(_title(title))
        return style.picture(figure)


def _frame(corner):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, edgecolor=PALETTE['c1'], linewidth=3, clip_on=False)


def _ordered(rows, name):
    """Return a sorting key for a column's values: numbers by size, texts as they come in the rows."""
    if not values.is_textual(rows, name):
        return lambda value: value
    order = list(dict.fromkeys(row[name] for row in rows))
    return order.index


def fidelity(rows):
    """Return the column that FID is drawn against: the Inception score, or precision where no row has it."""
    return 'inception_score' if any(values.has(row, 'inception_score') for row in rows) else 'precision'


def over_evaluations(curves, *, title):
    """Draw FID over the evaluations of an image, both logarithmic, a line for each sampler; a `style.Picture`.

    curves: {name: rows}; each row has fid, fid_error and network_evaluations.
    """
    with style.figure((680, 440)) as (figure, axis):
        for number, (name, rows) in enumerate(curves.items()):
            rows = sorted(rows, key=lambda row: row['network_evaluations'])
            curve = Curve(rows, 'num_steps', style.drawable(name), number)
            at, errors = curve.points('network_evaluations', 'fid')[1:]
            axis.errorbar(*at.T, errors[:, 1], label=curve.label, **_look(curve))
        axis.set_xscale('log')
        axis.set_yscale('log')
        _write_plain_ticks(axis.xaxis, (1, 1.5, 2, 3, 4, 6))
        _write_plain_ticks(axis.yaxis, (1, 2, 5))
        axis.set_xlabel('evaluations of the network per image, logarithmic', loc='right')
        axis.set_title(f'{column("fid").axis}, logarithmic')
        axis.legend()
        figure.suptitle(_title(title))
        return style.picture(figure)


def over_ema(rows, columns, *, title):
    """Draw FID over the length of an average, logarithmic, a line for each guidance weight; a `style.Picture`.

    columns: ('ema_length',), ('weak_ema_length',), or both: then the second has a panel for each of its values.
    """
    x, apart = columns[0], columns[1] if len(columns) > 1 else None
    rows = [row for row in rows if values.has(row, *columns, 'fid')]
    panels = list(dict.fromkeys(row[apart] for row in rows)) if apart else [None]
    weights = sorted({row['guidance_weight'] for row in rows})
    size = (max(680, 100 + 260 * len(panels)), 440)
    with style.figure(size, columns=len(panels), sharey=True, squeeze=False) as (figure, axes):
        for axis, panel in zip(axes[0], panels):
            for number, weight in enumerate(weights):
                here = [row for row in rows if row['guidance_weight'] == weight and (not apart or row[apart] == panel)]
                curve = Curve(sorted(here, key=lambda row: row[x]), 'guidance_weight', f'w = {weight:g}', number)
                at, errors = curve.points(x, 'fid')[1:]
                if len(at):
                    axis.errorbar(*at.T, errors[:, 1], label=curve.label, **_look(curve))
            axis.set_xscale('log')
            _write_plain_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
            axis.set_xlabel(f'{column(x).axis}, logarithmic', loc='right')
            name = '' if apart is None else f'{column(apart).label} {values.show({apart: panel}, apart)[0]}'
            axis.set_title(name or column('fid').axis)
        axes[0, 0].legend()
        if apart:
            axes[0, 0].set_ylabel(column('fid').axis)
        figure.suptitle(_title(title))
        return style.picture(figure)


def data_statistics(counts, class_names, statistics, *, title):
    """Draw the number of images in each class of a data set and the histogram of its pixels; a `style.Picture`.

    counts: int [classes]; up to twenty classes are shown by name, more in order of size. statistics: with 'histogram'
    [C, 256], 'mean' [C], 'std' [C].
    """
    class_names = list(map(style.drawable, class_names))
    histogram = np.array(statistics['histogram'])
    looks = {1: [('gray', 'c5')], 3: [('red', 'c1'), ('green', 'c2'), ('blue', 'c0')]}[len(histogram)]
    with style.figure((680, 300), columns=2) as (figure, (classes, pixels)):
        if len(counts) <= 20:
            classes.bar(np.arange(len(counts)), counts, color=PALETTE['c0'])
            short = [name if len(name) <= 16 else f'{name[:15]}…' for name in class_names]
            classes.set_xticks(np.arange(len(counts)), short, rotation=45, ha='right', rotation_mode='anchor')
        else:
            classes.bar(np.arange(len(counts)), np.sort(counts)[::-1], width=1.0, color=PALETTE['c0'])
            classes.set_xlabel('classes, largest first', loc='right')
        classes.set_title('Images per class')
        for row, (name, color), mean, std in zip(histogram, looks, statistics['mean'], statistics['std']):
            pixels.plot(row / row.sum(), color=PALETTE[color], label=f'{name}: {mean:.1f} ± {std:.1f}')
        pixels.set_xlabel('pixel value, 0 to 255', loc='right')
        pixels.set_title('Share of the pixels (mean ± deviation)')
        pixels.set_ylim(bottom=0)
        pixels.legend(frameon=True, edgecolor='none')
        figure.suptitle(_title(title))
        return style.picture(figure)


def _title(text):
    """Return a title in lines that 680 px hold."""
    return textwrap.fill(style.drawable(text), 88, break_on_hyphens=False)


def _draw(axis, curves, x, y, *, best=None, real=None):
    """Draw the column y over the column x: lines, error bars, points and the values of real images, each with a gid.

    Returns a list of `_Labels`, which `_write_labels` needs: all of them or, of more than _CROWD curves, the best
    point's, and then those of each curve alone.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = [(curve, *curve.points(x, y)) for curve in curves]
    places, errors = (np.concatenate([each[part] for each in drawn]) for part in (2, 3))
    real = {name: float(real[name]) for name in (x, y) if values.has(real or {}, name)}
    for dimension, (name, set_limits) in enumerate(((x, axis.set_xlim), (y, axis.set_ylim))):
        ends = places[:, dimension] + np.outer([-1, 1], errors[:, dimension])
        if name == y and len(curves) > _CROWD and _spans_factors(places[:, dimension]):
            _make_logarithmic(axis, places[:, dimension])
            continue
        set_limits(_limits(ends[np.isfinite(ends)], real.get(name)))
        room = axis.get_window_extent().size[dimension] / (60, 40)[dimension]
        locator = MaxNLocator(int(np.clip(room, 3, 8)), steps=[1, 2, 2.5, 5, 10])
        (axis.xaxis, axis.yaxis)[dimension].set_major_locator(locator)
    axis.set_xlabel(column(x).axis, loc='right')
    axis.set_title(
        column(y).axis + ', logarithmic' * (axis.get_yscale() == 'log')
    )  # above the axis, where it needs no turned letters
    together, alone = _draw_real(axis, real, x), []
    for curve, ids, at, error in drawn:
        labels, marks = _draw_points(axis, curve, ids, at, best, x, y)
        own = _Labels(axis, labels, _draw_line(axis, curve, at, error), marks)
        if len(curves) > _CROWD:
            alone.append(dataclasses.replace(own, labels=[label for label in labels if label[0]]))
            own = dataclasses.replace(own, labels=[label for label in labels if not label[0]])
        together = together.joined(own)
    return [together, *alone]


def _spans_factors(shown):
    """Return True if the values are positive, and the largest more than four times the least."""
    known = np.array(shown)[np.isfinite(shown)]
    return len(known) > 0 and known.min() > 0 and known.max() > 4 * known.min()


def _make_logarithmic(axis, shown):
    """Make the y axis logarithmic, so that among many curves the few good values are not squeezed by the bad ones."""
    axis.set_yscale('log', nonpositive='clip')
    axis.set_ylim(np.nanmin(shown) / 1.15, np.nanmax(shown) * 1.15)
    _write_plain_ticks(axis.yaxis, (1, 1.5, 2, 3, 5, 7))


def _write_plain_ticks(axis, subs):
    """Write the numbers of a logarithmic x or y axis as they are, at these multiples of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.set_minor_locator(NullLocator())


def _limits(shown, line):
    """Return the ends of an axis that shows these values, from 0 where they reach down near it, and a line if near."""
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    if line is not None and low - (high - low) / 2 <= line <= high + (high - low) / 2:
        low, high = min(low, line), max(high, line)
    if low == high:
        return low - (abs(low) / 10 or 0.5), high + (abs(low) / 10 or 0.5)
    return (0.0, 1.05 * high) if 0 <= low < 0.4 * high else (low - 0.08 * (high - low), high + 0.08 * (high - low))


def _draw_real(axis, real, x):
    """Draw a dashed line for each value of real images that lies within the axes; return their `_Labels`."""
    labels, segments = [], []
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for name, value in real.items():
        low, high, draw = (left, right, axis.axvline) if name == x else (bottom, top, axis.axhline)
        if low <= value <= high:
            draw(value, color=PALETTE['soft'], linewidth=1.25, linestyle=(0, (5, 4)), gid='real')
            ends = [(value, bottom), (value, top)] if name == x else [(left, value), (right, value)]
            segments.append(ends)
            end = ends[0] if (name, x) == ('fid', 'inception_score') else ends[1]  # the side of the curve's high points
            labels.append((1, end, f'{_REAL[name]} {values.show(real, name)[0]}', PALETTE['soft'], ''))
    return _Labels(axis, labels, segments, [])


def _draw_line(axis, curve, places, errors):
    """Draw a curve's line and error bars; return their segments."""
    from matplotlib.collections import LineCollection

    color, look = _color(curve), {'linestyle': dash(curve.style), 'clip_on': False, 'gid': f'line {_of(curve)}'}
    look |= {'marker': _marker(curve.style)[0], 'markevery': []}  # for the legend
    if _is_hollow(curve.style):
        look['markerfacecolor'] = PALETTE['paper']
    axis.plot(*places.T, color=color, label=curve.label, **look)
    bars = [(at - error, at + error) for at, pair in zip(places, errors) for error in np.diag(pair) if any(error)]
    bars, parts = ([ends for ends in lines if np.isfinite(ends).all()] for lines in (bars, pairwise(places)))
    if bars:
        look = {'colors': color, 'alpha': 0.75, 'linewidths': 1.25}
        axis.add_collection(LineCollection(bars, **look, clip_on=False, gid=f'error {_of(curve)}'), autolim=False)
    return bars + parts


def _draw_points(axis, curve, ids, places, best, x, y):
    """Draw a curve's markers, with a ring around the best; return (labels, marks)."""
    color, paper, labels, marks = _color(curve), PALETTE['paper'], [], []
    look = {
        'linestyle': '',
        'marker': _marker(curve.style)[0],
        'markersize': 8.4,
        'markeredgewidth': 1.5,
        'color': color,
    }
    look['markerfacecolor' if _is_hollow(curve.style) else 'markeredgecolor'] = paper
    ring = {'clip_on': False, 'zorder': 4, 'gid': f'best {_of(curve)}'}
    for index, (number, at) in enumerate(zip(ids, places)):
        if not np.isfinite(at).all():
            continue
        marks.append((at, 10 if number == best else 6))
        axis.plot(*at, **look, clip_on=False, zorder=3, gid=f'point {number} {_of(curve)}')
        text, is_end = '' if x in SYMBOLS else curve.tag(index), index in (0, len(ids) - 1)
        if number == best:
            axis.plot(*at, 'o', ms=17, mew=1.75, mfc='none', color=PALETTE['ink'], **ring)
        if number == best and y == 'fid':
            text = f'{curve.tag(index, full=True)}, {values.show_named(curve.rows[index], "fid", with_error=False)}'
            labels.append((0, at, text, PALETTE['ink'], _of(curve)))
        elif text:
            labels.append((1 if is_end else 2, at, text, color, _of(curve)))
    return labels, marks


@dataclasses.dataclass(frozen=True, eq=False)
class _Labels:
    """Labels of an axis and what they must stay clear of.

    labels: (rank of _DISTANCES, place, text, colour, word of the gid). segments: of lines. marks: (place, radius in
    pixels).
    """

    axis: object
    labels: list
    segments: list
    marks: list

    def joined(self, other):
        """Return both as one."""
        parts = (getattr(self, name) + getattr(other, name) for name in ('labels', 'segments', 'marks'))
        return _Labels(self.axis, *parts)


def _write_labels(figure, drawn, *, alone=False):
    """Write the `_Labels` of each axis in `drawn`, see `_draw`. alone: those of curves alone too.

    A label stands where it covers least of the lines, and no other label or mark; or not at all.
    """
    figure.get_layout_engine().execute(figure)  # once, for labels are placed in pixels
    figure.set_layout_engine(None)
    for together, *of_curves in drawn:
        boxes = _write_labels_of(together)
        for each in of_curves if alone else ():
            _write_labels_of(each, boxes, 'alone')


def _write_labels_of(given, boxes=(), word=''):
    """Write `_Labels`, clear of the `boxes` of other labels too; return the boxes of those written."""
    axis, segments, written = given.axis, given.segments, []
    to_pixels = axis.transData.transform
    ends = to_pixels(np.reshape(segments, (-1, 2))).reshape(-1, 2, 2)
    covered = [np.linspace(*pair, 2 + int(np.hypot(*np.subtract(*pair)) / 5)) for pair in ends]
    covered = np.concatenate([np.empty((0, 2)), *covered])
    taken = [*boxes, *(np.concatenate([to_pixels(at) - radius, to_pixels(at) + radius]) for at, radius in given.marks)]
    left, bottom, right, top = np.add(axis.bbox.extents, [0, 2, 2, 0])
    for rank, place, text, color, curve in sorted(given.labels, key=lambda label: label[0]):
        weight, gid = 'normal' if rank else 'bold', ' '.join(filter(None, ('label', word, curve)))
        look = {'ha': 'center', 'va': 'center', 'color': color, 'weight': weight, 'gid': gid}
        note = axis.annotate(text, place, (0, 0), textcoords='offset points', in_layout=False, **look)
        extent = note.get_window_extent()
        half = np.array([extent.width + 6, extent.height]) / 2
        distance, angle = map(np.ravel, np.meshgrid(_DISTANCES[rank], np.pi / 4 + np.arange(16) * np.pi / 8))
        offsets = np.stack([np.cos(angle) * (distance + half[0]), np.sin(angle) * (distance + half[1])], axis=1)
        low, high = to_pixels(place) + offsets - half, to_pixels(place) + offsets + half
        free = (low > [left, bottom]).all(axis=1) & (high < [right, top]).all(axis=1)
        for box in taken:
            free &= ~((low < box[2:]) & (box[:2] < high)).all(axis=1)
        crossed = ((low[:, None] < covered) & (covered < high[:, None])).all(axis=2).sum(axis=1)
        free &= (crossed <= 4) | (rank < 2)  # labels between a curve's ends may be left out
        if not free.any():
            note.remove()
            continue
        turn = np.abs((angle - np.pi / 4 + np.pi) % (2 * np.pi) - np.pi)  # from the upper right, which is read first
        chosen = np.argmin(np.where(free, crossed + distance / 8 + turn / 20, np.inf))
        note.set_position(offsets[chosen])
        written.append(np.concatenate([low[chosen], high[chosen]]))
        taken.append(written[-1])
    return written
