import numpy as np
from PIL import Image

from cfg_jax.evaluation import grids


def test_a_grid_places_every_image():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * np.ones((1, 32, 32, 1), np.uint8)
    picture = grids.grid([images[:3], images[3:5]])
    assert picture.shape == (2 + 2 * 34, 2 + 3 * 34, 3)
    for row, column, value in [(0, 0, 0), (0, 2, 2), (1, 1, 4)]:
        assert np.all(picture[2 + 34 * row :, 2 + 34 * column :][:32, :32] == value)
    assert np.all(picture[36:, 70:] == 255)  # the row that is shorter


def test_small_images_are_enlarged_by_whole_pixels():
    picture = grids.grid([np.zeros((1, 8, 8, 3), np.uint8)])
    assert picture.shape == (4 * 12, 4 * 12, 3)


def test_images_may_be_enlarged_further():
    assert grids.grid([np.zeros((1, 8, 8, 3), np.uint8)], least=64).shape == (8 * 12, 8 * 12, 3)


def test_pictures_stand_beside_each_other_under_a_title():
    tall, short = np.zeros((300, 40, 3), np.uint8), np.full((100, 50, 3), 7, np.uint8)
    picture = grids.beside([tall, short])
    assert picture.shape == (300, 40 + 16 + 50 + 16, 3)
    assert np.all(picture[:, :40] == 0) and np.all(picture[:100, 56:106] == 7) and np.all(picture[100:, 56:] == 255)
    titled = grids.beside([tall, short], ('one', 'two'))
    np.testing.assert_array_equal(titled[-300:, :122], picture)
    assert len(titled) == 300 + 2 * 22


def test_a_class_grid_has_a_row_for_each_label():
    labels = np.array([2, 0, 2, 0, 2])
    images = np.broadcast_to(np.uint8(labels * 10)[:, None, None, None], (5, 32, 32, 1))
    picture = grids.class_grid(images, labels)
    assert picture.shape[:2] == (2 + 2 * 34, 2 + 3 * 34)
    assert np.all(picture[2:34, 2:34] == 0) and np.all(picture[36:68, 2:34] == 20)
    assert grids.class_grid(images, labels, ('zero', 'one', 'two')).shape[1] > picture.shape[1]


def test_a_title_stands_above_the_grid():
    images, labels = np.zeros((4, 32, 32, 1), np.uint8), np.array([0, 0, 1, 1])
    plain = grids.class_grid(images, labels, ('zero', 'one'))
    titled = grids.class_grid(images, labels, ('zero', 'one'), title='step 500, w = 0.3, caf\udce9')
    extra = len(titled) - len(plain)
    assert extra > 14 and titled.shape[1] > plain.shape[1]  # a title that is longer than the rows
    np.testing.assert_array_equal(titled[extra:, : plain.shape[1]], plain)
    assert np.any(titled[:extra] < 255) and np.all(titled[extra:, plain.shape[1] :] == 255)


def test_files_are_whole_or_absent(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    grids.save_png(tmp_path / 'new' / 'a.png', picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'new' / 'a.png')), picture)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.png']
