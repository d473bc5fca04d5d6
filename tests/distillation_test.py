"""Distillation: its targets on mixtures whose score is known, and runs of tiny students."""

import csv
import dataclasses
import json
import shutil
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cfg_jax
from cfg_jax import build, build_sampling, diffusion, distillation, losses, mixtures, samplers, schedules, trained
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.errors import UserError
from cfg_jax.jobs import convert, evaluate, train
from cfg_jax.jobs.evaluate import curves, means
from cfg_jax.training import optim
from tests import tiny

MIXTURE = mixtures.star(3, dimensions=4)
LABELS = jnp.arange(64) % 3
X = MIXTURE.sample(jax.random.key(0), 64, LABELS)
KEY = jax.random.key(1)


def output_of(prediction):
    """The exact network of the mixture: eps, x or v."""

    def network(z, logsnr, labels):
        eps = MIXTURE.model(z, logsnr, labels).eps
        x = diffusion.predict_x(z, eps, logsnr)
        return {'eps': eps, 'x': x, 'v': diffusion.velocity(x, eps, logsnr)}[prediction]

    return network


def schedule(u):
    return schedules.cosine_logsnr(u, logsnr_min=-8.0, logsnr_max=8.0)


# ---------------------------------------------------------------- guided distillation


@pytest.mark.parametrize('prediction', ['eps', 'x', 'v'])
def test_the_guided_output_is_the_guided_model(prediction):
    """Against classifier-free guidance of the exact eps."""
    logsnr, weight = jnp.linspace(-4.0, 4.0, 64), jnp.linspace(0.0, 4.0, 64)
    z = diffusion.q_sample(X, jax.random.normal(KEY, X.shape), logsnr)
    found = distillation.guided_output(output_of(prediction), z, logsnr, LABELS, weight, null_label=3)
    conditional, null = (MIXTURE.model(z, logsnr, labels).eps for labels in (LABELS, jnp.full(64, 3)))
    wanted = (1 + weight[:, None]) * conditional - weight[:, None] * null
    eps = diffusion.network_eps(found, z, logsnr, prediction)
    np.testing.assert_allclose(eps, wanted, atol=2e-4)


@pytest.mark.parametrize('prediction', ['eps', 'v'])
def test_a_student_that_guides_has_no_loss(prediction):
    network = output_of(prediction)
    seen = []

    def student(z, logsnr, labels, weight):
        seen.append(weight)
        both = network(z, logsnr, labels), network(z, logsnr, jnp.full_like(labels, 3))
        return both[0] + weight[:, None] * (both[0] - both[1])

    options = {'schedule': schedule, 'null_label': 3, 'weight_max': 4.0, 'prediction': prediction}
    right = distillation.guided_loss(student, network, X, LABELS, KEY, **options)
    assert float(right.loss.max()) < 1e-6
    assert float(seen[0].min()) >= 0
    assert 3 < float(seen[0].max()) < 4
    unguided = distillation.guided_loss(
        lambda z, logsnr, c, w: network(z, logsnr, c), network, X, LABELS, KEY, **options
    )
    assert float(unguided.loss.mean()) > 0.01


# ---------------------------------------------------------------- progressive distillation


def ddim_in_float64(z, logsnrs):
    """DDIM steps of the mixture in numpy, from the closed form of its score, unclipped: z at the last λ."""

    def alpha_sigma(logsnr):
        return np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))

    means, weights = np.float64(MIXTURE.means), np.float64(MIXTURE.weights)
    covariances = np.float64(MIXTURE.covariances)
    for here, there in pairwise(logsnrs):
        alpha, sigma = alpha_sigma(here)
        precision = np.linalg.inv(alpha**2 * covariances + sigma**2 * np.eye(4))
        away = z[:, None] - alpha * means
        pulled = np.einsum('kij,nkj->nki', precision, away)
        logits = np.log(weights) - 0.5 * np.einsum('nki,nki->nk', away, pulled)
        logits += 0.5 * np.linalg.slogdet(precision)[1]
        logits[np.asarray(MIXTURE.labels)[None] != np.asarray(LABELS)[:, None]] = -np.inf
        share = np.exp(logits - logits.max(1, keepdims=True))
        eps = sigma * np.einsum('nk,nki->ni', share / share.sum(1, keepdims=True), pulled)
        alpha_s, sigma_s = alpha_sigma(there)
        z = alpha_s * (z - sigma * eps) / alpha + sigma_s * eps
    return z


