"""The notebooks: stripped in git, alike in their first cell, and executed from top to bottom in small sizes."""

import ast
import os
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

from tests import tiny

PATHS = sorted((tiny.ROOT / 'notebooks').glob('*.ipynb'))
NAMES = [path.stem for path in PATHS]
each_notebook = pytest.mark.parametrize('path', PATHS, ids=NAMES)

_NETWORK = {
    'model.channels': 8,
    'model.channel_mult': (1,),
    'model.attention_resolutions': (),
    'model.num_groups': 4,
    'train.log_every': 2,
    'train.grid_every': 0,
    'sample.num_steps': 3,
    'sample.batch_size': 10,  # one program for every number of images
}
_DIGITS = {**_NETWORK, 'model.num_heads': 1, 'train.num_steps': 6}
_EVALUATION = {
    'eval.num_samples': 40,
    'eval.allow_few_samples': True,
    'eval.judge_steps': 200,
}
SMALL = {  # of each notebook: values of the names in its cell of parameters
    'quickstart': {
        'TRAINING': _DIGITS,
        'WEIGHTS': (0.0, 1.0),
        'EVALUATION': {**_EVALUATION, 'eval.guidance_weights': (0.0, 1.0)},
    },
    'compare_guidance': {
        'TRAINING': _DIGITS,
        'CLASSIFIER_TRAINING': _DIGITS,
        'WEIGHTS': (0.0, 1.0),
        'CLASSIFIER_WEIGHTS': (0.0, 1.0),
        'EVALUATION': _EVALUATION,
    },
    'own_images': {
        'IMAGES_PER_CLASS': 12,
        'CONFIG': {
            **_NETWORK,
            'data.image_size': 8,
            'model.num_blocks': 1,
            'model.head_channels': 8,
            'model.dtype': 'float32',
            'train.batch_size': 8,
            'train.num_steps': 4,
            'inspect.seconds': 0.1,
            'eval.judge': 'trained',
        },
        'WEIGHTS': (0.0, 1.0),
        'EVALUATION': {**_EVALUATION, 'eval.guidance_weights': (0.0, 1.0)},
        'NUM_SHOWN': 4,
    },
    'guidance_2d': {'WEIGHTS': (0.0, 1.0, 4.0), 'NUM_SAMPLES': 200, 'NUM_STEPS': 8, 'TRAIN_STEPS': 20},
    'openai_adm': {'CLASSES': {207: 'golden retriever'}, 'IMAGES_PER_CLASS': 2, 'CLASSIFIER_WEIGHTS': (0.0, 1.0)},
}
FAST = ('quickstart',)


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag):
    """Return the index of the one cell with this tag."""
    (index,) = [number for number, cell in enumerate(notebook.cells) if tag in cell.metadata.get('tags', [])]
    return index


def install_cell():
    notebook = read(PATHS[0])
    return notebook.cells[tagged(notebook, 'install')].source


# ---------------------------------------------------------------- the files


