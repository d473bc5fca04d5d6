"""The door from Python: the same images as the command line's, the same errors, and no data needed."""

import shutil
import signal
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import cfg_jax
from cfg_jax import build_sampling, guidance
from cfg_jax.distributed.job import INTERRUPTED, Stopped
from cfg_jax.jobs import sample as sample_job
from tests import tiny


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('door') / 'run'
    cfg_jax.train(tiny.config(), folder)
    return folder


@pytest.fixture(scope='module')
def model(workdir):
    return cfg_jax.load(workdir)


def test_images_are_those_of_the_command_line(workdir, model):
    config = tiny.config(sample__labels='3,8', sample__guidance_weight=2.0, sample__num_images=7, sample__seed=5)
    with np.load(next(sample_job.run(config, workdir).folder.glob('*.npz'))) as arrays:
        wanted, labels = arrays['arr_0'], arrays['arr_1']
    assert labels.tolist() == [3, 8, 3, 8, 3, 8, 3]
    images = model.sample(labels=[3, '8'], weight=2.0, num_images=7, seed=5)
    assert images.dtype == np.uint8 and images.shape == (7, 8, 8, 1)
    np.testing.assert_array_equal(images, wanted)


def test_one_program_serves_all_weights_seeds_and_labels(model):
    fresh = cfg_jax.load(model.workdir)
    first = fresh.sample([1, 2], 0.5)
    (program,) = fresh._programs.values()
    assert (fresh.sample([3, 4], 2.0, seed=9) != first).any()
    assert list(fresh._programs.values()) == [program]
    fresh.sample([3, 4], num_steps=2)
    assert len(fresh._programs) == 2


def test_labels_alone_give_an_image_each_and_none_means_all_classes(model):
    assert len(model.sample([5, 5, 1])) == 3
    assert len(model.sample()) == model.config.sample.num_images == 20
    np.testing.assert_array_equal(model.sample('3,8', num_images=2), model.sample([3, 8]))


def test_a_function_of_ones_own_guides(model):
    def without(model, labels, weight, *, null_label):
        return guidance.classifier_free(model, labels, 0.0 * weight, null_label=null_label)

    off, on = model.sample([1, 2], 0.0), model.sample([1, 2], 8.0)
    np.testing.assert_array_equal(model.sample([1, 2], 8.0, guidance=without), off)
    assert (on != off).any()


def test_the_documented_guidance_of_two_models_and_a_state_runs(workdir, model):
    """The page's own lines: at w = 0 they change nothing, and the average goes from step to step."""
    page = (tiny.ROOT / 'docs' / 'own_guidance.md').read_text().split('## A second model')[1]
    names, weak = {}, cfg_jax.load(workdir, step=2)
    exec(page.split('```python\n')[1].split('```')[0], names)
    averaged = names['averaged']
    changes = {'guidance.weak': 'checkpoint', 'guidance.weak_step': 2}
    drawn = {w: model.sample([1, 2], w, guidance=averaged, changes=changes).astype(int) for w in (0.0, 30.0)}
    assert np.abs(drawn[0.0] - model.sample([1, 2], 0.0)).max() <= 1
    assert np.abs(drawn[30.0] - drawn[0.0]).max() > 1
    state = averaged(model.model, jnp.array([1, 2]), 1.0, null_label=10, weak_model=weak.model)
    z, logsnr = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.zeros(2)
    _, average = state.step(z, logsnr, state.start(z))
    np.testing.assert_allclose(state.step(z, logsnr, average)[1], 1.5 * average, rtol=1e-3, atol=1e-5)


def test_any_field_may_change_and_rules_may_be_functions(workdir, model):
    changes = {
        'sample.sampler': 'heun',
        'sample.grid': 'karras',
        'guidance.weak': 'checkpoint',
        'guidance.weak_step': 2,
    }
    images = model.sample([1, 2], 3.0, changes=changes)
    same = model.sample([1, 2], 3.0, changes={**changes, 'guidance.rule': lambda a, b, w: (1.0 + w) * a - w * b})
    assert images.shape == (2, 8, 8, 1) and np.abs(images.astype(int) - same).max() <= 1
    z, logsnr = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.zeros(2)
    weak, labels = cfg_jax.load(workdir, step=2), jnp.array([1, 2])
    guided = model.denoiser([1, 2], 3.0, changes=changes)(z, logsnr).eps
    expected = 4.0 * model.model(z, logsnr, labels).eps - 3.0 * weak.model(z, logsnr, labels).eps
    np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(cfg_jax.UserError, match=r'^rule is .*; it must be \(strong eps, weak eps, weight\)'):
        model.sample([1], 1.0, changes={'guidance.rule': lambda a: a})


