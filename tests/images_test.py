import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cfg_jax.data import images
from cfg_jax.data.images import ImageError, decode, encode_png, resample
from tests.tiny import ROOT


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height, width):
    """Return three different ramps: lossy formats keep them, and every flip or turn changes them."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 / height, x * 255 / width, (x + y) * 127 / (height + width)], -1).astype(np.uint8)


def encoded(image, kind, **settings):
    """Encode a Pillow image or an array to the bytes of a file."""
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **settings)
    return file.getvalue()


def png_with(data, *chunks):
    """Insert chunks (kind, content) after the header of a PNG."""
    extra = b''.join(
        struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:33] + extra + data[33:]


@pytest.fixture(params=['pyspng', 'pillow'])
def reader(request, monkeypatch):
    """Run a test with each of the two PNG decoders."""
    if request.param == 'pillow':
        monkeypatch.setattr(images, 'pyspng', None)
    else:
        pytest.importorskip('pyspng')
    return request.param


# Decoding.


@pytest.mark.parametrize('channels', [1, 3])
def test_png_round_trip(reader, channels):
    image = noise(13, 21, channels)
    decoded = decode(encode_png(image), channels)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image)


def test_pyspng_reads_what_it_is_meant_to_and_nothing_else(monkeypatch):
    """It reads 8-bit RGB and gray of at most a megapixel, without chunks that change pixels."""
    calls = []
    pyspng = pytest.importorskip('pyspng')

    class Counting:
        @staticmethod
        def load(data):
            calls.append(len(data))
            return pyspng.load(data)

    monkeypatch.setattr(images, 'pyspng', Counting)
    rgb = noise(9, 7)
    plain = encode_png(rgb)
    gamma = png_with(plain, (b'gAMA', struct.pack('>I', 45455)), (b'sRGB', b'\0'))
    interlaced = Image.fromarray(rgb).convert('L')
    for data, channels in [(plain, 3), (gamma, 3), (encode_png(rgb[..., :1]), 1)]:
        decode(data, channels)
    assert len(calls) == 3
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    others = [
        (encoded(interlaced, 'PNG'), 3),
        (encoded(Image.fromarray(rgb).quantize(4), 'PNG'), 3),
        (encoded(noise(9, 7, 4), 'PNG'), 3),
        (encoded(rgb, 'PNG', transparency=tuple(rgb[0, 0].tolist())), 3),
        (encoded(rgb, 'PNG', exif=exif), 3),
        (encode_png(np.zeros((1025, 1024, 3), np.uint8)), 3),
        (encode_png(np.zeros((4, 4, 3), np.uint8)), 1),
    ]
    for data, channels in others:
        decode(data, channels)
    assert len(calls) == 3


@pytest.mark.parametrize('filter_type', range(5))
@pytest.mark.parametrize('interlaced', [False, True])
def test_pyspng_and_pillow_agree_to_the_bit(monkeypatch, filter_type, interlaced):
    """They agree for every row filter, and for Adam7's seven passes, which Pillow cannot write."""
    pytest.importorskip('pyspng')
    height, width = 11, 13
    bits = np.random.default_rng(filter_type).integers(0, 256, (height, width, 3), np.uint8)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [bits[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [bits]
    rows = b''.join(bytes([filter_type]) + row.tobytes() for part in parts for row in part if row.size)
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, int(interlaced))
    data = b'\x89PNG\r\n\x1a\n'
    for kind, content in [(b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]:
        data += struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    fast = decode(data, 3)
    monkeypatch.setattr(images, 'pyspng', None)
    np.testing.assert_array_equal(fast, decode(data, 3))
    if filter_type == 0:  # else `rows` are differences
        np.testing.assert_array_equal(fast, bits)


@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM'])
def test_formats(kind):
    image = smooth(40, 60)
    decoded = decode(encoded(image, kind), 3)
    tolerance = {'JPEG': 16, 'WEBP': 16, 'GIF': 16}.get(kind, 0)
    assert np.abs(decoded.astype(int) - image).max() <= tolerance


def test_grayscale_becomes_rgb(reader):
    gray = noise(6, 5, 1)
    np.testing.assert_array_equal(decode(encode_png(gray), 3), np.repeat(gray, 3, -1))
    bits = gray[..., 0] > 127
    one_bit = encoded(Image.fromarray(bits), 'PNG')
    np.testing.assert_array_equal(decode(one_bit, 3), np.repeat(bits[..., None], 3, -1) * np.uint8(255))
    np.testing.assert_array_equal(decode(one_bit, 1), bits[..., None] * np.uint8(255))


def test_one_channel_takes_gray_however_it_is_stored():
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    rgb = np.repeat(gray, 3, -1)
    opaque = np.concatenate([rgb, np.full_like(gray, 255)], -1)
    palette = Image.fromarray(gray[..., 0])
    palette = palette.convert('P')
    for data in [encode_png(gray), encode_png(rgb), encoded(opaque, 'PNG'), encoded(palette, 'PNG')]:
        np.testing.assert_array_equal(decode(data, 1), gray)


def test_one_channel_refuses_colour():
    image = np.full((4, 4, 3), 90, np.uint8)
    image[2, 1, 2] = 91
    palette = Image.fromarray(image).quantize(4)
    for data in [encode_png(image), encoded(palette, 'PNG')]:
        with pytest.raises(ImageError, match='has colour'):
            decode(data, 1)


def test_cmyk_is_converted_as_pillow_does():
    """Adobe's JPEGs store CMYK inverted, and Pillow inverts it back: white paper is white, red ink is red."""
    cmyk = Image.new('CMYK', (16, 16), (0, 0, 0, 0))
    cmyk.paste((0, 255, 255, 0), (0, 0, 16, 8))
    data = encoded(cmyk, 'JPEG', quality=100)
    assert b'Adobe' in data
    decoded = decode(data, 3)
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(data)).convert('RGB')))
    assert np.abs(decoded[2, 2].astype(int) - [255, 0, 0]).max() < 8 and decoded[13, 2].min() > 247


