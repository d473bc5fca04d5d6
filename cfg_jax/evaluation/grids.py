"""Pictures of images: grids with the names of their rows, and their PNG files."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cfg_jax import files
from cfg_jax.evaluation.style import drawable

_PAD = 2  # pixels between images, before enlargement
_GAP = 16  # pixels after each of several pictures
_TITLE = 22  # pixels of the line above a grid


def as_png(picture):
    """Return a picture, uint8 [H, W] or [H, W, 3], as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'png')
    return buffer.getvalue()


def save_png(path, picture):
    """Write a picture, uint8 [H, W] or [H, W, 3], as a PNG file."""
    files.write(path, as_png(picture))


def grid(rows, names=None, title='', *, least=32):
    """Arrange rows of images in one picture, uint8 [H, W, 3], on white; small images are enlarged by whole pixels.

    rows: lists of uint8 [h, w, 1 or 3] images, all of one size; rows may differ in length. names: a text for each row.
    title: a line above all rows. least: pixels that images are at least high, if they can be enlarged to them.
    """
    height, width, _ = rows[0][0].shape
    columns = max(map(len, rows))
    picture = np.full((_PAD + len(rows) * (height + _PAD), _PAD + columns * (width + _PAD), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = _PAD + r * (height + _PAD), _PAD + c * (width + _PAD)
            picture[top : top + height, left : left + width] = image
    factor = max(1, least // height)
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    if names:
        picture = _with_names(picture, names, factor * (height + _PAD))
    return _with_title(picture, title) if title else picture


def _with_names(picture, names, row_height):
    font = ImageFont.load_default(size=max(10, min(18, row_height // 3)))
    names = list(map(drawable, names))
    margin = 12 + max(int(font.getlength(name)) for name in names)
    canvas = Image.new('RGB', (picture.shape[1] + margin, picture.shape[0]), 'white')
    canvas.paste(Image.fromarray(picture), (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        draw.text((margin - 6, (i + 0.5) * row_height), name, fill='black', font=font, anchor='rm')
    return np.asarray(canvas)


def _with_title(picture, title):
    font, title = ImageFont.load_default(size=14), drawable(title)
    width = max(picture.shape[1], 12 + int(font.getlength(title)))
    canvas = Image.new('RGB', (width, _TITLE + picture.shape[0]), 'white')
    canvas.paste(Image.fromarray(picture), (0, _TITLE))
    ImageDraw.Draw(canvas).text((6, _TITLE / 2), title, fill='black', font=font, anchor='lm')
    return np.asarray(canvas)


def beside(pictures, title=()):
    """Place pictures, uint8 [H, W, 3], next to each other on white, under the lines of a title."""
    height = max(map(len, pictures))
    padded = [np.pad(each, ((0, height - len(each)), (0, _GAP), (0, 0)), constant_values=255) for each in pictures]
    picture = np.hstack(padded)
    for line in reversed(title):
        picture = _with_title(picture, line)
    return picture


def class_grid(images, labels, class_names=None, title=''):
    """Arrange images, uint8 [N, h, w, C], in one row for each of the labels, int [N], in order: uint8 [H, W, 3]."""
    present = np.unique(labels)
    names = [class_names[label] for label in present] if class_names else None
    return grid([images[labels == label] for label in present], names, title)
