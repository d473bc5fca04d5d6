"""Pictures: grids of images, and the trade-off curve."""

import io
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cfg_jax import files

_PAD = 2  # pixels between images, before enlargement
SYMBOLS = {'guidance_weight': 'w', 'classifier_weight': 'c'}  # what a curve may be drawn over


def as_png(picture):
    """picture: uint8 [H, W] or [H, W, 3] -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'png')
    return buffer.getvalue()


def save_png(path, picture):
    """picture: uint8 [H, W] or [H, W, 3]."""
    files.write(path, as_png(picture))


def grid(rows, names=None):
    """Rows of images as one picture, uint8 [H, W, 3], on white; small images are enlarged by whole pixels.

    rows: lists of uint8 [h, w, 1 or 3] images, all of one size; rows may be of unequal length. names: one text a row.
    """
    height, width, _ = rows[0][0].shape
    columns = max(map(len, rows))
    picture = np.full((_PAD + len(rows) * (height + _PAD), _PAD + columns * (width + _PAD), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = _PAD + r * (height + _PAD), _PAD + c * (width + _PAD)
            picture[top : top + height, left : left + width] = image
    factor = max(1, 32 // height)
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return _with_names(picture, names, factor * (height + _PAD)) if names else picture


def _with_names(picture, names, row_height):
    font = ImageFont.load_default(size=max(10, min(18, row_height // 3)))
    names = list(map(_drawable, names))
    margin = 12 + max(int(font.getlength(name)) for name in names)
    canvas = Image.new('RGB', (picture.shape[1] + margin, picture.shape[0]), 'white')
    canvas.paste(Image.fromarray(picture), (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        draw.text((margin - 6, (i + 0.5) * row_height), name, fill='black', font=font, anchor='rm')
    return np.asarray(canvas)


def _drawable(text):
    """The text as fonts can draw it: bytes of file names that are no text are written as \\udcff."""
    return text.encode(errors='backslashreplace').decode()


def class_grid(images, labels, class_names=None):
    """A row for each label, in the order of their ids: uint8 [H, W, 3]. images: uint8 [N, h, w, C], labels: int [N]."""
    present = np.unique(labels)
    names = [class_names[label] for label in present] if class_names else None
    return grid([images[labels == label] for label in present], names)


def _pyplot():
    import matplotlib  # only where something is drawn

    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot


def _png(figure):
    """The figure as PNG bytes, its axes with a light grid and without frames; closes it."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Glyph .* missing from')  # boxes stand for what the font lacks
        figure.savefig(buffer, dpi=130)
    _pyplot().close(figure)
    return buffer.getvalue()


def tradeoff(rows, *, title, over='guidance_weight', real=None):
    """The CFG paper's figures 1 and 4 as PNG bytes: FID against Inception score, and both against w.

    rows: dicts with fid, inception_score and the weight named by `over`, increasing. real: the data's own Inception
    score.
    """
    plt = _pyplot()
    w, fid, score = (np.array([row[key] for row in rows]) for key in (over, 'fid', 'inception_score'))
    ink, accent = '#1f4e79', '#b5482a'
    figure, (curve, fid_axis, score_axis) = plt.subplots(1, 3, figsize=(12, 3.8), layout='constrained')
    curve.plot(score, fid, 'o-', color=ink)
    curve.margins(x=0.12)
    symbol = SYMBOLS[over]
    _label_points(curve, score, fid, w, symbol)
    curve.set(xlabel='Inception score', ylabel='Fréchet distance', title='The trade-off')
    fid_axis.plot(w, fid, 'o-', color=ink)
    best = int(np.argmin(fid))
    fid_axis.plot(w[best], fid[best], 'o', color=accent, markersize=9, label=f'least, at {symbol} = {w[best]:g}')
    fid_axis.set(xlabel=f'{over.replace("_", " ")} {symbol}', ylabel='Fréchet distance', title='Fidelity and variety')
    fid_axis.legend(frameon=False)
    score_axis.plot(w, score, 'o-', color=ink)
    if real is not None:
        score_axis.axhline(real, color='0.5', linestyle='--', label=f'the data, {real:.2f}')
        score_axis.legend(frameon=False)
    score_axis.set(xlabel=f'{over.replace("_", " ")} {symbol}', ylabel='Inception score', title='Fidelity alone')
    for axis in (curve, fid_axis):
        axis.set_ylim(0, 1.08 * max(fid.max(), 1e-9))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return _png(figure)


