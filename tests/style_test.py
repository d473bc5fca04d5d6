import io
import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from cfg_jax.evaluation import style


def drawn():
    with style.figure((680, 300), columns=2, sharey=True) as (figure, (left, _)):
        left.plot([0, 1], [0, 1], color=style.PALETTE['c0'])
        left.set_xlabel('cost, in $ and not $')
        return style.picture(figure)


def test_a_figure_is_written_as_png_and_svg(tmp_path):
    style.save(tmp_path / 'new' / 'curve_0.5', drawn())
    assert {path.name for path in (tmp_path / 'new').iterdir()} == {'curve_0.5.png', 'curve_0.5.svg'}
    image = Image.open(tmp_path / 'new' / 'curve_0.5.png')
    assert image.size == (680 * 130 // 72, 300 * 130 // 72)
    text = (tmp_path / 'new' / 'curve_0.5.svg').read_text()
    assert 'width="680pt"' in text
    assert style.PALETTE['c0'] in text
    assert '<text' not in text


def test_a_figure_is_the_same_each_time_and_shows_itself():
    first, second = drawn(), drawn()
    assert first == second and first._repr_png_() == first.png
    assert Image.open(io.BytesIO(first.png)).format == 'PNG'


def test_letters_have_twelve_pixels():
    with style.figure((680, 300)) as (figure, axis):
        sizes = {text.get_fontsize() for text in [axis.xaxis.label, axis.title, *axis.get_xticklabels()]}
        assert sizes == {12} and figure.dpi == 72
        text = style.svg(figure, fonts='letters')
    assert set(re.findall(r'font(?:-size)?: ([0-9.]+)px', text)) == {'12'}


# What people without red, green or blue cones see of linear RGB (Viénot et al. 1999; Machado et al. 2009 for blue).
SEEN = {
    'no red': [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    'no green': [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    'no blue': [[1.25553, -0.07675, -0.17878], [-0.07841, 0.93081, 0.1476], [0.00473, 0.69137, 0.3039]],
    'all': np.eye(3),
}


def lab(color, seen):
    """Return the CIELAB coordinates of '#rrggbb' as it is seen."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(seen) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize('seen', SEEN)
def test_the_first_three_colours_differ_for_every_reader(seen):
    """Their distance in CIELAB, where 2.3 is just noticeable."""
    colors = [lab(style.PALETTE[f'c{number}'], SEEN[seen]) for number in range(3)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colors, 2)) > 10
