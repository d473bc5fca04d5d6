"""The layer rule: modules import only downwards, and the lower ones need little."""

import ast
import subprocess
import sys

import pytest

from tests.modules import MATHEMATICS
from tests.tiny import ROOT

LAYERS = [
    {'errors', 'files', 'progress', 'runtime', 'typing'},
    set(MATHEMATICS),
    {'models', 'data', 'training', 'sampling', 'evaluation', 'distributed', 'planning', 'convert', 'torch_files'},
    {'config', 'config_files', 'build', 'build_sampling', 'checks', 'trained', 'command_line'},
    {'jobs'},
    {'main', 'api'},
]
# The bases of layers: all of a layer may import it.
BASES = {0: {'errors'}, 1: {'diffusion', 'denoisers'}, 3: {'config', 'build', 'build_sampling'}}
# Imports of a neighbour in the same layer, by name.
ALLOWED_BESIDE = {
    ('convert', 'torch_files'), ('evaluation', 'torch_files'), ('evaluation', 'data'),
    ('training', 'distributed'), ('sampling', 'distributed'),
    ('command_line', 'config_files'), ('distillation', 'losses'),
}  # fmt: skip
MODULES = [
    path
    for path in sorted((ROOT / 'cfg_jax').rglob('*.py'))
    if path.parent.name != 'cfg_jax' or path.stem != '__init__'
]


def layer_of(name):
    (layer,) = [index for index, names in enumerate(LAYERS) if name in names]
    return layer


def imports(path):
    """Every module that the file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: a relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def own_name(path):
    return path.relative_to(ROOT / 'cfg_jax').with_suffix('').parts[0]


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    name = own_name(path)
    for imported in imports(path):
        parts = imported.split('.')
        if parts[0] != 'cfg_jax' or len(parts) < 2 or parts[1] in (name, '__version__'):
            continue
        layer, below = layer_of(name), layer_of(parts[1])
        beside = layer == below and (parts[1] in BASES.get(layer, ()) or (name, parts[1]) in ALLOWED_BESIDE)
        assert below < layer or beside, f'{name} imports {parts[1]}'


def test_exceptions_are_few_and_used():
    assert len(ALLOWED_BESIDE) <= 8
    found = {(own_name(path), imported.split('.')[1]) for path in MODULES for imported in imports(path)
             if imported.startswith('cfg_jax.')}  # fmt: skip
    assert found >= ALLOWED_BESIDE


def test_a_job_never_imports_a_job():
    for path in (ROOT / 'cfg_jax' / 'jobs').glob('*.py'):
        assert not any(imported.startswith('cfg_jax.jobs') for imported in imports(path)), path


def test_only_the_upper_layers_know_configs():
    for path in MODULES:
        if layer_of(own_name(path)) < 3:
            assert not any('ml_collections' in imported for imported in imports(path)), path


def test_the_lower_layers_import_with_little():
    """The mathematics, the parts but data, checkpoints and writers, need jax, flax, optax, numpy, scipy and Pillow."""
    skipped = ('data', 'training/checkpoints', 'training/writers', 'evaluation/scoring')
    names = [
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in MODULES
        if layer_of(own_name(path)) < 3 and not str(path.relative_to(ROOT / 'cfg_jax')).startswith(skipped)
    ]
    # not orbax: flax imports it itself
    heavy = ['tensorflow', 'tensorflow_datasets', 'clu', 'grain', 'ml_collections', 'sklearn', 'matplotlib', 'torch']
    blocked = ''.join(f'sys.modules[{name!r}] = None\n' for name in heavy)
    code = f'import sys\n{blocked}' + ''.join(f'import {name}\n' for name in names)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