def comparison(curves, *, title):
    """Fréchet distance against Inception score, a line for each of several ways to guide; PNG bytes.

    curves: {name: rows}; rows as in `tradeoff`, with guidance_weight, classifier_weight and the columns of costs.csv.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.6), layout='constrained')
    for (name, rows), color in zip(curves.items(), ('#1f4e79', '#b5482a', '#3c7d4a', '#6b4a8a')):
        over = 'guidance_weight' if len({row['guidance_weight'] for row in rows}) > 1 else 'classifier_weight'
        score, fid, weight = (np.array([row[key] for row in rows]) for key in ('inception_score', 'fid', over))
        cost = f'{rows[0]["network_evaluations"]:.0f} evaluations'
        if rows[0]['classifier_gradients']:
            cost += f', {rows[0]["classifier_gradients"]:.0f} classifier gradients'
        milliseconds = 1e3 * np.median([row['seconds_per_image'] for row in rows])
        axis.plot(score, fid, 'o-', color=color, label=f'{name}: {cost}, {milliseconds:.1f} ms an image')
        _label_points(axis, score, fid, weight, SYMBOLS[over])
    axis.set(xlabel='Inception score', ylabel='Fréchet distance')
    axis.set_ylim(0, 1.08 * max(axis.dataLim.ymax, 1e-9))
    axis.margins(x=0.1)
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return _png(figure)


def data_statistics(counts, class_names, statistics, *, title):
    """A data set's images per class and the histogram of its pixels, as PNG bytes.

    counts: int [classes]; up to twenty classes stand with their names, more by size. statistics: with 'histogram'
    [C, 256], 'mean' [C], 'std' [C].
    """
    plt = _pyplot()
    class_names, title = map(_drawable, class_names), _drawable(title)
    figure, (classes, pixels) = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
    if len(counts) <= 20:
        classes.bar(np.arange(len(counts)), counts, color='#1f4e79')
        short = [name if len(name) <= 16 else f'{name[:15]}…' for name in class_names]
        classes.set_xticks(np.arange(len(counts)), short, rotation=45, ha='right', parse_math=False)
    else:
        classes.bar(np.arange(len(counts)), np.sort(counts)[::-1], width=1.0, color='#1f4e79')
        classes.set(xlabel='classes, largest first')
    classes.set(ylabel='images', title='Images a class')
    histogram = np.array(statistics['histogram'])
    colors = ('#b5482a', '#3c7d4a', '#1f4e79') if len(histogram) == 3 else ('0.3',)
    names = ('red', 'green', 'blue') if len(histogram) == 3 else ('gray',)
    for row, color, name, mean, std in zip(histogram, colors, names, statistics['mean'], statistics['std']):
        pixels.plot(row / row.sum(), color=color, label=f'{name}: {mean:.1f} ± {std:.1f}')
    pixels.set(xlabel='value of 0 to 255', ylabel='share of the pixels', title='Pixels (mean ± deviation)')
    pixels.set_ylim(bottom=0)
    pixels.legend(frameon=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return _png(figure)


def _label_points(axis, x, y, weights, symbol):
    """Writes w beside each point of a curve, away from the curve's own direction, so that close points stay legible."""
    span = np.array([np.ptp(x) or 1.0, np.ptp(y) or 1.0])
    points = np.stack([x, y], axis=1) / span
    direction = np.gradient(points, axis=0) if len(points) > 1 else np.ones_like(points)
    normal = np.stack([direction[:, 1], -direction[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    for xi, yi, weight, (dx, dy) in zip(x, y, weights, normal):
        axis.annotate(
            f'{symbol}={weight:g}' if weight in (weights[0], weights[-1]) else f'{weight:g}',
            (xi, yi),
            xytext=(14 * dx, 14 * dy),
            textcoords='offset points',
            ha='center',
            va='center',
            fontsize=8,
        )
