"""The whole path of ImageNet on a small scale: TFDS's layout, the paper's config, InceptionV3, a sweep, the report.

Minutes long: pytest -m slow.
"""

import csv

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import tfds_layout, tiny
from tests.inception_test import drawn_state_dict, saved


def write_data(data_dir, count):
    """Write `imagenet_resized/64x64`: image i is a disc on plain ground, coloured by its class 5i mod 1000."""
    rng, examples = np.random.default_rng(0), []
    y, x = np.mgrid[:64, :64]
    for i in range(count):
        label = 5 * i % 1000
        ground, disc = np.random.default_rng(label).integers(30, 226, (2, 3))
        centre = rng.uniform(20, 44, 2)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 15**2
        image = np.where(inside[..., None], disc, ground) + rng.normal(0, 5, (64, 64, 3))
        examples.append({'image': np.clip(image, 0, 255).astype(np.uint8), 'label': label})
    names = tfds.core.tfds_path('image_classification/imagenet_resized_labels.txt')
    features = {
        'image': tfds.features.Image(shape=(64, 64, 3)),
        'label': tfds.features.ClassLabel(names_file=names),
    }
    tfds_layout.write(data_dir, 'imagenet_resized/64x64', examples, version='0.1.0', features=features)


@pytest.mark.slow
def test_one_command_trains_samples_and_judges(tmp_path):
    write_data(tmp_path / 'data', 200)
    weights = saved(drawn_state_dict(), tmp_path / 'drawn.pth', legacy=False)
    small = {
        'data.data_dir': tmp_path / 'data',
        'model.channels': 16,
        'model.channel_mult': (1, 2, 2),
        'model.num_blocks': 1,
        'model.attention_resolutions': (16,),
        'model.head_channels': 16,
        'model.num_groups': 8,
        'model.dtype': 'float32',
        'model.dropout': 0.0,
        'optim.learning_rate': 2e-3,
        'optim.warmup_steps': 0,
        'optim.ema_decay': 0.98,
        'train.batch_size': 16,
        'train.num_steps': 120,
        'train.log_every': 50,
        'train.grid_every': 0,
        'sample.num_steps': 12,
        'sample.v': 1.0,
        'sample.batch_size': 20,
        'sample.num_images': 20,
        'eval.at_end': True,
        'eval.judge': 'inception',
        'eval.inception_weights': weights,
        'eval.guidance_weights': (0.0, 1.0, 4.0),
        'eval.num_samples': 60,
        'eval.allow_few_samples': True,
    }
    flags = [f'--config.{key}={value}' for key, value in small.items()]
    command = [f'--config={tiny.ROOT}/configs/imagenet64.py', f'--workdir={tmp_path / "run"}', *flags]
    done = tiny.main(*command, env=tiny.optimised())
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / 'run' / 'results.csv').open()))
    assert [float(row['guidance_weight']) for row in rows] == [0, 1, 4]
    assert len({row['samples_sha256'] for row in rows}) == len({row['fid'] for row in rows}) == 3
    for row in rows:
        assert all(np.isfinite(float(row[key])) for key in ('fid', 'sfid', 'inception_score', 'kernel_distance'))
        assert row['judge'].startswith('inception:sha256:') and 0 <= float(row['precision']) <= 1
    (npz,) = (tmp_path / 'run').glob('sample_*.npz')
    images = np.load(npz)['arr_0']
    assert images.shape == (20, 64, 64, 3)
    assert ((images > 0) & (images < 255)).mean() > 0.7  # not saturated, as those of an untrained network are
    report = (tmp_path / 'run' / 'report.html').read_text()
    assert report.count('data:image/png') >= 3