def over_white(colour, alpha):
    return colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)


def test_transparency_shows_white():
    rgba = noise(20, 30, 4)
    expected = over_white(rgba[..., :3], rgba[..., 3:])
    for kind, settings in [('PNG', {}), ('WEBP', {'lossless': True, 'exact': True}), ('TIFF', {})]:
        assert np.abs(decode(encoded(rgba, kind, **settings), 3) - expected).max() <= 1, kind
    la = noise(20, 30, 2)
    data = encoded(Image.merge('LA', [Image.fromarray(la[..., i]) for i in (0, 1)]), 'PNG')
    gray = over_white(la[..., :1], la[..., 1:])
    assert np.abs(decode(data, 1) - gray).max() <= 1 and np.abs(decode(data, 3) - gray).max() <= 1


@pytest.mark.parametrize('transparency', [2, bytes([255, 128, 0])], ids=['one index', 'alpha of each'])
def test_palettes_with_transparency(transparency):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    decoded = decode(encoded(palette, 'PNG', transparency=transparency), 3)
    middle = [0, 200, 0] if transparency == 2 else over_white(np.array([0, 200, 0]), 128)
    assert np.abs(decoded[0] - np.array([[200, 0, 0], middle, [255, 255, 255]])).max() <= 1


def test_transparent_values_of_rgb_and_gray_pngs(reader):
    image = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(image, 'PNG', transparency=(40, 50, 60)), 3), [[[10, 20, 30], [255, 255, 255]]]
    )
    data = encoded(np.array([[10, 40]], np.uint8), 'PNG', transparency=40)
    np.testing.assert_array_equal(decode(data, 1), [[[10], [255]]])
    wide = encoded(np.array([[1000, 40000]], np.uint16), 'PNG', transparency=40000)
    np.testing.assert_array_equal(decode(wide, 1), [[[4], [255]]])


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM'])
def test_16_bits_are_scaled(kind):
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65278, 65535]], np.uint16)
    data = encoded(Image.fromarray(values) if kind != 'PPM' else Image.fromarray(values.astype(np.int32)), kind)
    expected = np.round(values / 65535 * 255).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode(data, 1), expected)
    np.testing.assert_array_equal(decode(data, 3), np.repeat(expected, 3, -1))


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(ImageError, match='floating-point'):
        decode(encoded(np.zeros((2, 2), np.float32), 'TIFF'), 3)
    with pytest.raises(ImageError, match='32-bit'):
        decode(encoded(np.full((2, 2), 70000, np.int32), 'TIFF'), 1)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_animations_give_their_first_frame(kind):
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
    frames = [Image.new('RGB', (8, 6), colour) for colour in colours]
    settings = {'lossless': True} if kind == 'WEBP' else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode(data, 3), np.full((6, 8, 3), colours[0]))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(reader, kind, orientation):
    """The standard defines orientations by where the stored row 0 and column 0 belong in the upright image."""
    upright = smooth(16, 24)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],  # row 0 is the right side, column 0 the top
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    settings = {'quality': 100, 'subsampling': 0} if kind == 'JPEG' else {'lossless': True} if kind == 'WEBP' else {}
    decoded = decode(encoded(np.ascontiguousarray(stored), kind, exif=exif, **settings), 3)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= (4 if kind == 'JPEG' else 0)


