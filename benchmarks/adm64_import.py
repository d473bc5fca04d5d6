"""Import and sample OpenAI's ImageNet 64x64 model at full size, with random weights under its names and in its layout.

    PYTHONPATH=. python benchmarks/adm64_import.py [--config=configs/adm64.py] [--steps=4] [--images=2]

Writes a .pt file of 296M random numbers, runs the two commands that a user would, and prints the seconds and the peak
memory of each. Needs 8 GB of disk and the test extra (it uses the tests' writer of .pt files).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from cfg_jax import build, convert
from tests import tiny
from tests.convert_test import tensor, torch_zip


def random_checkpoint(config, path):
    """Write float32 N(0, 0.02²) for every tensor of the config's network; return the number of parameters."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 0.02 * random.standard_normal(leaf.shape, dtype=np.float32), shapes)
    order, size = config.convert.new_attention_order, config.data.image_size
    state_dict = convert.openai_state_dict(params, build.network(config), size, new_attention_order=order)
    tensors, storages = {}, {}
    for key, (name, array) in enumerate(state_dict.items()):
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        tensors[name] = tensor(str(key), array.size, array.shape, strides)
        storages[str(key)] = array.tobytes()
    path.write_bytes(torch_zip(tensors, storages))
    return sum(array.size for array in state_dict.values())


def timed(command):
    start = time.perf_counter()
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f'-> {time.perf_counter() - start:.0f} s, peak memory so far {peak:.1f} GiB\n', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/adm64.py')
    parser.add_argument('--steps', type=int, default=4)
    parser.add_argument('--images', type=int, default=2)
    options = parser.parse_args()
    config = tiny.load_config(Path(options.config).stem)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'random.pt'
        count = random_checkpoint(config, path)
        print(f'{path}: {count:,} parameters, {path.stat().st_size / 2**30:.2f} GiB', flush=True)
        job = [sys.executable, '-m', 'cfg_jax.main', f'--config={options.config}', f'--workdir={folder}/run']
        timed([*job, '--mode=convert', f'--config.convert.path={path}'])
        sizes = [f'--config.sample.{key}={options.images}' for key in ('num_images', 'batch_size')]
        timed([*job, '--mode=sample', f'--config.sample.num_steps={options.steps}', *sizes])


if __name__ == '__main__':
    main()
