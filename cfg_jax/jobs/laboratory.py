"""The job of --mode=laboratory: guidance on mixtures of Gaussians, where every answer is known exactly."""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import build, diffusion, files, losses, mixtures, schedules
from cfg_jax.checks import check_config
from cfg_jax.errors import printable
from cfg_jax.evaluation import experiments, forms, laboratory, results, style
from cfg_jax.models.mlp import MLP
from cfg_jax.progress import shown
from cfg_jax.training.fit import fit

_COLUMNS = ('figure', 'quantity', 'method', 'weight', 'strength', 'steps', 'logsnr', 'value', 'error')
_CLOUD, _PATHS = 600, 40  # samples of each class in figure 2, trajectories of each weight
_FIELD_LOGSNRS = (-3.0, 0.0, 3.0)
_RADII, _STD = (0.35, 0.95, 1.55), 0.22  # the baselines' classes: three Gaussians each, the innermost ambiguous


def run(config, workdir):
    """Measure and draw everything of config.laboratory. Return the rows.

    Writes figures as .png and .svg, laboratory.csv (every number, a row each) and laboratory.json (the same with the
    settings) into `workdir`.
    """
    check_config(config)
    workdir, start = Path(workdir), time.monotonic()
    bench = make_bench(config)
    rows = []

    def write(name, picture, found=()):
        style.save(workdir / name, picture)
        rows.extend({'figure': name, **row} for row in found)
        print(f'{time.monotonic() - start:4.0f}s  {name}.png and .svg', flush=True)

    with shown('drawing'):
        write('densities', *draw_densities(bench, config.laboratory.weights))
        write('fields', draw_fields(bench, config.laboratory.weights))
        found, target, difference = draw_target(bench, config.laboratory.weights, config.laboratory.target_samples)
        write('target', target), write('difference', difference, found)
        found, picture = draw_forms(bench, config.laboratory.weights, config.laboratory.target_samples)
        write('forms', picture, found)
        found, picture = draw_solvers(bench)
        write('solvers', picture, found)
        found, picture = draw_baselines(bench)
        write('baselines', picture, found)
    networks = train_networks(config, bench.mixture)
    with shown('drawing'):
        found, picture = draw_sides(bench, networks)
        write('either_side', picture, found)
        found, picture = draw_antisymmetry(bench, networks, config.laboratory.weights)
        write('antisymmetry', picture, found)

    settings = {name: config[name].to_dict() for name in ('laboratory', 'diffusion')}
    files.write_json(workdir / 'laboratory.json', {**settings, 'seed': config.seed, 'rows': rows})
    files.write(workdir / 'laboratory.csv', results.as_csv(rows, _COLUMNS).encode())
    print(f'wrote 9 figures, laboratory.csv and laboratory.json in {printable(str(workdir))}', flush=True)
    return rows


def make_bench(config):
    """Return the `experiments.Bench` of a config: its mixture, its grid of λ, its number of samples."""
    mixture = mixtures.star(config.data.num_classes, radii=(config.laboratory.radius,), std=config.laboratory.std)
    logsnrs = np.asarray(schedules.logsnr_grid(build.schedule(config), config.sample.num_steps))
    return experiments.Bench(mixture, logsnrs, config.laboratory.num_samples, config.seed)


def train_networks(config, mixture):
    """Train a denoiser with a null label and a classifier on the mixture; return `experiments.Networks`."""
    lab, schedule = config.laboratory, build.schedule(config)
    denoiser = MLP(mixture.dimensions, mixture.num_classes + 1, lab.width)
    classifier = MLP(mixture.num_classes, width=lab.width)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    z, labels = jnp.zeros((1, mixture.dimensions)), jnp.zeros(1, jnp.int32)

    def batch(key):
        data_key, loss_key = jax.random.split(key)
        return *mixture.sample_with_labels(data_key, lab.batch_size), loss_key

    def denoising_loss(params, key):
        network, options = functools.partial(denoiser.apply, params), {'null_label': mixture.null_label}
        options['p_uncond'] = config.loss.p_uncond
        return losses.diffusion_loss(network, *batch(key), schedule=schedule, **options).loss.mean()

    def classifying_loss(params, key):
        network = functools.partial(classifier.apply, params)
        return losses.classifier_loss(network, *batch(key), schedule=schedule).loss.mean()

    options = {'num_steps': lab.train_steps, 'learning_rate': config.optim.learning_rate}
    params = denoiser.init(keys[0], z, jnp.zeros(1), labels)
    params, _ = fit(denoising_loss, params, **options, key=keys[1], name='training the denoiser')
    weights = classifier.init(keys[2], z, jnp.zeros(1))
    weights, _ = fit(classifying_loss, weights, **options, key=keys[3], name='training the classifier')

    def model(z, logsnr, labels):
        return diffusion.Prediction(denoiser.apply(params, z, logsnr, labels))

    def log_prob(z, logsnr, labels):
        return losses.label_log_prob(classifier.apply(weights, z, logsnr), labels)

    return experiments.Networks(model, log_prob)