def test_the_denoiser_is_eq_6(model):
    z, logsnr = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.5, -2.0])
    network = jax.jit(model.model)
    conditional, null = (network(z, logsnr, jnp.array(labels)).eps for labels in ([3, 8], [model.null_label] * 2))
    guided = jax.jit(model.denoiser([3, '8'], 1.5))(z, logsnr).eps
    np.testing.assert_allclose(guided, 2.5 * conditional - 1.5 * null, rtol=1e-4, atol=1e-5)


def test_without_guidance_the_weight_is_0_or_something_else_is_weak(model):
    """The weights of config.eval, most of them not 0, are not those of these images."""
    assert any(model.config.eval.guidance_weights)
    plain = model.sample([1, 2], guidance='conditional')
    np.testing.assert_array_equal(plain, model.sample([1, 2], 0.0))
    guided = model.sample([1, 2], 8.0, guidance='conditional', changes={'guidance.weak': 'random_label'})
    assert (guided != plain).any()


def test_a_list_of_weights_is_one_for_each_label(model):
    """On every schedule, and for a guidance of one's own."""
    z, logsnr = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.5, -2.0])

    def own(model, labels, weight, *, null_label):
        return guidance.classifier_free(model, labels, 1.0 * weight, null_label=null_label)

    for changes in ({}, {'guidance.schedule': 'linear'}, {'guidance.function': own}):
        both = jax.jit(model.denoiser([3, 8], [0.5, 1.0], changes=changes))(z, logsnr).eps
        for image, weight in enumerate((0.5, 1.0)):
            alone = jax.jit(model.denoiser([3, 8], weight, changes=changes))(z, logsnr).eps[image]
            np.testing.assert_allclose(both[image], alone, rtol=1e-5, atol=1e-6)


def test_steps_and_raw_parameters_can_be_asked_for(workdir, model):
    early, raw = cfg_jax.load(workdir, step=2), cfg_jax.load(workdir, ema=False)
    assert (early.step, raw.step, model.step) == (2, 4, 4)
    different = [jax.tree.map(lambda a, b: (a != b).any(), other.params, model.params) for other in (early, raw)]
    assert all(any(jax.tree.leaves(each)) for each in different)


def test_a_classifier_guides_and_shows_its_log_prob(workdir, tmp_path):
    config = tiny.config(model__kind='classifier', loss__p_uncond=0.0)
    classifier = cfg_jax.train(config, tmp_path / 'classifier')
    z = jax.random.normal(jax.random.key(0), (10, 8, 8, 1))
    log_prob = jax.jit(classifier.log_prob)
    of_labels = [log_prob(z, jnp.zeros(10), jnp.full(10, label)) for label in range(10)]
    np.testing.assert_allclose(jnp.exp(jnp.array(of_labels)).sum(axis=0), 1.0, rtol=1e-5)
    guided = cfg_jax.load(workdir, classifier=tmp_path / 'classifier')
    off, on = (guided.sample([1, 2], guidance='unconditional', classifier_weight=w) for w in (0.0, 50.0))
    assert (on != off).any()
    with pytest.raises(cfg_jax.UserError, match='holds a classifier'):
        classifier.sample([1])
    assert classifier._repr_png_() is None and repr(classifier).startswith('Classifier of 10 classes')


def test_a_model_shows_itself(model):
    assert model._repr_png_().startswith(b'\x89PNG') and model._repr_png_() is model._repr_png_()
    assert '10 classes, 8x8x1' in repr(model) and 'step 4' in repr(model) and len(repr(model)) < 300