def test_orientation_from_xmp_in_a_png(reader):
    """Pillow reads the orientation from XMP too, so pyspng must not take such a file."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', '<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="3"/></x:xmpmeta>')
    image = noise(5, 4)
    np.testing.assert_array_equal(decode(encoded(image, 'PNG', pnginfo=info), 3), image[::-1, ::-1])


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L', 'I;16'])
@pytest.mark.parametrize('kind', ['zTXt', 'tEXt', 'iTXt', 'iCCP', 'XMP'])
def test_long_texts_and_profiles_do_not_hide_the_pixels(reader, kind, mode):
    """Pillow takes 1 MiB of each for an attack; 64 MiB of text that is not compressed too."""
    text, info = 'a long story ' * 100_000, PngImagePlugin.PngInfo()
    if kind == 'iTXt':
        info.add_itxt('Comment', text, zip=True)
    elif kind == 'XMP':
        info.add_itxt('XML:com.adobe.xmp', text, zip=True)
    elif kind == 'zTXt':
        info.add_text('Comment', text, zip=True)
    elif kind == 'tEXt':
        for _ in range(3):
            info.add_text('Comment', text * 20)
    gray = noise(5, 4)[..., 0]
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(noise(5, 4))
    image = image if mode == 'I;16' else image.convert(mode)
    plain, long = io.BytesIO(), io.BytesIO()
    image.save(plain, 'PNG')
    image.save(long, 'PNG', pnginfo=info, icc_profile=text.encode() if kind == 'iCCP' else None)
    np.testing.assert_array_equal(decode(long.getvalue(), 3), decode(plain.getvalue(), 3))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')  # pytest's own filters hide the module's
def test_broken_exif_leaves_the_image():
    image = smooth(16, 16)
    plain = encoded(image, 'JPEG')
    for broken in [b'Exif\0\0', b'Exif\0\0garbage', b'Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01']:
        np.testing.assert_array_equal(decode(encoded(image, 'JPEG', exif=broken), 3), decode(plain, 3))


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', 'empty file'),
        (b'\0' * 1000, 'not an image'),
        (b'just some text\n' * 50, 'not an image'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', 'not an image'),
        (b'\x89PNG\r\n\x1a\n', 'truncated'),
        (b'\x89PNG\r\n\x1a\n\0\0\0\0IEND\xaeB`\x82', 'not an image'),
    ],
    ids=['empty', 'zeros', 'text', 'PostScript', 'PNG signature', 'PNG without a header'],
)
def test_what_is_no_image(data, reason):
    for channels in (1, 3):
        with pytest.raises(ImageError, match=f'^{reason}$'):
            decode(data, channels)


def test_a_truncated_png_is_refused_wherever_it_ends(reader):
    data = encode_png(noise(8, 8))
    for length in range(1, len(data)):
        with pytest.raises(ImageError):
            decode(data[:length], 3)
    with pytest.raises(ImageError, match=r'^truncated$'):
        decode(data[: len(data) // 2], 3)


def test_a_png_with_any_bit_flipped_is_refused(reader):
    data = encode_png(noise(6, 6))
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ImageError):
            decode(bytes(damaged), 3)


def test_pngs_damaged_under_right_checksums_are_images_or_image_errors(reader):
    """A faulty writer makes such files: pyspng must neither crash nor return another shape."""
    data = encode_png(smooth(12, 12))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        start, length = 41, struct.unpack('>I', data[33:37])[0]
        if rng.random() < 0.5:
            damaged[int(rng.integers(start, start + length))] = int(rng.integers(256))
            damaged[start + length : start + length + 4] = struct.pack('>I', zlib.crc32(damaged[37 : start + length]))
        else:
            # not the sizes' upper bytes: Pillow takes images of up to 179 megapixels
            damaged[int(rng.choice([18, 19, 22, 23, 24, 25, 26, 27, 28]))] = int(rng.integers(256))
            damaged[29:33] = struct.pack('>I', zlib.crc32(damaged[12:29]))
        try:
            image = decode(bytes(damaged), 3)
        except ImageError:
            refused += 1
        else:
            width, height = struct.unpack_from('>II', damaged, 16)
            assert image.shape == (height, width, 3) and image.dtype == np.uint8
    assert 50 < refused < 300


@pytest.mark.filterwarnings('ignore:Truncated File Read')
@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM'])
def test_truncated_files_are_refused_or_whole(kind):
    """Some formats end with bytes that no pixel needs; half an image is never returned."""
    data = encoded(noise(30, 30), kind)
    whole = decode(data, 3)
    for length in [*range(1, len(data), max(1, len(data) // 60)), len(data) - 1]:
        try:
            decoded = decode(data[:length], 3)
        except ImageError:
            continue
        assert length > len(data) - 24
        np.testing.assert_array_equal(decoded, whole)


def test_truncated_jpegs_say_so():
    data = encoded(noise(64, 64), 'JPEG')
    with pytest.raises(ImageError, match=r'^truncated$'):
        decode(data[: len(data) // 2], 3)


def test_decompression_bombs_are_refused(monkeypatch):
    data = encode_png(np.zeros((300, 300, 3), np.uint8))
    monkeypatch.setattr(images, 'PYSPNG_PIXELS', 0)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ImageError, match='decompression bomb'):
        decode(data, 3)


def test_no_warnings_escape(tmp_path):
    """A large image, broken EXIF and a transparent palette print nothing, even if Python shows every warning."""
    palette = Image.fromarray(np.zeros((4, 4), np.uint8)).convert('P')
    files = {
        'large': encoded(np.zeros((40, 40), np.uint8), 'PNG'),
        'exif': encoded(smooth(8, 8), 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\xff\0\0\0\x40'),
        'palette': encoded(palette, 'PNG', transparency=b'\x80\x40'),
    }
    code = [
        'import pathlib, sys, warnings',
        'from PIL import Image',
        'from cfg_jax.data import images',
        'Image.MAX_IMAGE_PIXELS = 1000',
        '[images.decode(pathlib.Path(path).read_bytes(), 3) for path in sys.argv[1:]]',
    ]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    command = [sys.executable, '-W', 'always', '-c', '\n'.join(code), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr

    with warnings.catch_warnings(record=True) as caught:  # these files do make Pillow warn
        warnings.simplefilter('always')
        for name in ('exif', 'palette'):
            image = Image.open(tmp_path / name)
            image.getexif()
            image.convert('RGB')
    assert len(caught) >= 2


# Resampling.


def area_average(image, size):
    """Compute the definition pixel by pixel in float64: each source pixel counts by its covered share."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side].astype(np.float64)
    ratio = side / size

    def average(values, index):
        low, high = index * ratio, (index + 1) * ratio
        total = 0.0
        for pixel in range(int(low), min(side, int(np.ceil(high)))):
            total += values[pixel] * (min(high, pixel + 1) - max(low, pixel))
        return total / ratio

    rows = np.stack([average(square, i) for i in range(size)])
    return np.stack([average(rows.swapaxes(0, 1), i) for i in range(size)], axis=1)


