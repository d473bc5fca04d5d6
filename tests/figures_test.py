import io

import pytest
from matplotlib.text import Text
from PIL import Image

from cfg_jax.evaluation import figures, style

ROWS = [{'guidance_weight': w, 'fid': 1 + w**2, 'inception_score': 5 + w} for w in (0.0, 0.3, 4.0)]


def test_the_trade_off_is_a_picture():
    image = Image.open(io.BytesIO(figures.tradeoff(ROWS, title='title', real={'inception_score': 9.0, 'fid': 0.8}).png))
    assert 1000 < image.width < 1300 and image.width > 1.4 * image.height  # 680 px, at 1.8 times
    figures.tradeoff(ROWS[:1], title='one weight')
    figures.tradeoff([{**ROWS[0], 'fid': float('nan')}, *ROWS[1:]], title='$not $ mathematics, \udcff')


def test_precision_takes_the_place_of_an_inception_score(monkeypatch):
    monkeypatch.setattr(style, 'picture', lambda figure: figure)
    costs = {'network_evaluations': 32.0, 'classifier_gradients': 0.0, 'seconds_per_image': 0.01}
    rows = [{'guidance_weight': w, 'fid': 1 + w, 'precision': 0.5 + w / 9, **costs} for w in (0.0, 0.3, 4.0)]
    pictures = figures.tradeoff(rows, title='title'), figures.comparison({'free': rows}, title='title')
    for picture in pictures:
        assert picture.axes[0].get_xlabel() == 'precision ↑' and picture.axes[0].get_title(loc='left') == 'FID ↓'
    (line,) = (line for line in pictures[0].axes[2].lines if len(line.get_ydata()) == 3)
    assert line.get_ydata().tolist() == [row['precision'] for row in rows]


def test_the_numbers_of_an_axis_stay_clear_of_the_points(monkeypatch):
    """w = 0 lies on the left end of its axis, with a ring if its FID is the least."""
    monkeypatch.setattr(style, 'picture', lambda figure: figure)
    for axis in figures.tradeoff(ROWS, title='title').axes:
        numbers = [label.get_window_extent() for label in axis.get_yticklabels() if label.get_text()]
        assert len(numbers) >= 3 and max(box.x1 for box in numbers) < axis.bbox.x0 - 10


def test_several_ways_to_guide_are_one_picture():
    costs = {'network_evaluations': 32.0, 'classifier_gradients': 32.0, 'seconds_per_image': 0.01}
    free = [{**row, **costs, 'classifier_weight': 0.0} for row in ROWS]
    guided = [{**row, 'guidance_weight': 0.0, 'classifier_weight': row['guidance_weight']} for row in free]
    image = Image.open(io.BytesIO(figures.comparison({'free': free, 'classifier': guided}, title='title').png))
    assert image.width > image.height > 500


@pytest.mark.parametrize(('classifier_weight', 'shown'), [(0.0, 'w = 0.3'), (2.0, 'c = 2')])
def test_a_curve_of_one_point_is_labelled_by_the_weight_that_guides(monkeypatch, classifier_weight, shown):
    monkeypatch.setattr(style, 'picture', lambda figure: {text.get_text() for text in figure.findobj(Text)})
    costs = {'network_evaluations': 32.0, 'classifier_gradients': 0.0, 'seconds_per_image': 0.01}
    row = {**ROWS[1], **costs, 'classifier_weight': classifier_weight}
    assert shown in figures.comparison({'alone': [row]}, title='title')


def test_samplers_over_their_evaluations_are_one_picture(monkeypatch):
    monkeypatch.setattr(style, 'picture', lambda figure: figure)
    rows = [{'fid': 1 + 9 / n, 'fid_error': 0.1, 'network_evaluations': n} for n in (64, 8, 16)]
    (axis,) = figures.over_evaluations({'ddim': rows, 'heun': rows[:1]}, title='title').axes
    assert axis.get_xscale() == axis.get_yscale() == 'log'
    assert [line.get_xdata().tolist() for line in axis.lines if len(line.get_xdata()) > 1] == [[8.0, 16.0, 64.0]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ['ddim', 'heun']


def test_a_chart_is_the_same_text_each_time():
    curves = [figures.Curve(ROWS, 'guidance_weight', 'ddim', 7)]
    first, second, other = (
        figures.chart(curves, 'inception_score', 'fid', size=(400, 286), salt=salt, best=0) for salt in 'aab'
    )
    assert first == second != other
    assert '<metadata' not in first and '>w = 0, FID 1.000</text>' in first
    assert [f'id="point {index} curve7"' in first for index in range(4)] == [True, True, True, False]


def test_two_dozen_curves_can_be_told_apart():
    looks = {(number % style.NUM_COLORS, figures.swatch(number)) for number in range(24)}
    assert len(looks) == 24  # by colour and marker alone, without the dashes
    assert len({figures.dash(number) for number in range(0, 24, 6)}) == 4


def test_one_value_of_a_logarithmic_axis_is_enough():
    assert figures._spans_factors([1.0, 5.0, float('nan')])
    for values in ([1.0, 3.0], [0.0, 5.0], [-1.0, 5.0], [float('nan')] * 2, []):
        assert not figures._spans_factors(values)


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
