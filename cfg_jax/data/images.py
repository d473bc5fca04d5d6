"""One image: decode a file to pixels, encode it, and resample it to a square of a model's size."""

import functools
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from cfg_jax.errors import first_line

try:
    import pyspng  # decodes PNGs in two thirds of Pillow's time; wheels exist for some platforms only
except ImportError:
    pyspng = None

# Pillow warns of large images and of broken EXIF, but what it can decode is good enough here. The filter is for the
# whole process because images are decoded in threads, where `warnings.catch_warnings` does not work.
warnings.filterwarnings('ignore', module=r'PIL\.')

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
# The chunks that do not change the pixels: no transparency, no animation, and no EXIF or XMP, which may turn the image.
PLAIN_PNG_CHUNKS = {b'IHDR', b'IDAT', b'IEND', b'gAMA', b'cHRM', b'sRGB', b'iCCP', b'pHYs', b'tIME', b'sBIT', b'bKGD'}
# Pillow refuses these chunks if they expand beyond 1 MiB each or 64 MiB together, though no pixel depends on them ...
TEXT_PNG_CHUNKS = {b'tEXt', b'zTXt', b'iTXt', b'iCCP'}
TURNING_TEXTS = (b'XML:com.adobe.xmp', b'Raw profile type exif')  # ... unless they turn the image
PYSPNG_PIXELS = 1 << 20  # Pillow is as fast for larger images

ORIENTATION_TAG = 0x0112  # of EXIF; 1 is upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; its text is a short reason, such as 'truncated'."""


class Unreadable(ImageError):
    """An image that the system does not let us read, which says nothing about the image. Its cause is the OSError."""


class TooSmall(ImageError):
    """An image that would have to be enlarged."""


class HasColour(ImageError):
    """A colour image where a gray one is needed."""


