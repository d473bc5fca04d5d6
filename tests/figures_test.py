import io

import numpy as np
import pytest
from PIL import Image

from cfg_jax.evaluation import figures


def test_a_grid_places_every_image():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * np.ones((1, 32, 32, 1), np.uint8)
    picture = figures.grid([images[:3], images[3:5]])
    assert picture.shape == (2 + 2 * 34, 2 + 3 * 34, 3)
    for row, column, value in [(0, 0, 0), (0, 2, 2), (1, 1, 4)]:
        assert np.all(picture[2 + 34 * row :, 2 + 34 * column :][:32, :32] == value)
    assert np.all(picture[36:, 70:] == 255)  # the row that is shorter


def test_small_images_are_enlarged_by_whole_pixels():
    picture = figures.grid([np.zeros((1, 8, 8, 3), np.uint8)])
    assert picture.shape == (4 * 12, 4 * 12, 3)


def test_a_class_grid_has_a_row_for_each_label():
    labels = np.array([2, 0, 2, 0, 2])
    images = np.broadcast_to(np.uint8(labels * 10)[:, None, None, None], (5, 32, 32, 1))
    picture = figures.class_grid(images, labels)
    assert picture.shape[:2] == (2 + 2 * 34, 2 + 3 * 34)
    assert np.all(picture[2:34, 2:34] == 0) and np.all(picture[36:68, 2:34] == 20)
    assert figures.class_grid(images, labels, ('zero', 'one', 'two')).shape[1] > picture.shape[1]


def test_a_title_stands_above_the_grid():
    images, labels = np.zeros((4, 32, 32, 1), np.uint8), np.array([0, 0, 1, 1])
    plain = figures.class_grid(images, labels, ('zero', 'one'))
    titled = figures.class_grid(images, labels, ('zero', 'one'), title='step 500, w = 0.3, caf\udce9')
    extra = len(titled) - len(plain)
    assert extra > 14 and titled.shape[1] > plain.shape[1]  # a title that is longer than the rows
    np.testing.assert_array_equal(titled[extra:, : plain.shape[1]], plain)
    assert np.any(titled[:extra] < 255) and np.all(titled[extra:, plain.shape[1] :] == 255)


def test_files_are_whole_or_absent(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    figures.save_png(tmp_path / 'new' / 'a.png', picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'new' / 'a.png')), picture)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.png']


ROWS = [{'guidance_weight': w, 'fid': 1 + w**2, 'inception_score': 5 + w} for w in (0.0, 0.3, 4.0)]


def test_the_trade_off_is_a_picture():
    image = Image.open(io.BytesIO(figures.tradeoff(ROWS, title='title', real=9.0)))
    assert image.width > 2.5 * image.height > 1000
    figures.tradeoff(ROWS[:1], title='one weight')
    figures.tradeoff([{**ROWS[0], 'fid': float('nan')}, *ROWS[1:]], title='$not $ mathematics, \udcff')


def test_the_numbers_of_an_axis_stay_clear_of_the_points(monkeypatch):
    """w = 0 lies on the left end of its axis, with a ring if its FID is the least."""
    monkeypatch.setattr(figures, '_png', lambda figure: figure)
    for axis in figures.tradeoff(ROWS, title='title').axes:
        numbers = [label.get_window_extent() for label in axis.get_yticklabels() if label.get_text()]
        assert len(numbers) >= 3 and max(box.x1 for box in numbers) < axis.bbox.x0 - 10


def test_several_ways_to_guide_are_one_picture():
    costs = {'network_evaluations': 32.0, 'classifier_gradients': 32.0, 'seconds_per_image': 0.01}
    free = [{**row, **costs, 'classifier_weight': 0.0} for row in ROWS]
    guided = [{**row, 'guidance_weight': 0.0, 'classifier_weight': row['guidance_weight']} for row in free]
    image = Image.open(io.BytesIO(figures.comparison({'free': free, 'classifier': guided}, title='title')))
    assert image.width > image.height > 500


def test_a_chart_is_the_same_text_each_time():
    curves = [figures.Curve(ROWS, 'guidance_weight', 'ddim', 7)]
    first, second, other = (
        figures.chart(curves, 'inception_score', 'fid', size=(400, 286), salt=salt, best=0) for salt in 'aab'
    )
    assert first == second != other
    assert '<metadata' not in first and '>w = 0, FID 1.000</text>' in first
    assert [f'id="point {index}"' in first for index in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ('shown', 'line', 'expected'),
    [
        ((0, 4), None, (0, 4.2)),
        ((9.5, 9.9), None, (9.468, 9.932)),
        ((9.5, 9.9), 9.4, (9.36, 9.94)),  # near
        ((9.5, 9.9), 100.0, (9.468, 9.932)),
        ((-1.0, 1.0), 0.0, (-1.16, 1.16)),
        ((5.0,), None, (4.5, 5.5)),
        ((0.0,), None, (-0.5, 0.5)),
    ],
)
def test_axes_show_their_values(shown, line, expected):
    assert figures._limits(shown, line) == pytest.approx(expected)