@pytest.mark.parametrize('ends', [(-6.0, -2.0, 1.0), (-3.0, -2.9, -2.8), (0.0, 2.0, 8.0), (2.0, 5.0, 20.0)])
def test_the_pair_of_steps_gives_the_analytic_x(ends):
    """Salimans & Ho's formula, in float64 from the closed form of the mixture's score."""
    z = diffusion.q_sample(X, jax.random.normal(KEY, X.shape), ends[0])
    logsnrs = [jnp.full(64, end) for end in ends]
    found = distillation.ddim_pair(lambda z, logsnr: output_of('x')(z, logsnr, LABELS), z, *logsnrs)
    last = ddim_in_float64(np.float64(z), ends)
    (alpha, sigma), (alpha_s, sigma_s) = (
        (np.sqrt(1 / (1 + np.exp(-end))), np.sqrt(1 / (1 + np.exp(end)))) for end in (ends[0], ends[2])
    )
    analytic = (last - sigma_s / sigma * np.float64(z)) / (alpha_s - sigma_s / sigma * alpha)
    np.testing.assert_allclose(found, analytic, atol=1e-5)


@pytest.mark.parametrize('num_steps', [1, 4, 64])
def test_a_student_of_half_the_steps_ends_where_its_teacher_does(num_steps):
    """The loss is 0 for the student that the targets define, and its N steps arrive where the teacher's 2N do."""

    def pair(z, logsnr, labels, weight=None):
        u = schedules.cosine_u(logsnr, logsnr_min=-8.0, logsnr_max=8.0)
        later = [schedule(jnp.maximum(u - part / num_steps, 0.0)) for part in (0.5, 1.0)]
        return distillation.ddim_pair(lambda z, at: output_of('x')(z, at, labels), z, logsnr, *later)

    def student(z, logsnr, labels, weight):
        x = pair(z, logsnr, labels)
        return diffusion.velocity(x, diffusion.predict_eps(z, x, logsnr), logsnr)

    teacher = output_of('v')
    found = distillation.progressive_loss(
        student,
        lambda z, logsnr, c, w: teacher(z, logsnr, c),
        X,
        LABELS,
        KEY,
        schedule=schedule,
        num_steps=jnp.int32(num_steps),
        weight_max=0.0,
        clip_x=False,
    )
    assert float(found.loss.max()) < 1e-5

    def walk(network_x, steps):
        def denoise(z, logsnr):
            return diffusion.Prediction(diffusion.predict_eps(z, network_x(z, logsnr, LABELS), logsnr))

        noise = jax.random.normal(KEY, X.shape)
        return samplers.ddim(denoise, noise, schedules.open_logsnr_grid(schedule, steps), clip_x=False)

    # the last step ends at λ_max, where the sampler takes x in place of z
    np.testing.assert_allclose(walk(pair, num_steps), walk(output_of('x'), 2 * num_steps), atol=0.02)


def test_starts_of_steps_are_drawn_evenly():
    u = np.asarray(distillation.sample_step(KEY, 40_000, 4, low_discrepancy=False))
    values, counts = np.unique(u, return_counts=True)
    np.testing.assert_allclose(values, [0.25, 0.5, 0.75, 1.0])
    assert np.abs(counts - 10_000).max() < 4 * np.sqrt(40_000 * 3 / 16)
    np.testing.assert_array_equal(np.sort(distillation.sample_step(KEY, 4, 4, low_discrepancy=True)), values)


def test_the_open_grid_leaves_out_the_data():
    grid = np.asarray(schedules.open_logsnr_grid(schedule, 4))
    np.testing.assert_allclose(
        grid, schedules.cosine_logsnr(np.array([1, 0.75, 0.5, 0.25]), logsnr_min=-8, logsnr_max=8)
    )
    np.testing.assert_array_equal(schedules.open_logsnr_grid(schedule, 1), [grid[0]])