def test_grid():
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
    picture = cfg_jax.grid(images, [7, 8])  # rows: 7 (images 0 and 2), 8
    assert isinstance(picture, Image.Image)
    assert picture.size[1] == 4 * (2 + 2 * (8 + 2))
    assert cfg_jax.grid(images).size == (4 * (2 + 3 * 10), 4 * (2 + 10))
    with pytest.raises(cfg_jax.UserError, match='a grid needs uint8'):
        cfg_jax.grid(images / 255.0)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda m: m.sample([10]), 'label 10 is not a class'),
        (lambda m: m.sample(['ten']), "label 'ten' is not a class"),
        (lambda m: m.sample([1.5]), 'label 1.5 is not a class'),
        (lambda m: m.sample([]), 'labels are empty'),
        (lambda m: m.sample([1], float('nan')), 'weight is nan'),
        (
            lambda m: m.sample([1], 3.0, guidance='conditional'),
            "^weight has 3, but nothing guides by it: config.guidance.function is 'conditional' and",
        ),
        (lambda m: m.sample([1], -1.0, guidance='unconditional'), 'weight has -1, but nothing guides by it'),
        (lambda m: m.denoiser([1, 2], [0.0, 3.0], guidance='conditional'), 'weight has 3, but nothing guides by it'),
        (lambda m: m.sample([1], '3'), "weight is '3'; it must be one finite number"),
        (lambda m: m.sample([1, 2], [0.0, 1.0]), r'weight is \[0.0, 1.0\]; it must be one finite number'),
        (lambda m: m.denoiser([1, 2], float('nan')), 'weight is nan; it must be one finite number, or one for each'),
        (lambda m: m.denoiser([1, 2], [1.0, np.inf]), r'weight is \[1.0, inf\]; it must be one finite number'),
        (lambda m: m.denoiser([1, 2], [0.0, 1.0, 2.0]), 'must be one finite number, or one for each of the 2 labels'),
        (lambda m: m.denoiser([1, 2], [[0.0], [1.0, 2.0]]), 'must be one finite number'),
        (lambda m: jax.jit(lambda w: m.denoiser([1, 2], w))(np.zeros(3)), 'one for each of the 2 labels'),
        (lambda m: m.denoiser([1], classifier_weight='a'), "classifier_weight is 'a'; it must be one finite"),
        (lambda m: m.denoiser([1], classifier_weight=2.0), 'classifier_weight is 2.0, but no classifier guides'),
        (lambda m: cfg_jax.load(m.workdir, ema=None), 'ema is None; it must be True'),
        (lambda m: cfg_jax.load(m.workdir, ema='0.1'), "ema is '0.1'; it must be True"),
        (lambda m: cfg_jax.load(m.workdir, step='4'), "step is '4'; it must be a whole number"),
        (lambda m: m.sample([1], sampler='euler'), "config.sample.sampler is 'euler'"),
        (lambda m: m.sample([1], num_images=0), 'config.sample.num_images is 0'),
        (lambda m: m.sample([1], guidance=lambda z: z), 'it must be'),
        (lambda m: m.log_prob, 'holds a unet'),
        (lambda m: cfg_jax.load(m.workdir.parent), 'no checkpoint in'),
        (lambda m: cfg_jax.load(m.workdir, step=3), 'no checkpoint of step 3 in .*; there are 4, 2'),
        (lambda m: cfg_jax.read_config('digit'), "no config file 'digit'; there are .*digits.py"),
        (lambda m: cfg_jax.read_config('digits', {'train.steps': 3}), "unknown config field 'train.steps'.*num_steps"),
        (lambda m: cfg_jax.read_config('digits', {'train.num_steps': 'x'}), "config.train.num_steps cannot be 'x'"),
        (lambda m: cfg_jax.train('mixture2d', m.workdir.parent / 'x'), 'for --mode=laboratory alone'),
        (lambda m: cfg_jax.evaluate(m.workdir, {'eval.judge': 'x'}), "config.eval.judge is 'x'"),
    ],
)
def test_bad_input_is_one_line(model, call, message):
    with pytest.raises(cfg_jax.UserError, match=message) as caught:
        call(model)
    assert '\n' not in str(caught.value)
    assert caught.value._render_traceback_() == [f'error: {caught.value}']