@pytest.mark.parametrize(
    ('shape', 'size'),
    [((97, 131, 3), 64), ((500, 375, 3), 64), ((65, 64, 3), 64), ((127, 300, 1), 32), ((50, 50, 1), 7), ((9, 8, 3), 1)],
)
def test_box_is_the_area_average(shape, size):
    image = noise(*shape)
    result, exact = resample(image, size, 'box'), area_average(image, size)
    assert result.shape == (size, size, shape[-1]) and result.dtype == np.uint8
    assert np.abs(result - exact).max() < 0.5 + 1e-3  # rounded to the nearest
    assert abs(result.mean() - exact.mean()) < 3 * np.sqrt(1 / 12 / result.size)


@pytest.mark.parametrize('ratio', [2, 3, 8])
def test_box_at_whole_ratios_is_pillows(ratio):
    image = noise(16 * ratio, 16 * ratio)
    pillows = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX))
    assert np.abs(resample(image, 16, 'box').astype(int) - pillows).max() <= 1
    means = image.reshape(16, ratio, 16, ratio, 3).mean((1, 3))
    assert np.abs(resample(image, 16, 'box') - means).max() <= 0.5 + 1e-3


def test_box_keeps_extremes_and_the_mean():
    for value in (0, 1, 254, 255):
        assert (resample(np.full((97, 131, 3), value, np.uint8), 64, 'box') == value).all()
    image = noise(97, 97)
    assert abs(resample(image, 64, 'box').mean() - image.mean()) < 3 * np.sqrt(1 / 12 / (64 * 64 * 3))


