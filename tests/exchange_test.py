"""The convert job: OpenAI's weights into a workdir that samples, and our own into a file and back."""

import json

import jax
import numpy as np
import pytest

from cfg_jax import build, convert, trained
from cfg_jax.errors import UserError
from cfg_jax.jobs import convert as convert_job
from cfg_jax.jobs import sample
from cfg_jax.training import sharding
from tests import tiny

DATA = tiny.ROOT / 'tests' / 'data'
MODELS = json.loads((DATA / 'models.json').read_text())


def reference_config(name):
    """configs/adm64.py or its classifier at the size of one of the reference networks."""
    model = MODELS[name]
    config = tiny.load_config('imagenet64_classifier' if name == 'classifier' else 'adm64')
    changes = {
        'data.image_size': model['image_size'],
        'data.num_classes': 10,
        'model.channels': model['model_channels'],
        'model.channel_mult': tuple(model['channel_mult']),
        'model.num_blocks': model['num_res_blocks'],
        'model.attention_resolutions': tuple(model['image_size'] // f for f in model['attention_resolutions']),
        'model.head_channels': model['num_head_channels'],
        'model.dtype': 'float32',
        'convert.new_attention_order': model['use_new_attention_order'],
        'convert.path': str(DATA / f'{name}.pt'),
        'sample.num_steps': 4,
        'sample.num_images': 4,
        'sample.batch_size': 4,
    }
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    """Workdirs of the imported diffusion model and of the imported classifier."""
    folder = tmp_path_factory.mktemp('imported')
    for name in ('unet_new_order', 'classifier'):
        convert_job.run(reference_config(name), folder / name)
    return folder


def images_of(workdir):
    (path,) = workdir.glob('sample_*.npz')
    with np.load(path) as arrays:
        images = arrays['arr_0']
    path.unlink()
    return images


@pytest.mark.parametrize('form', ['eps', pytest.param('mean', marks=pytest.mark.slow)])
def test_an_imported_model_samples_and_its_classifier_guides(imported, form):
    config = reference_config('unet_new_order')
    sample.run(config, imported / 'unet_new_order')
    plain = images_of(imported / 'unet_new_order')
    assert plain.shape == (4, 16, 16, 3) and plain.std() > 0
    config.guidance.classifier_workdir = str(imported / 'classifier')
    config.guidance.classifier_form = form
    config.guidance.classifier_weight = 0.0
    sample.run(config, imported / 'unet_new_order')
    # clipping first takes eps through x and back: a grey level may round the other way
    np.testing.assert_allclose(images_of(imported / 'unet_new_order').astype(int), plain, atol=1)
    config.guidance.classifier_weight = 5.0
    sample.run(config, imported / 'unet_new_order')
    assert np.abs(images_of(imported / 'unet_new_order').astype(int) - plain).max() > 10


def test_export_and_back(imported, tmp_path):
    config = reference_config('unet_new_order')
    config.convert.path, config.convert.to = '', str(tmp_path / 'model.safetensors')
    convert_job.run(config, imported / 'unet_new_order')
    config.convert.path, config.convert.to = str(tmp_path / 'model.safetensors'), ''
    convert_job.run(config, tmp_path / 'again')
    mesh = sharding.make_mesh()
    trees = [trained.load(config, folder, mesh).params for folder in (imported / 'unet_new_order', tmp_path / 'again')]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_file_of_an_earlier_version_lacks_newer_fields(imported, tmp_path):
    config = reference_config('unet_new_order')
    params = trained.load(config, imported / 'unet_new_order', sharding.make_mesh()).params
    identity = build.model_identity(config)
    del identity['diffusion']['sigma_data']
    convert.save_safetensors(tmp_path / 'older.safetensors', params, {'config': json.dumps(identity)})
    config.convert.path = str(tmp_path / 'older.safetensors')
    convert_job.run(config, tmp_path / 'older')
    assert (tmp_path / 'older' / 'checkpoints' / '0').exists()


def test_weights_that_are_not_finite_are_named_and_draw_nothing(imported, tmp_path, monkeypatch):
    """At import, and in a checkpoint that an earlier version imported."""
    config = reference_config('unet_new_order')
    params = jax.tree.map(np.array, trained.load(config, imported / 'unet_new_order', sharding.make_mesh()).params)
    params['time_out']['bias'][3] = np.nan
    config.convert.path = str(tmp_path / 'bad.safetensors')
    convert.save_safetensors(config.convert.path, params)
    named = rf'time_out/bias holds NaN or infinity \(1 of its {params["time_out"]["bias"].size} numbers\)'
    with pytest.raises(UserError, match=rf'bad\.safetensors: cannot be read: {named}'):
        convert_job.run(config, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
    monkeypatch.setattr(convert_job, 'from_safetensors', lambda config, path: params)
    convert_job.run(config, tmp_path / 'x')
    with pytest.raises(UserError, match=rf'checkpoints/0: {named}; import or train these weights again'):
        sample.run(config, tmp_path / 'x')
    assert not list((tmp_path / 'x').glob('sample*'))


def test_what_does_not_fit_is_refused_and_nothing_written(imported, tmp_path):
    config = reference_config('unet_new_order')
    config.model.num_blocks = 2
    with pytest.raises(UserError, match=r'unet_new_order\.pt: the checkpoint does not fit this network .* is missing'):
        convert_job.run(config, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
    config = reference_config('unet_new_order')
    with pytest.raises(UserError, match='already holds checkpoints, up to step 0'):
        convert_job.run(config, imported / 'unet_new_order')
    params = trained.load(config, imported / 'unet_new_order', sharding.make_mesh()).params
    for metadata, message in (({'config': json.dumps(build.model_identity(tiny.config()))}, 'holds another network'),
                              ({'config': '{'}, 'metadata is damaged')):  # fmt: skip
        convert.save_safetensors(tmp_path / 'other.safetensors', params, metadata)
        config.convert.path = str(tmp_path / 'other.safetensors')
        with pytest.raises(UserError, match=message):
            convert_job.run(config, tmp_path / 'x')
    convert.save_safetensors(tmp_path / 'other.safetensors', {'conv_in': params['conv_in']}, {})
    with pytest.raises(
        UserError, match=r'other\.safetensors: the checkpoint does not fit this network .* conv_out/bias is missing'
    ):
        convert_job.run(config, tmp_path / 'x')
    config = reference_config('classifier')
    config.guidance.classifier_workdir = str(imported / 'unet_new_order')
    with pytest.raises(UserError, match='holds a unet, not a classifier'):
        trained.load_classifier(config, sharding.make_mesh())