def test_a_round_begins_with_a_fresh_optimizer_but_its_own_learning_rate():
    rate = optim.by_rounds([optax.constant_schedule(1.0), optax.constant_schedule(2.0)], [3, 3])
    assert [float(rate(step)) for step in range(6)] == [1, 1, 1, 2, 2, 2]
    optimizer = optim.make_optimizer(rate, clip_norm=1.0)
    params = {'w': jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(params, state, params)
    first = optim.restarted(optimizer, state, params)
    assert int(optax.tree.get(first, 'mu')['w'].sum()) == 0
    updates, _ = optimizer.update(params, first, params)
    np.testing.assert_allclose(updates['w'], -2.0, rtol=1e-5)  # Adam's first step, at the second round's rate


# ---------------------------------------------------------------- runs

V = {'diffusion__prediction': 'v', 'loss__target': 'v', 'train__keep_every': 2}
STUDENT = V | {
    'loss__p_uncond': 0.0,
    'model__guidance_input': True,
    'guidance__function': 'learned',
    'distill__method': 'guided',
}
ROUNDS = {
    'distill__method': 'progressive',
    'distill__rounds': ((4, 4), (2, 4)),
    'train__num_steps': 8,
    'sample__sampler': 'ddim',
    'sample__grid': 'u_open',
    'sample__num_steps': 2,
}


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
    """A teacher, its student that takes w, and the rounds from that one: folders."""
    folder = tmp_path_factory.mktemp('distillation')
    train.run(tiny.config(**V), folder / 'teacher')
    train.run(tiny.config(**STUDENT, distill__teacher=str(folder / 'teacher')), folder / 'guided')
    train.run(tiny.config(**STUDENT | ROUNDS, distill__teacher=str(folder / 'guided')), folder / 'progressive')
    return folder


def test_an_untrained_student_draws_its_teachers_unguided_images(workdirs, tmp_path):
    config = tiny.config(**STUDENT, distill__teacher=str(workdirs / 'teacher'), optim__learning_rate=0.0)
    train.run(config, tmp_path)
    student, teacher = trained.load(config, tmp_path), trained.load(tiny.config(**V), workdirs / 'teacher')
    labels = np.arange(10)
    draw = trained.image_batches(student.config)
    wanted = next(trained.image_batches(teacher.config)(teacher.params, labels, 0.0, 0))
    for weight in (0.0, 2.0):
        found = next(draw(student.params, labels, weight, 0))
        assert np.abs(np.int32(found) - wanted).max() <= 1


def test_the_student_learns_the_guidance_of_its_teacher(workdirs):
    """Its loss falls below that of a student that does not guide; w changes its images."""
    model = trained.load(tiny.config(**STUDENT), workdirs / 'guided')
    draw = trained.image_batches(model.config)
    images = [next(draw(model.params, np.arange(10), weight, 0)) for weight in (0.0, 4.0)]
    assert (images[0] != images[1]).any()
    cost = build_sampling.count_evaluations(model.config, 1.0)['network_evaluations']
    assert cost == model.config.sample.num_steps
    teacher = tiny.config(**V)
    assert build_sampling.count_evaluations(teacher, 1.0)['network_evaluations'] == 2 * teacher.sample.num_steps


@pytest.mark.parametrize('kept', [2, 4, 6])
def test_a_killed_distillation_resumes_to_the_same_bits(workdirs, tmp_path, capsys, kept):
    """Inside the first round, between the rounds, and inside the second."""
    shutil.copytree(workdirs / 'progressive', tmp_path / 'run')
    for folder in (tmp_path / 'run' / 'checkpoints').iterdir():
        if int(folder.name) > kept:
            shutil.rmtree(folder)
    config = tiny.config(**STUDENT | ROUNDS, distill__teacher=str(tmp_path / 'gone'))  # checkpoints hold the teacher
    state = train.run(config, tmp_path / 'run')
    assert f"the teacher stays '{workdirs / 'guided'}'" in capsys.readouterr().out
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '2')
    whole = train.run(config, workdirs / 'progressive')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))


def test_a_student_resumes_only_with_the_teachers_clipping(workdirs):
    changed = tiny.config(**STUDENT | ROUNDS, distill__teacher=str(workdirs / 'guided'), sample__clip_x=False)
    with pytest.raises(UserError, match=r'config\.sample\.clip_x is False now and was True when saved'):
        train.run(changed, workdirs / 'progressive')


def test_rounds_are_the_same_on_several_devices(workdirs, tmp_path):
    """Four devices, the state split over them, a batch in two parts: losses as on one device, up to rounding.

    The student of each round is kept, though neither of the two fields of config.train would.
    """
    split = {'train__accumulation_steps': 2, 'distill__teacher': str(workdirs / 'guided')}
    split |= {'train__checkpoint_every': 3, 'train__keep_every': 0, 'train__keep_checkpoints': 1}
    losses_of = {}
    for devices in (1, 4):
        workdir, flags = tmp_path / str(devices), tiny.flags(**STUDENT | ROUNDS | split)
        done = tiny.main(*flags, f'--config.train.fsdp={devices > 1}', f'--workdir={workdir}', devices=devices)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'4', '8'}
        lines = (workdir / 'metrics.jsonl').read_text().splitlines()
        losses_of[devices] = [json.loads(line)['loss'] for line in lines]
    assert len(losses_of[4]) == 4
    np.testing.assert_allclose(losses_of[4], losses_of[1], rtol=1e-3)


