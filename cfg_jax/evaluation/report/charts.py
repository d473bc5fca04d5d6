"""Charts as SVG text, by the standard library alone: curves with error bars, and labels that do not collide.

Lengths are in the units of the SVG's viewBox, near pixels. Colours, strokes and fonts stand in report.css.
"""

import math
from html import escape
from itertools import pairwise
from typing import NamedTuple

NUM_STYLES = 6  # colours of report.css; each has a marker of its own, so that colour is not the only sign
_MARKERS = (
    'M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z',
    'M-3.8 -3.8h7.6v7.6h-7.6z',
    'M0 -5.2L4.9 3.6H-4.9z',
    'M0 -5.4L5.4 0L0 5.4L-5.4 0z',
    'M0 5.2L4.9 -3.6H-4.9z',
    'M-1.6 -4.8h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2z',
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 34, 46  # margins of the plot
_TEXT_HEIGHT, _DIGIT = 14, 7.6  # a label's box: the widest usual font's digit

# How far labels may be from their points: the best one's, which has a ring, those of a curve's ends, the others.
_DISTANCES = ((11, 17, 26), (7, 13, 22), (7, 13))


class Point(NamedTuple):
    """A row on a curve. label: what may be written at it, '' for nothing; text: what a screen reader says of it."""

    x: float
    y: float
    x_error: float
    y_error: float
    row: int
    label: str
    text: str


class Curve(NamedTuple):
    """Points in order; None among them interrupts the line."""

    style: int
    points: list


class Axis(NamedTuple):
    """What an axis shows, and where its ticks are."""

    low: float
    high: float
    step: float

    def ticks(self):
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [index * self.step for index in range(first, last + 1)]

    def format(self, tick):
        exponent = math.floor(math.log10(self.step) + 1e-9)
        decimals = max(0, -exponent)
        if abs(self.step / 10**exponent - 2.5) < 1e-6:
            decimals = max(0, 1 - exponent)
        return f'{tick + 0.0:,.{decimals}f}'  # + 0.0: no -0


def fit(values, count):
    """An axis around the values with about `count` ticks; from 0 where the values reach down near it."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 10 or 0.5
    elif 0 <= low < 0.4 * high:
        low, room = 0.0, high * 0.05
    else:
        room = (high - low) * 0.08
    low, high = (low if low == 0 else low - room), high + room
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return Axis(low, high, magnitude * next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999))


def swatch(style):
    """A curve's line and marker, as they stand in legends."""
    return (
        f'<svg class="swatch k{style % NUM_STYLES}{_dashed(style)}" viewBox="-13 -7 26 14" width="26" height="14" '
        f'aria-hidden="true"><path class="line" d="M-13 0H13"/><path class="marker" d="{_marker(style)}"/></svg>'
    )


def _marker(style):
    return _MARKERS[style % NUM_STYLES]


def _dashed(style):
    return ' dashed' if style >= NUM_STYLES else ''


def chart(curves, *, size, x_title, y_title, name, best=None, best_label=None, x_line=None, y_line=None, css=''):
    """The curves as an <svg>.

    size: (width, height). best: the row that gets a ring, and best_label at it. x_line, y_line: (value, text) of a
    dashed line across, or None. name: what a screen reader says of the whole.
    """
    width, height = size
    points = [point for curve in curves for point in curve.points if point]
    x_axis = fit(_extent(points, 'x', x_line), width // 80)
    y_axis = fit(_extent(points, 'y', y_line), height // 55)
    bounds = (_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)

    def place(x, y):
        left, top, right, bottom = bounds
        across, up = (x - x_axis.low) / (x_axis.high - x_axis.low), (y - y_axis.low) / (y_axis.high - y_axis.low)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = [
        f'<svg class="chart {css}" viewBox="0 0 {width} {height}" role="group" aria-label="{escape(name)}">',
        *_frame(bounds, x_axis, y_axis, place, x_title, y_title),
        *_lines_across(bounds, place, x_axis, y_axis, x_line, y_line),
        *(_line(curve, place) for curve in curves),
        *_points(curves, place, best),
        *_labels(curves, place, bounds, best, best_label),
        '</svg>',
    ]
    return '\n'.join(parts)


def _extent(points, axis, line):
    """The values that an axis must show, with the ends of the error bars and, unless it is far off, the line across."""
    values = [getattr(point, axis) for point in points]
    errors = [getattr(point, f'{axis}_error') for point in points]
    values = [value + sign * error for value, error in zip(values, errors) for sign in (-1, 1)]
    low, high = min(values), max(values)
    if line and low - (high - low) / 2 <= line[0] <= high + (high - low) / 2:
        values.append(line[0])
    return values


def _frame(bounds, x_axis, y_axis, place, x_title, y_title):
    left, _, right, bottom = bounds
    yield '<g class="frame" aria-hidden="true">'
    for tick in y_axis.ticks():
        y = place(0, tick)[1]
        yield f'<path class="rule" d="M{left} {y:.1f}H{right}"/>'
        yield f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{y_axis.format(tick)}</text>'
    yield f'<path class="base" d="M{left} {bottom}H{right}"/>'
    for tick in x_axis.ticks():
        x = place(tick, 0)[0]
        yield f'<path class="base" d="M{x:.1f} {bottom}v5"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{x_axis.format(tick)}</text>'
    yield f'<text class="axis" x="2" y="15">{escape(y_title)}</text>'
    yield f'<text class="axis" x="{right}" y="{bottom + 40}" text-anchor="end">{escape(x_title)}</text>'
    yield '</g>'


def _lines_across(bounds, place, x_axis, y_axis, x_line, y_line):
    left, top, right, bottom = bounds
    if x_line and x_axis.low <= x_line[0] <= x_axis.high:
        x = place(x_line[0], 0)[0]
        yield f'<path class="across" d="M{x:.1f} {top}V{bottom}"/>'
        yield f'<text class="note" x="{x:.1f}" y="{top - 6}" text-anchor="middle">{escape(x_line[1])}</text>'
    if y_line and y_axis.low <= y_line[0] <= y_axis.high:
        y = place(0, y_line[0])[1]
        yield f'<path class="across" d="M{left} {y:.1f}H{right}"/>'
        yield f'<text class="note" x="{right}" y="{y - 6:.1f}" text-anchor="end">{escape(y_line[1])}</text>'


def _line(curve, place):
    path, pen = [], 'M'
    for point in curve.points:
        if point:
            path.append('{}{:.1f} {:.1f}'.format(pen, *place(point.x, point.y)))
        pen = 'L' if point else 'M'
    return f'<path class="line k{curve.style % NUM_STYLES}{_dashed(curve.style)}" d="{"".join(path)}"/>'


def _points(curves, place, best):
    """The markers with their error bars. One of them takes part in the order of the Tab key; the arrow keys move on."""
    tabindex = 0
    for curve in curves:
        for point in filter(None, curve.points):
            x, y = place(point.x, point.y)
            yield (
                f'<g class="point k{curve.style % NUM_STYLES}" data-row="{point.row}" tabindex="{tabindex}" role="img" '
                f'aria-label="{escape(point.text)}" transform="translate({x:.1f} {y:.1f})">'
            )
            across = place(point.x + point.x_error, point.y)[0] - x
            up = y - place(point.x, point.y + point.y_error)[1]
            bars = f'M{-across:.1f} 0H{across:.1f}' * bool(point.x_error) + f'M0 {-up:.1f}V{up:.1f}' * bool(
                point.y_error
            )
            if bars:
                yield f'<path class="error" d="{bars}"/>'
            yield f'<circle class="halo" r="11"/><path class="marker" d="{_marker(curve.style)}"/></g>'
            tabindex = -1
            if point.row == best:
                ring = f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="8.5" data-row="{best}"/>'
    if best is not None:
        yield ring  # above all curves


# ---------------------------------------------------------------- labels


def _labels(curves, place, bounds, best, best_label):
    """The points' labels: the best one's, those of the curves' ends, the others; where there is no place, none."""
    placed = [[place(point.x, point.y) for point in filter(None, curve.points)] for curve in curves]
    obstacles = [(x - 6, y - 6, x + 6, y + 6) for curve in placed for x, y in curve]
    covered = [sample for curve in placed for ends in pairwise(curve) for sample in _along(*ends)]
    for point in (point for curve in curves for point in curve.points if point):
        for x, y in ((point.x_error, 0.0), (0.0, point.y_error)):
            if x or y:
                covered += _along(place(point.x - x, point.y - y), place(point.x + x, point.y + y))
    wanted = []  # (rank, order, place, text, style); the rank is that of _DISTANCES
    for curve, places in zip(curves, placed):
        points = list(filter(None, curve.points))
        for index, (point, at) in enumerate(zip(points, places)):
            is_best = point.row == best and best_label is not None
            text = best_label if is_best else point.label
            if text:
                rank = 0 if is_best else 1 if index in (0, len(points) - 1) else 2
                wanted.append((rank, len(wanted), at, text, curve.style))
    for rank, _, at, text, style in sorted(wanted):
        near = [sample for sample in covered if abs(sample[0] - at[0]) < 130 and abs(sample[1] - at[1]) < 60]
        box = _free_box(at, _DIGIT * len(text) + 4, _DISTANCES[rank], obstacles, near, bounds)
        if box:
            obstacles.append(box)
            x, y = (box[0] + box[2]) / 2, box[3] - 3.5
            css = f'label k{style % NUM_STYLES}' if rank else 'label strong'
            position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="middle"'
            yield f'<text class="{css}" {position} aria-hidden="true">{escape(text)}</text>'


def _along(start, end, step=6.0):
    """Points on a segment, `step` apart."""
    count = max(1, round(math.dist(start, end) / step))
    return [tuple(a + (b - a) * k / count for a, b in zip(start, end)) for k in range(count + 1)]


def _free_box(at, width, distances, obstacles, samples, bounds):
    """The box (left, top, right, bottom) near a point that covers least of the lines and nothing else, or None."""
    best, least = None, math.inf
    for distance in distances:
        for direction in range(16):
            # from the upper right, which is what one reads first
            angle = math.pi / 4 + direction * math.pi / 8 * (1 if direction % 2 else -1)
            x = at[0] + math.cos(angle) * (distance + width / 2)
            y = at[1] - math.sin(angle) * (distance + _TEXT_HEIGHT / 2)
            box = (x - width / 2, y - _TEXT_HEIGHT / 2, x + width / 2, y + _TEXT_HEIGHT / 2)
            if not _within(box, bounds) or any(_overlap(box, other) for other in obstacles):
                continue
            covered = sum(box[0] - 2 < sx < box[2] + 2 and box[1] < sy < box[3] for sx, sy in samples)
            cost = covered + distance / 8 + direction / 100
            if cost < least:
                best, least = box, cost
    return best


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(box, bounds):
    left, top, right, bottom = bounds
    return box[0] > left and box[1] > top - 8 and box[2] < right + _RIGHT and box[3] < bottom - 2