def decode(data, channels):
    """Decode an image to uint8 [H, W, channels], turned upright by its EXIF; of an animation the first frame.

    data: bytes of any format that Pillow reads without another program. channels: 3 makes RGB of everything, with
    transparent parts over white; 1 takes images without colour, however they are stored. Raises ImageError.
    """
    if not data:
        raise ImageError('empty file')
    if data.startswith(PNG_SIGNATURE):
        chunks = _png_chunks(data)
        if pyspng is not None and _is_plain_png(data, chunks, channels):
            try:
                return pyspng.load(data).reshape(*_png_shape(data), channels)
            except RuntimeError:
                pass  # Pillow has better error messages
        if chunks & TEXT_PNG_CHUNKS:
            data = _without_texts(data)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            image.load()  # first, for EXIF may come after the pixels
            image = _upright(image)
            return _rgb(image) if channels == 3 else _gray(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError('not an image') from None
    except Exception as error:  # each of Pillow's formats raises its own kinds
        reason = first_line(error)
        raise ImageError('truncated' if 'truncated' in reason.lower() else reason) from error


def import_formats():
    """Import what `decode` needs of Pillow, which otherwise imports it when it meets the first image of its kind."""
    _formats()


@functools.cache
def _formats():
    """Return the names of all formats that Pillow reads, except PostScript: Ghostscript would run it as a program."""
    Image.init()
    return tuple(name for name in Image.ID if name != 'EPS')


def _png_chunks(data):
    """Return the kinds of chunk in a PNG; raises ImageError if a checksum fails.

    Neither pyspng nor Pillow compares the checksums of pixels.
    """
    chunks, position = set(), len(PNG_SIGNATURE)
    while b'IEND' not in chunks:
        if position + 12 > len(data):
            raise ImageError('truncated')
        end = position + 8 + int.from_bytes(data[position : position + 4])
        if end + 4 > len(data):
            raise ImageError('truncated')
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ImageError('damaged: checksum mismatch')
        chunks.add(data[position + 4 : position + 8])
        position = end + 4
    return chunks


def _without_texts(data):
    """Return a whole PNG without its texts and its colour profile, except texts that may turn it and are not long."""
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind, start = data[position + 4 : position + 8], position + 8
        if kind not in TEXT_PNG_CHUNKS or _may_turn(kind, data[start : end - 4]):
            kept.append(data[position:end])
        position = len(data) if kind == b'IEND' else end
    return b''.join(kept)


def _may_turn(kind, content):
    """Return True if a chunk's text may turn the image, and is not too long for Pillow."""
    keyword, _, rest = content.partition(b'\0')
    if keyword not in TURNING_TEXTS:
        return False
    compressed, text = kind == b'zTXt', rest[1:]  # behind the method
    if kind == b'iTXt':  # flag, method, language, translated keyword
        compressed, text = rest.startswith(b'\1'), rest[2:].split(b'\0', 2)[-1]
    if not compressed:
        return len(text) < PngImagePlugin.MAX_TEXT_MEMORY // 2
    try:
        return len(zlib.decompressobj().decompress(text, PngImagePlugin.MAX_TEXT_CHUNK)) < PngImagePlugin.MAX_TEXT_CHUNK
    except zlib.error:
        return False


def _png_shape(data):
    """Return (height, width) from the PNG's header."""
    width, height = struct.unpack_from('>II', data, 16)
    return height, width


def _is_plain_png(data, chunks, channels):
    """Return True if a PNG holds 8-bit RGB (or gray if channels is 1) that needs no further conversion."""
    if data[8:16] != b'\0\0\0\rIHDR' or not chunks <= PLAIN_PNG_CHUNKS:
        return False
    height, width = _png_shape(data)
    depth, colour = data[24:26]
    return depth == 8 and colour == (2 if channels == 3 else 0) and height * width <= PYSPNG_PIXELS


def _upright(image):
    """Return a Pillow image turned as its EXIF says."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # broken EXIF; the pixels may be fine
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image):
    """Return a Pillow image of any mode as uint8 [H, W, 3]; raises ImageError."""
    if image.mode == 'I' or image.mode.startswith('I;16'):
        return np.repeat(_from_16_bits(image), 3, axis=-1)
    if image.mode == 'F':
        raise ImageError('has floating-point pixels')
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        white.alpha_composite(image.convert('RGBA'))
        image = white
    return np.asarray(image.convert('RGB'))


def _gray(image):
    """Return a Pillow image of any mode as uint8 [H, W, 1]; raises ImageError if it has colour."""
    if image.mode in ('L', '1') and not image.has_transparency_data:
        return np.asarray(image.convert('L'))[..., None]
    rgb = _rgb(image)
    if (rgb != rgb[..., :1]).any():
        raise HasColour('has colour, but 1 channel is needed')
    return rgb[..., :1]


def _from_16_bits(image):
    """Return a 16-bit Pillow image as uint8 [H, W, 1], scaled; Pillow itself would clip it at 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError('has 32-bit pixels')
    if 'transparency' in image.info:  # the one value that a PNG declares transparent
        pixels = np.where(pixels == image.info['transparency'], 65535, pixels)
    return ((pixels + 128) // 257).astype(np.uint8)[..., None]


def encode_png(image):
    """Encode an image, uint8 [H, W, 1 or 3], to the bytes of a PNG file."""
    file = io.BytesIO()
    _pillow(image).save(file, 'PNG', compress_level=4)  # 1.5 times as fast as the default 6, for 1% more bytes
    return file.getvalue()


def resample(image, size, method, *, upsample=False):
    """Resample an image, uint8 [H, W, C], to uint8 [size, size, C]. method: a name in RESAMPLINGS.

    If the shorter side is under `size`, raises TooSmall or, with `upsample`, first enlarges the image (bicubic) until
    that side is `size`.
    """
    height, width, _ = image.shape
    if min(height, width) < size:
        if not upsample:
            raise TooSmall(f'smaller than {size}x{size}: {height}x{width}')
        image = _scale_to(_pillow(image), size)
    return image if image.shape[:2] == (size, size) else RESAMPLINGS[method](image, size)


def center_crop(image, size):
    """Return the central size x size pixels, unchanged."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def box(image, size):
    """Average the largest central square over the area of each new pixel; pixels on an edge count by their share."""
    square = center_crop(image, min(image.shape[:2])).astype(np.float32)
    rows = _average_parts(square, size)
    return np.rint(_average_parts(rows.swapaxes(0, 1), size).swapaxes(0, 1)).astype(np.uint8)


def _average_parts(pixels, size):
    """Return the averages over `size` equal parts of the first axis: float32 [side, ...] -> [size, ...].

    These are sums, not a product with a matrix of shares, because BLAS threads would compete with the reading threads.
    """
    side, line = len(pixels), pixels.shape[1:]
    pixels = pixels.reshape(side, -1)  # reduceat is fast on long rows
    edges = np.linspace(0, side, size + 1)
    first = np.floor(edges).astype(int)  # the pixel that an edge cuts or starts
    before = (edges - first).astype(np.float32)  # the share of that pixel before the edge
    cut = before[:, None] * pixels[np.minimum(first, side - 1)]
    sums = np.add.reduceat(pixels, first[:-1], axis=0)
    return ((sums - cut[:-1] + cut[1:]) * np.float32(size / side)).reshape(size, *line)


def adm(image, size):
    """Resample as ADM does: halve while at least twice too large, scale the shorter side (bicubic), crop the centre."""
    image = _pillow(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return center_crop(_scale_to(image, size), size)


RESAMPLINGS = {'box': box, 'adm': adm, 'center_crop': center_crop}


def _scale_to(image, size):
    """Scale a Pillow image (bicubic) to uint8 [H, W, C] whose shorter side is `size`."""
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], -1)


def _pillow(image):
    """Return uint8 [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
