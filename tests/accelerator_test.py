"""`benchmarks/accelerator.py` runs with little installed, keeps to its time and writes what it has."""

import json
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests import tiny

PROGRAM = tiny.ROOT / 'benchmarks' / 'accelerator.py'
PARTS = runpy.run_path(str(tiny.ROOT / 'benchmarks' / 'accelerator_parts.py'))
ABSENT = (
    *('tensorflow', 'tensorflow_datasets', 'clu', 'grain', 'array_record', 'ml_collections', 'google_crc32c'),
    *('sklearn', 'matplotlib', 'tensorboardX', 'jaxtyping', 'beartype'),
)
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {ABSENT}:
            raise ModuleNotFoundError(f'No module named {{name!r}}, which a bare machine lacks', name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(folder, *arguments):
    """Run the program where only what a bare machine has can be imported; return (its output, the JSON, the page)."""
    (folder / 'sitecustomize.py').write_text(BLOCKER)
    environment = {**tiny.environment(), 'PYTHONPATH': str(folder)}
    command = [sys.executable, PROGRAM, f'--out={folder / "out"}', '--tiny', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    pages = [(folder / 'out' / f'accelerator.{kind}').read_text() for kind in ('json', 'md')]
    return done.stdout, json.loads(pages[0]), pages[1]


def test_it_measures_every_part(tmp_path):
    output, found, page = run(tmp_path)
    rows = {row['part']: row for row in found['rows'] if 'note' not in row}
    assert set(rows) == {'rate', 'train 4', 'sample w=1', 'sample w=0', 'attention', 'norm'}
    assert all('--guided_diffusion' in row['note'] for row in found['rows'] if row['part'].startswith('peer'))
    assert found['machine']['platform'] == 'cpu' and found['machine']['versions']['jax'] == jax.__version__
    step, guided, plain = (rows[name] for name in ('train 4', 'sample w=1', 'sample w=0'))
    assert 0 < step['loss'] < 10 and step['compile_seconds'] > 0 and step['temporary_bytes'] > 0
    assert 1.8 < guided['flops'] / plain['flops'] <= 2
    assert plain['images_per_second'] == pytest.approx(4 / (plain['seconds'] * 256 / 2))
    assert {row['variant'] for row in found['rows'] if row['part'] == 'norm'} >= {'cfg_jax', 'flax'}
    for line in ('starting JAX', 'compiling the training step, batch 4', 'timing the training step', 's left'):
        assert line in output
    for title in ('Matrix products', 'Training', 'Sampling, scaled to 256', 'Attention', 'Group norm', 'Not measured'):
        assert f'\n## {title}' in page
    assert '14% of an A100' in page and '45% of the matrix rate' in page and '1.3 times' in page
    assert page.count('%') == 5  # the anchors and the shares of the three programs


def test_no_time_is_no_failure(tmp_path):
    _, found, page = run(tmp_path, '--minutes=0', '--only=rate,train')
    assert [row['part'] for row in found['rows']] == ['rate', 'train 4']
    assert all(row['note'].startswith(('skipped', 'cut off')) for row in found['rows'])
    assert '- train 4: ' in page and '## Training' not in page


def test_its_settings_are_those_of_the_config():
    config = tiny.load_config('imagenet64')
    for section, values in PARTS['adm64']().items():
        for name, value in values.items():
            assert config[section][name] == value, f'{section}.{name}'


def test_flops_are_counted_from_shapes():
    def program(x, kernel, matrix):
        def body(h, _):
            return h @ matrix, None

        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        return jax.lax.scan(jax.checkpoint(body), h, None, length=3)[0]

    arguments = jnp.ones((2, 5, 4, 3)), jnp.ones((3, 3, 3, 8)), jnp.ones((8, 8))
    taps = (3 * 5 - 2) * (3 * 4 - 2)  # three for each pixel, but two for the first and the last
    assert PARTS['product_flops'](jax.make_jaxpr(program)(*arguments).jaxpr) == 2 * 2 * (taps * 3 * 8 + 3 * 20 * 8 * 8)
    convolution = jax.jit(lambda x, kernel: program(x, kernel, jnp.eye(8))).trace(*arguments[:2])
    loss = jax.jit(jax.grad(lambda x, kernel: program(x, kernel, arguments[2]).sum(), 1)).trace(*arguments[:2])
    assert PARTS['product_flops'](loss.jaxpr.jaxpr) > PARTS['product_flops'](convolution.jaxpr.jaxpr)


@pytest.mark.parametrize('text', ['RESOURCE_EXHAUSTED: no room', 'CUDA error: out of memory'])
def test_what_does_not_fit_is_one_line(text):
    assert PARTS['reason'](RuntimeError(text)) == 'out of memory'
    assert PARTS['reason'](ValueError('wrong\nvery')) == 'ValueError: wrong'