def adm_by_hand(image, size):
    """Resample as ADM's paper and code state it, with Pillow alone."""
    pil = Image.fromarray(image)
    while min(pil.size) >= 2 * size:
        pil = pil.resize(tuple(side // 2 for side in pil.size), resample=Image.BOX)
    scale = size / min(pil.size)
    array = np.array(pil.resize(tuple(round(side * scale) for side in pil.size), resample=Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize(
    ('shape', 'size'), [((97, 131), 64), ((500, 375), 64), ((129, 128), 64), ((127, 301), 64), ((333, 1001), 16)]
)
def test_adm_is_adms_to_the_bit(shape, size):
    image = noise(*shape)
    np.testing.assert_array_equal(resample(image, size, 'adm'), adm_by_hand(image, size))
    np.testing.assert_array_equal(resample(image[..., :1], size, 'adm')[..., 0], adm_by_hand(image[..., 0], size))


@pytest.mark.parametrize('channels', [1, 3])
def test_center_crop_takes_pixels_as_they_are(channels):
    image = noise(11, 20, channels)
    np.testing.assert_array_equal(resample(image, 8, 'center_crop'), image[1:9, 6:14])


@pytest.mark.parametrize('method', images.RESAMPLINGS)
def test_an_image_of_the_right_size_stays_as_it_is(method):
    image = noise(32, 32)
    np.testing.assert_array_equal(resample(image, 32, method), image)
    np.testing.assert_array_equal(resample(image, 32, method, upsample=True), image)


@pytest.mark.parametrize('method', images.RESAMPLINGS)
def test_small_images(method):
    image = noise(20, 31, 1)
    with pytest.raises(ImageError, match=r'^smaller than 64x64: 20x31$'):
        resample(image, 64, method)
    larger = np.asarray(Image.fromarray(image[..., 0]).resize((round(31 * 3.2), 64), Image.Resampling.BICUBIC))
    left = (larger.shape[1] - 64) // 2
    np.testing.assert_array_equal(resample(image, 64, method, upsample=True)[..., 0], larger[:, left : left + 64])
    np.testing.assert_array_equal(resample(image, 16, method, upsample=True), resample(image, 16, method))


@pytest.mark.parametrize('method', images.RESAMPLINGS)
def test_the_centre_is_kept_and_directions_are_not_mixed(method):
    """Only the middle square of this wide image is bright, and only in its upper half."""
    image = np.zeros((32, 96, 3), np.uint8)
    image[:16, 32:64] = 240
    result = resample(image, 16, method)
    assert (result[:6, 2:-2] > 200).all() and (result[10:] < 40).all()