def test_read_config_finds_by_name_and_by_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = cfg_jax.read_config('digits', {'train.num_steps': 7, 'data.data_dir': '~/x'})
    assert config.train.num_steps == 7 and not config.data.data_dir.startswith('~') and config.is_locked
    shutil.copy(tiny.ROOT / 'configs' / 'digits.py', tmp_path / 'mine.py')
    assert cfg_jax.read_config('mine.py').to_dict() == cfg_jax.read_config('digits').to_dict()


def test_training_reports_and_resumes(tmp_path):
    lines = []
    config = tiny.config()
    cfg_jax.train(config, tmp_path, {'train.num_steps': 2}, callback=lambda step, values: lines.append((step, values)))
    model = cfg_jax.train(config, tmp_path, callback=lambda step, values: lines.append((step, values)))
    assert [step for step, _ in lines] == [2, 4] and model.step == 4
    assert all(np.isfinite(values['loss']) and values['images_per_second'] > 0 for _, values in lines)
    assert config.train.num_steps == 4  # the caller's config is not changed


def test_an_interrupt_saves_and_the_same_call_resumes(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    config = tiny.config(train__num_steps=50, train__log_every=1, train__checkpoint_every=50)
    with pytest.raises(Stopped, match='is saved; rerun the same call') as caught:
        cfg_jax.train(config, tmp_path, callback=lambda step, _: step == 2 and signal.raise_signal(signal.SIGINT))
    assert caught.value.status == INTERRUPTED and signal.getsignal(signal.SIGINT) is before
    saved = cfg_jax.load(tmp_path).step
    assert 2 <= saved <= 4
    assert cfg_jax.train(config, tmp_path, {'train.num_steps': saved + 2}).step == saved + 2


def test_training_in_a_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(cfg_jax.train(tiny.config(), tmp_path)))
    thread.start()
    thread.join()
    assert done[0].step == 4


def test_evaluating_returns_the_rows(workdir):
    def halved(model, labels, weight, *, null_label):
        return guidance.classifier_free(model, labels, 0.5 * weight, null_label=null_label)

    rows = cfg_jax.evaluate(workdir, {'eval.folder': 'halved'}, guidance=halved)
    assert [row['guidance_weight'] for row in rows] == [0.0, 1.0] and all(np.isfinite(row['fid']) for row in rows)
    assert rows[0]['guidance'].startswith('python:halved, sha256 ')
    assert (workdir / 'halved' / 'report.html').exists()


def digest_of(function):
    return build_sampling.guidance_digest(tiny.config(guidance__function=build_sampling.given_function(function)))


def test_a_given_function_is_known_by_what_it_computes():
    settings = types.SimpleNamespace(factor=0.5, table=np.arange(5000.0))

    def scaled(model, labels, weight, *, null_label):
        factor = settings.factor * jnp.asarray(settings.table, jnp.float32)[labels[0]]
        return guidance.classifier_free(model, labels, factor * weight, null_label=null_label)

    first = digest_of(scaled)
    assert digest_of(scaled) == first
    settings.factor = 0.25
    second = digest_of(scaled)
    settings.table[2500] = 1.0  # deep within a constant
    assert len({first, second, digest_of(scaled)}) == 3


def test_loading_and_sampling_need_no_data_and_few_libraries(workdir):
    heavy = [
        'tensorflow',
        'tensorflow_datasets',
        'clu',
        'grain',
        'array_record',
        'sklearn',
        'matplotlib',
        'safetensors',
    ]
    blocked = ''.join(f'sys.modules[{name!r}] = None\n' for name in heavy)
    code = f'import sys\n{blocked}import cfg_jax\nprint(cfg_jax.load({str(workdir)!r}).sample([3], 1.0).shape)'
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tiny.ROOT, env=tiny.environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '(1, 8, 8, 1)'
    assert not done.stderr


def test_importing_the_package_brings_no_jax():
    code = "import cfg_jax, sys; assert 'jax' not in sys.modules; assert 'load' in dir(cfg_jax); cfg_jax.nothing"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'cfg_jax' has no attribute 'nothing'"