def test_each_round_starts_from_the_student_before(workdirs):
    config = tiny.config(**STUDENT | ROUNDS)
    assert [build.student_steps(config, step) for step in (0, 1, 4, 5, 8)] == [4, 4, 4, 2, 2]
    model = trained.load(config, workdirs / 'progressive', step=4)
    saved = train.run(config, workdirs / 'progressive')
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(saved.teacher_params), jax.device_get(model.params))


def test_the_students_of_all_rounds_are_judged_at_their_own_steps(workdirs):
    config = tiny.config(**STUDENT | ROUNDS, eval__judge='trained', eval__steps=(4, 8), eval__num_samples=40)
    evaluate.run(config, workdirs / 'progressive')
    table = (workdirs / 'progressive' / 'results.csv').read_text()
    assert 'step 4, 4 steps' in table and 'step 8, 2 steps' in table


def variants_of(workdirs, text, **changes):
    """The tiny progressive config with the variants of this text, in which {teacher} is a workdir."""
    path = workdirs / 'variants.py'
    path.write_text(text.replace('{teacher}', str(workdirs / 'teacher')))
    return tiny.config(**STUDENT | ROUNDS, eval__variants=str(path), eval__judge='trained', **changes)


def test_variants_are_curves_of_several_models(workdirs):
    """Over the number of steps: the students, each from the checkpoint of its round, and the first teacher."""
    text = """VARIANTS = {
        'students': {'eval.num_steps': (2, 4), 'eval.guidance_weights': (1.0,)},
        'teacher': {'workdir': '{teacher}', 'eval.num_steps': (1, 4), 'eval.guidance_weights': (1.0,)},
    }"""
    config = variants_of(workdirs, text, eval__folder='several')
    every = curves.curves(config)
    assert [(curve.variant, curve.step, curve.config.sample.num_steps) for curve in every] == [
        ('students', 8, 2),
        ('students', 4, 4),
        ('teacher', None, 1),
        ('teacher', None, 4),
    ]
    assert every[3].config.guidance.function == 'classifier_free' and every[3].config.sample.sampler == 'ddim'
    rows = evaluate.run(config, workdirs / 'progressive')
    assert [row['network_evaluations'] for row in rows] == [2, 4, 2, 8]
    assert [row['step'] for row in rows] == [8, 4, 4, 4]
    assert len({row['samples_sha256'] for row in rows}) == 4
    assert (workdirs / 'progressive' / 'several' / 'evaluations.png').stat().st_size > 10_000


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ("{'workdir': 'nowhere'}", "variant 'a': no checkpoint in nowhere"),
        ("{'workdir': 3}", "variant 'a': 'workdir' is 3 and 'step' None; they must be"),
        ("{'workdir': '{teacher}', 'step': 3}", r'no checkpoint of step 3 in .*; there are 4, 2'),
        ("{'eval.num_steps': (3,), 'eval.guidance_weights': (1.0,)}", 'there are students of 4, 2 steps'),
        ("{'eval.num_steps': (2, 4)}", 'so there must be one weight'),
        (
            "{'step': 4}",
            "step 4 is the student of 4 steps and 'sample.num_steps' is 2; set it to 4, or leave out 'step'",
        ),
        ("{'workdir': '~nobody-of-this-name/runs'}", "'workdir' is '~nobody-of-this-name/runs', but the home folder"),
    ],
)
def test_a_variant_of_a_model_that_is_not_there_is_refused(workdirs, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.run(variants_of(workdirs, f"VARIANTS = {{'a': {changes}}}"), workdirs / 'progressive')


@pytest.mark.parametrize(
    ('changes', 'teacher', 'message'),
    [
        ({}, None, 'config.distill.teacher is not set'),
        ({'model__channels': 16}, 'teacher', 'config.model.channels is 16, but the teacher in .* has 8'),
        ({'diffusion__prediction': 'x'}, 'teacher', "config.diffusion.prediction is 'x', but the teacher"),
        ({}, 'guided', 'takes the guidance weight already'),
        (ROUNDS, 'teacher', 'config.model.guidance_input is True, but the teacher in .* has False'),
        ({'data__num_classes': 10, 'distill__method': ''}, 'teacher', 'config.distill.teacher'),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(workdirs, tmp_path, changes, teacher, message):
    place = str(workdirs / teacher) if teacher else ''
    with pytest.raises(UserError, match=message):
        train.run(tiny.config(**STUDENT | changes, distill__teacher=place), tmp_path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'sample__guidance_weight': 5.0}, 'config.sample.guidance_weight has 5, but .* from 0 to 4'),
        ({'sample__guidance_scale': 0.5}, 'config.sample.guidance_weight has -0.5'),
        ({'eval__guidance_weights': (0.0, 8.0)}, 'config.eval.guidance_weights has 8'),
        ({'loss__p_uncond': 0.1}, 'config.loss.p_uncond is 0.1; it must be 0 because'),
        ({'model__guidance_input': False}, 'config.guidance.function'),
        ({'distill__rounds': ((4, 4),)}, r'config.distill.rounds is .*; it must be \(\) because'),
        (ROUNDS | {'distill__rounds': ((4, 4), (3, 4))}, 'students of half the steps each'),
        (ROUNDS | {'distill__rounds': ((4, 0), (2, 8))}, 'a tuple of'),
        (ROUNDS | {'distill__rounds': ((4, True), (2, 7))}, 'a tuple of'),
        (ROUNDS | {'distill__rounds': (4, 4)}, 'a tuple of'),
        (ROUNDS | {'distill__rounds': ('4', (2, 8))}, 'a tuple of'),
        (ROUNDS | {'sample__grid': 'u'}, "config.sample.grid is 'u'; it must be 'u_open'"),
        (ROUNDS | {'sample__sampler': 'ancestral'}, "config.sample.sampler is 'ancestral'; it must be 'ddim'"),
        (ROUNDS | {'sample__eta': 1.0}, 'config.sample.eta is 1.0; it must be 0.0 because'),
        (ROUNDS | {'sample__clip_percentile': 90.0}, 'config.sample.clip_percentile is 90.0; it must be 0.0 because'),
        (ROUNDS | {'eval__bits_per_dim': True}, 'config.eval.bits_per_dim is True'),
        ({'guidance__function': 'classifier_free'}, "'classifier_free'; it must be 'learned' or 'conditional'"),
        ({'guidance__function': 'unconditional'}, 'a student does not learn the null label'),
        (ROUNDS | {'model__guidance_input': False, 'guidance__function': 'classifier_free'}, "must be 'conditional'"),
        ({'guidance__weak': 'time'}, "config.guidance.weak is 'time'; it must be ''"),
        (ROUNDS | {'train__num_steps': 9}, 'config.train.num_steps is 9; it must be 8'),
        (ROUNDS | {'diffusion__prediction': 'eps'}, "config.diffusion.prediction is 'eps'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny.config(**STUDENT | {'distill__teacher': 'anywhere'} | changes))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__guidance_input': True}, 'config.model.guidance_input is True; it must be False unless'),
        (STUDENT | ROUNDS | {'sample__num_steps': 3}, 'config.sample.num_steps is 3; there are students of 4, 2 steps'),
    ],
)
def test_a_config_to_draw_with_alone_is_not_trained(tmp_path, changes, message):
    check_config(tiny.config(**changes))
    with pytest.raises(UserError, match=message):
        train.run(tiny.config(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_number_of_steps_has_its_own_student(workdirs):
    """In curves over config.eval.num_steps, from Python, and as the teacher of other rounds."""
    config = tiny.config(**STUDENT | ROUNDS, eval__num_steps=(2, 4))
    assert [(curve.config.sample.num_steps, curve.step) for curve in curves.curves(config)] == [(2, 8), (4, 4)]
    with pytest.raises(UserError, match='there are students of 4, 2 steps'):
        curves.curves(tiny.config(**STUDENT | ROUNDS, eval__num_steps=(2, 3)))
    of_four = cfg_jax.load(workdirs / 'progressive', step=4)
    assert of_four.config.sample.num_steps == 4 and cfg_jax.load(workdirs / 'progressive').step == 8
    with pytest.raises(UserError, match=r'num_steps is 2, but the model of step 4 is a student of 4; load .* step=8'):
        of_four.sample(num_steps=2)
    teaching = STUDENT | ROUNDS | {'distill__teacher': str(workdirs / 'progressive')}
    teacher = trained.load_teacher(tiny.config(**teaching | {'distill__rounds': ((2, 4), (1, 4))}))
    assert teacher.step == 4
    with pytest.raises(UserError, match=r'takes, twice .* is 8; there are students of 4, 2 steps'):
        trained.load_teacher(tiny.config(**teaching))


def test_a_student_is_not_asked_for_the_null_label(workdirs, monkeypatch):
    """As a weak model it is asked with the labels alone; a teacher without the label cannot be guided."""
    weak = {'guidance__weak': 'checkpoint', 'guidance__weak_workdir': str(workdirs / 'guided')}
    with pytest.raises(UserError, match='has not learned a null label'):
        trained.load_weak(tiny.config(**V, **weak, guidance__weak_conditional=False), workdirs / 'teacher')
    trained.load_weak(tiny.config(**V, **weak), workdirs / 'teacher')
    monkeypatch.setattr(trained, 'saved_config', lambda workdir: tiny.config(**V, loss__p_uncond=0.0))
    with pytest.raises(UserError, match='has not learned the null label'):
        trained.load_teacher(tiny.config(**STUDENT, distill__teacher=str(workdirs / 'teacher')))


@pytest.mark.parametrize(
    ('name', 'changes', 'rows', 'columns'),
    [
        ('teacher', {}, {'all', '0', '9'}, {-20, -8, -6, -4, -3}),
        ('guided', STUDENT, {'0', '9'}, {-20, -8, -6, -4, -3}),
        ('progressive', STUDENT | ROUNDS, {'0', '9'}, {-20}),
    ],
)
def test_mean_images_are_of_what_a_student_has_learned(workdirs, tmp_path, monkeypatch, name, changes, rows, columns):
    """Not of the null label, nor of other λ than its own steps'."""
    monkeypatch.setattr(means, '_ROWS', 2)
    monkeypatch.setattr(means, '_NOISES', 2)
    monkeypatch.setattr(means.style, 'save', lambda *_: None)
    config = tiny.config(**V | changes)
    means.write_means(trained.load(config, workdirs / name), build.source(config), tmp_path)
    found = list(csv.DictReader((tmp_path / 'means.csv').open()))
    assert {row['class'] for row in found} == rows and {round(float(row['logsnr'])) for row in found} == columns
    assert len(found) == len(rows) * len(columns)


def test_a_network_of_small_weights_is_timed_within_them(workdirs, tmp_path):
    """The unit that is drawn first, so that compiling is not counted, has the curve's own weight."""
    model = trained.load(tiny.config(**STUDENT), workdirs / 'guided')
    few = dataclasses.replace(model, config=changed(model.config, {'model.guidance_max': 0.5}))
    ((point, images),) = evaluate.open_drawing(few, tmp_path, 10)([curves.Point(0.4, 0.0, 'w=0.4')])
    assert point.name == 'w=0.4' and len(images) == 10


def test_has_the_network_learned_to_be_asked_without_a_label():
    for changes, wanted in (
        (V, True),
        ({'loss__p_uncond': 0.0}, False),
        ({'loss__p_uncond': 0.0, 'model__labels': 'classes'}, False),
        ({'loss__p_uncond': 0.0, 'model__labels': 'none'}, True),
        (STUDENT, False),
        (STUDENT | ROUNDS, False),
    ):
        assert build_sampling.has_unconditional(tiny.config(**changes)) == wanted


def test_students_are_not_imported(tmp_path):
    with pytest.raises(UserError, match=r"config.distill.method is 'guided'; it must be '' to read"):
        convert.run(tiny.config(**STUDENT, convert__path=str(tmp_path / 'file.safetensors')), tmp_path)


def test_weights_are_checked_where_a_program_gives_them(workdirs):
    model = trained.load(tiny.config(**STUDENT), workdirs / 'guided')
    with pytest.raises(UserError, match='trained for weights from 0 to 4'):
        next(trained.image_batches(model.config)(model.params, np.arange(10), 4.5, 0))


def test_the_loss_of_a_network_without_w_is_the_same_with_it():
    """A mean square is that of squared_error."""
    error = jax.random.normal(KEY, (8, 3))
    logsnr = jnp.linspace(-5.0, 5.0, 8)
    found = losses.mean_square(error, logsnr, prediction='x', target='eps')
    np.testing.assert_allclose(found, np.square(error).mean(1) * np.exp(logsnr), rtol=1e-5)