def draw_densities(bench, weights):
    """Return (the picture of the paper's figure 2,)."""
    grid, classes = experiments.Grid.around(bench.mixture), range(bench.mixture.num_classes)
    weights = _some(weights)
    densities = [experiments.target_densities(bench, grid, weights, label) for label in classes]
    clouds = [experiments.draw_guided(bench, bench.mixture.model, weights, n=_CLOUD, label=label) for label in classes]
    return (laboratory.densities_and_clouds(grid, np.stack(densities, 1), np.stack(clouds, 1), weights),)


def draw_fields(bench, weights):
    """Return the picture of guided scores at three λ, and of DDIM's trajectories."""
    grid, weight = experiments.Grid.around(bench.mixture), weights[-1]
    densities = np.stack([experiments.noisy_density(bench, grid, logsnr) for logsnr in _FIELD_LOGSNRS])
    line = np.linspace(-2.8, 2.8, 13)
    points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    model = bench.mixture.model
    fields = [experiments.score_field(bench, model, points, logsnr, weight) for logsnr in _FIELD_LOGSNRS]
    z = jax.random.normal(jax.random.key(bench.seed + 6), (_PATHS, 2))
    paths = {w: experiments.paths(bench, model, w, z) for w in _some(weights, 3)}
    return laboratory.fields_and_paths(grid, _FIELD_LOGSNRS, densities, points, np.stack(fields), paths, weight=weight)


def draw_target(bench, weights, target_samples):
    """Return (rows, the picture of target and yield, the picture of their difference in numbers)."""
    grid = experiments.Grid.around(bench.mixture)
    rows, drawn = experiments.target_and_yield(bench, weights, target_samples=target_samples)
    some = [list(weights).index(weight) for weight in _some(weights)]
    densities = experiments.target_densities(bench, grid, [weights[index] for index in some])
    few = {name: x[some] for name, x in drawn.items()}
    picture = laboratory.target_and_yield(grid, densities, few, _some(weights))
    return rows, picture, laboratory.difference(rows)


def draw_forms(bench, weights, target_samples):
    """Return (rows, picture) of every form of guidance against the target, at a middle and at the greatest weight."""
    guided = [weight for weight in weights if weight > 0.0] or list(weights)
    chosen = list(dict.fromkeys((guided[(len(guided) - 1) // 2], guided[-1])))
    rows, drawn = forms.compare(bench, chosen, target_samples=target_samples)
    grid = experiments.Grid.around(bench.mixture)
    (density,) = experiments.target_densities(bench, grid, chosen[-1:])
    return rows, laboratory.forms(grid, density, rows, drawn)


def draw_solvers(bench):
    """Return (rows, picture) of the deterministic solvers' errors over their steps."""
    rows = experiments.solvers(bench)
    return rows, laboratory.solvers(rows)


def draw_baselines(bench):
    """Return (rows, picture) of guidance against scaled scores and less noise, on classes with an ambiguous part."""
    mixture = mixtures.star(bench.mixture.num_classes, radii=_RADII, std=_STD)
    bench = experiments.Bench(mixture, bench.logsnrs, bench.num_samples // 2, bench.seed)
    rows, drawn = experiments.baselines(bench)
    grid = experiments.Grid.around(mixture)
    density = experiments.noisy_density(bench, grid, np.inf, mixture.null_label)
    return rows, laboratory.baselines(grid, density, rows, drawn, experiments.BASELINES)


def draw_sides(bench, networks, *, weight=1.0):
    """Return (rows, picture) of classifier guidance from the conditional and from the unconditional model."""
    exact = experiments.Networks(bench.mixture.model, bench.mixture.log_prob)
    models = {'exact model and classifier': exact, 'trained networks': networks}
    rows = experiments.from_either_side(bench, models, np.linspace(-8.0, 8.0, 9), weight)
    n = _CLOUD
    clouds = [
        experiments.draw(bench, side, n)[0] for side in experiments.sides(bench, networks, weight, bench.labels(n))
    ]
    return rows, laboratory.either_side(rows, clouds, weight=weight)


def draw_antisymmetry(bench, networks, weights):
    """Return (rows, picture) of how far guided fields are from gradients."""
    exact = experiments.Networks(bench.mixture.model, bench.mixture.log_prob)
    fields = experiments.guided_fields(bench, exact, networks, _some(weights, 3))
    rows = experiments.antisymmetry(bench, fields, np.linspace(-8.0, 8.0, 9))
    return rows, laboratory.antisymmetry(rows)


def _some(weights, count=4):
    """Return the first and the last `count` - 1 of the weights."""
    weights = tuple(weights)
    return weights if len(weights) <= count else (weights[0], *weights[1 - count :])
