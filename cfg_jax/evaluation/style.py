"""The one style of all plots: colours, letters and lines, the figure they are drawn in, and its PNG and SVG files.

Letters have 12 px where a figure is 680 px wide. Colours differ in lightness too, and curves in their markers, so that
neither needs a reader who sees all colours.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

from cfg_jax import files

PALETTE = {  # by the names of report.css, which has other colours for dark pages
    'ink': '#1b1d20',
    'soft': '#5a5e65',
    'faint': '#eaebe8',
    'paper': '#fcfcfa',
    'c0': '#0b62a4',
    'c1': '#c04a00',
    'c2': '#007a5a',
    'c3': '#9c3f77',
    'c4': '#8a6500',
    'c5': '#50545a',
}
NUM_COLORS = 6  # of curves
_RC = {
    'axes.edgecolor': PALETTE['soft'],
    'axes.formatter.useoffset': False,
    'axes.grid': True,
    'axes.grid.axis': 'y',
    'axes.axisbelow': True,
    'axes.labelcolor': PALETTE['ink'],
    'axes.labelsize': 12,
    'axes.spines.left': False,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlecolor': PALETTE['ink'],
    'axes.titlesize': 12,
    'axes.titlelocation': 'left',
    'axes.titlepad': 12,
    'figure.titlesize': 12,
    'font.size': 12,
    'grid.color': PALETTE['faint'],
    'grid.linewidth': 1,
    'legend.frameon': False,
    'lines.linewidth': 1.75,
    'svg.fonttype': 'none',  # letters stay letters, in the page's font
    'text.parse_math': False,
    'xtick.color': PALETTE['soft'],
    'ytick.color': PALETTE['soft'],
    'ytick.major.pad': 12,  # a point at the left end, with its ring, does not cover a number
    'ytick.major.size': 0,
}


class Picture(NamedTuple):
    """A drawn figure as the bytes of a PNG file and as SVG text. A notebook shows it."""

    png: bytes
    svg: str

    def _repr_png_(self):
        return self.png


@contextlib.contextmanager
def figure(size, *, rows=1, columns=1, mosaic=None, salt='cfg_jax', **options):
    """Yield (an empty matplotlib figure in the style, its axes).

    size: (width, height) in pixels, of which letters have 12. mosaic: names of axes in rows, instead of rows and
    columns (`Figure.subplot_mosaic`). salt: makes the ids within its SVG its own. options: of `Figure.subplots`, such
    as sharex. Draw, and save, within the context.
    """
    from matplotlib import style  # only where something is drawn
    from matplotlib.figure import Figure

    with style.context(['default', _RC | {'svg.hashsalt': salt}]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Glyph .* missing from')  # boxes stand for what the font lacks
        drawn = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout='constrained')
        yield drawn, drawn.subplot_mosaic(mosaic, **options) if mosaic else drawn.subplots(rows, columns, **options)


def png(figure):
    """Return a figure as the bytes of a PNG file, at 1.8 times its size in pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def svg(figure, *, fonts='shapes'):
    """Return a figure as SVG text, the same text each time.

    fonts: 'shapes' draws letters as they are here; 'letters' leaves them to the fonts of the page.
    """
    from matplotlib import rc_context

    buffer, metadata = io.StringIO(), dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    with rc_context({'svg.fonttype': {'shapes': 'path', 'letters': 'none'}[fonts]}):
        figure.savefig(buffer, format='svg', metadata=metadata)
    return buffer.getvalue()


def picture(figure):
    """Return a figure as a `Picture`."""
    return Picture(png(figure), svg(figure))


def save(path, drawn):
    """Write a `Picture` as `path`.png and `path`.svg; path has no suffix."""
    files.write(Path(f'{path}.png'), drawn.png)
    files.write(Path(f'{path}.svg'), drawn.svg.encode())


def drawable(text):
    """Return the text as fonts can draw it: bytes of file names that are not text become \\udcff."""
    return text.encode(errors='backslashreplace').decode()
