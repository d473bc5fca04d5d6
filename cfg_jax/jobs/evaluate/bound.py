"""The bound on the data's likelihood, in bits per dimension."""

import functools

from cfg_jax import build, build_sampling, files, trained
from cfg_jax.distributed import processes
from cfg_jax.evaluation import likelihood
from cfg_jax.training import sharding


def bound_likelihood(config, workdir, folder):
    """Write bits_per_dim.json: the bound on -log2 p(image | label) over eval.num_samples real images, per dimension."""
    model = trained.load(config, workdir)
    params = sharding.to_local(model.params, sharding.local_mesh())

    def measure():
        bound, source = functools.partial(build_sampling.bits_per_dim(config), params), build.source(config)
        source.order_classes(model.class_names)
        means = likelihood.bits_per_dim(
            bound,
            source,
            num_images=config.eval.num_samples,
            batch_size=config.sample.batch_size,
            seed=config.sample.seed,
        )
        (number, lowest, highest), discrete = build_sampling.bound_range(config), build.table(config) is not None
        ends = {'num_steps': number, 'logsnr_min': lowest, 'logsnr_max': highest}
        result = {**means, **ends, 'discrete': discrete, 'step': model.step}
        path = folder / 'bits_per_dim.json'
        files.write_json(path, result)
        error = '' if result['standard_error'] is None else f' ± {result["standard_error"]:.4f}'
        parts = ', '.join(f'{key} {result[key]:.2g}' for key in likelihood.PARTS[1:])
        print(
            f'bits per dim {result["total"]:.4f}{error} ({parts}; {result["num_images"]:,} images, each at {number} λ '
            f'from {lowest:g} to {highest:g}){likelihood.explanation(result, discrete=discrete)}; wrote {path}',
            flush=True,
        )
        return result

    return processes.first_alone(measure)
