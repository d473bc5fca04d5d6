"""The bound on the data's likelihood, in bits per dimension."""

import functools

import numpy as np

from cfg_jax import build, build_sampling, files, metrics, trained
from cfg_jax.distributed import processes
from cfg_jax.evaluation import likelihood, results
from cfg_jax.training import sharding

_COLUMNS = ('guidance_weight', 'total', 'standard_error', 'above_first', 'above_first_error', *likelihood.PARTS[1:])


def bound_likelihood(config, workdir, folder):
    """Write the bound on -log2 p(image | label) over eval.num_samples real images, per dimension; return the first.

    bits_per_dim.json has that of the first of config.eval.bound_weights; bits_per_dim.csv has a row for each, with the
    difference to the first, whose error counts that the images and their noise are the same.
    """
    model = trained.load(config, workdir)
    params = sharding.to_local(model.params, sharding.local_mesh())

    def measure():
        source = build.source(config)
        source.order_classes(model.class_names)
        settings = {key: config.sample[key] for key in ('batch_size', 'seed')}
        rows, first, num_images = [], None, config.eval.num_samples
        # all of them first: a weight that has no bound is an error before the others take their time
        bounds = {weight: build_sampling.bits_per_dim(config, weight) for weight in config.eval.bound_weights}
        for weight, bound in bounds.items():
            of_images = functools.partial(bound, params)
            means, totals = likelihood.bits_per_dim(of_images, source, num_images=num_images, **settings)
            first = totals if first is None else first
            above = {'above_first': float(np.mean(totals - first))}
            if len(totals) > 1:
                above['above_first_error'] = metrics.standard_error(totals - first)
            rows.append({'guidance_weight': float(weight), **means, **above})
            _print(config, rows[-1])
        (number, lowest, highest), discrete = build_sampling.bound_range(config), build.table(config) is not None
        ends = {'num_steps': number, 'logsnr_min': lowest, 'logsnr_max': highest}
        shown = {key: value for key, value in rows[0].items() if not key.startswith('above_first')}
        result = {**shown, **ends, 'discrete': discrete, 'step': model.step}
        files.write_json(folder / 'bits_per_dim.json', result)
        files.write(folder / 'bits_per_dim.csv', results.as_csv(rows, _COLUMNS).encode())
        print(f'wrote {folder}/bits_per_dim.json and .csv', flush=True)
        return result

    return processes.first_alone(measure)


def _print(config, row):
    """Print the bound at one weight."""
    (number, lowest, highest), discrete = build_sampling.bound_range(config), build.table(config) is not None
    error = '' if row['standard_error'] is None else f' ± {row["standard_error"]:.4f}'
    parts = ', '.join(f'{key} {row[key]:.2g}' for key in likelihood.PARTS[1:])
    print(
        f'bits per dim {row["total"]:.4f}{error} at w = {row["guidance_weight"]:g} ({parts}; {row["num_images"]:,} '
        f'images, each at {number} λ from {lowest:g} to {highest:g}){likelihood.explanation(row, discrete=discrete)}',
        flush=True,
    )