@each_notebook
def test_outputs_are_stripped(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and set(notebook.metadata) <= {'kernelspec', 'language_info', 'colab', 'accelerator'}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {'tags'}
        if cell.cell_type == 'code':
            assert cell.outputs == [] and cell.execution_count is None


@each_notebook
def test_the_first_code_cell_installs_and_is_the_same_everywhere(path):
    notebook = read(path)
    code = [number for number, cell in enumerate(notebook.cells) if cell.cell_type == 'code']
    assert code[:2] == [tagged(notebook, 'install'), tagged(notebook, 'parameters')]
    assert notebook.cells[code[0]].source == install_cell()
    assert install_cell().startswith("REPOSITORY = ''")


@each_notebook
def test_files_that_the_text_names_exist(path):
    text = '\n'.join(cell.source for cell in read(path).cells if cell.cell_type == 'markdown')
    for name in re.findall(r'`(\w+\.ipynb|(?:configs|cfg_jax)/[\w/]+\.py)`', text):
        assert (path.parent / name).exists() or (tiny.ROOT / name).exists(), name


@pytest.mark.parametrize('name', SMALL)
def test_small_values_are_those_of_the_cell_of_parameters(name):
    notebook = read(tiny.ROOT / 'notebooks' / f'{name}.ipynb')
    tree = ast.parse(notebook.cells[tagged(notebook, 'parameters')].source)
    assigned = {target.id for node in tree.body for target in node.targets}
    assert assigned >= SMALL[name].keys()


# ---------------------------------------------------------------- the cell that installs


def without_packages(source, folder):
    """Run code where nothing but Python's own modules can be imported."""
    command = [sys.executable, '-I', '-S', '-c', source]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_without_an_address_one_line_says_what_to_set(tmp_path):
    quoted = repr(install_cell())
    caught = f'\ntry:\n    exec({quoted})\nexcept Exception as error:\n    print(*error._render_traceback_(), sep="|")'
    done = without_packages(caught, tmp_path)
    line = 'cfg_jax is not installed: set REPOSITORY, in the first line of this cell, and run it again.'
    assert done.stdout.splitlines() == [line]
    assert list(tmp_path.iterdir()) == []


def test_in_a_checkout_nothing_is_installed():
    source = f'{install_cell()}\nimport cfg_jax\nprint(cfg_jax.__file__)'
    done = without_packages(source, tiny.ROOT / 'notebooks')
    assert done.stdout.strip() == str(tiny.ROOT / 'cfg_jax' / '__init__.py'), done.stderr
    assert not (tiny.ROOT / 'notebooks' / 'cfg_jax_source').exists()


def script(path, text):
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """Pretend that cfg_jax is not installed; git and Python are scripts that note their arguments."""
    (tmp_path / 'bin').mkdir()
    noted = f'echo "$(basename $0)" "$@" >> {tmp_path}/commands'
    script(tmp_path / 'bin' / 'git', f'{noted}\nmkdir -p "$4/cfg_jax"')
    python = script(tmp_path / 'bin' / 'python', f'{noted}\necho "Requirement already satisfied: x"; echo collecting')
    monkeypatch.setenv('PATH', f'{tmp_path}/bin', prepend=os.pathsep)
    monkeypatch.setattr(sys, 'executable', python)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path


def test_a_working_jax_stays(bare_machine, monkeypatch, capsys):
    monkeypatch.setattr('importlib.metadata.version', {'jax': '0.9.1', 'numpy': '2.3.0'}.__getitem__)
    monkeypatch.setattr('importlib.metadata.PackageNotFoundError', KeyError)
    exec(install_cell().replace("REPOSITORY = ''", "REPOSITORY = 'https://host/cfg_jax'"), {})
    clone, pins = bare_machine / 'here' / 'cfg_jax_source', bare_machine / 'here' / 'cfg_jax_constraints.txt'
    assert (bare_machine / 'commands').read_text().splitlines() == [
        f'git clone --depth=1 https://host/cfg_jax {clone}',
        f'python -m pip install --constraint cfg_jax_constraints.txt {clone}',
    ]
    assert pins.read_text() == 'jax==0.9.1\nnumpy==2.3.0\n'  # jaxlib is not there, so none is pinned
    assert sys.path[0] == str(clone)
    assert capsys.readouterr().out == 'collecting\n'


def test_a_failed_installation_stops(bare_machine):
    script(bare_machine / 'bin' / 'python', 'exit 3')
    with pytest.raises(Exception, match='failed with status 3'):
        exec(install_cell().replace("REPOSITORY = ''", "REPOSITORY = 'x'"), {})
    assert str(bare_machine / 'here' / 'cfg_jax_source') not in sys.path


# ---------------------------------------------------------------- from top to bottom


def execute(name, folder, *, before=''):
    """Execute a notebook in small sizes in `folder`; return its outputs. before: code to run first."""
    notebook = read(tiny.ROOT / 'notebooks' / f'{name}.ipynb')
    small = '\n'.join(f'{key} = {value!r}' for key, value in SMALL.get(name, {}).items())
    notebook.cells.insert(tagged(notebook, 'parameters') + 1, nbformat.v4.new_code_cell(small))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    client = nbclient.NotebookClient(notebook, timeout=900, resources={'metadata': {'path': str(folder)}})
    client.execute(env={**tiny.environment(), 'PYTHONPATH': str(tiny.ROOT)})
    return [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]


def count(outputs, kind):
    return sum(kind in output.get('data', {}) for output in outputs)


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_it_runs(name, tmp_path):
    outputs = execute(name, tmp_path)
    assert count(outputs, 'image/png') > 0
    assert not any(output.output_type == 'error' for output in outputs)


@pytest.mark.slow
def test_the_quickstart_needs_no_widgets(tmp_path):
    outputs = execute('quickstart', tmp_path, before='import sys; sys.modules["ipywidgets"] = None')
    assert count(outputs, 'application/vnd.jupyter.widget-view+json') == 0
    assert count(outputs, 'image/png') == 5
