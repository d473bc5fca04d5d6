"""The files around the code agree with it and with each other."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml

import cfg_jax
from tests.tiny import ROOT

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
EXTRAS = PYPROJECT['project']['optional-dependencies']
REQUIREMENTS = PYPROJECT['project']['dependencies'] + EXTRAS['test'] + EXTRAS['docs']
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()


def test_the_version_is_known_without_an_installation():
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import cfg_jax; print(cfg_jax.__version__, *sys.modules)'
    done = subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True, check=True)
    version, *modules = done.stdout.split()
    assert version == cfg_jax.__version__ and 'cfg_jax' in modules and 'jax' not in modules


def test_the_version_stands_once():
    assert PYPROJECT['project']['dynamic'] == ['version']
    assert PYPROJECT['tool']['setuptools']['dynamic']['version'] == {'attr': 'cfg_jax.__version__'}
    try:
        installed = metadata.version('cfg_jax')
    except metadata.PackageNotFoundError:
        pytest.skip('cfg_jax is not installed')
    assert installed == cfg_jax.__version__


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors', 'license', 'references'} <= citation.keys()
    assert citation['title'] == 'cfg_jax' and str(citation['version']) == cfg_jax.__version__
    papers = {reference['url'] for reference in citation['references']}
    assert papers == {'https://arxiv.org/abs/2207.12598', 'https://arxiv.org/abs/2105.05233'}


def test_the_changelog_begins_with_this_version():
    assert re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[1] == cfg_jax.__version__


def test_the_workflow_runs_ci_on_both_pythons():
    (job,) = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())['jobs'].values()
    (setup,) = [step['with'] for step in job['steps'] if 'setup-python' in step.get('uses', '')]
    assert setup['python-version'].split() == ['3.11', '3.13']
    assert all((ROOT / 'constraints' / f'py{version}.txt').exists() for version in ('311', '313'))
    assert job['steps'][-1] == {'run': '.ci/run'} and (ROOT / '.ci' / 'run').stat().st_mode & 0o100


def pinned(path):
    """Return {package: version} of a constraints file."""
    lines = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    return dict(line.lower().replace('_', '-').split('==') for line in lines if line)


def test_every_ruff_is_the_same():
    (hooks,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    version = hooks['rev'].removeprefix('v')
    assert [hook['id'] for hook in hooks['hooks']] == ['ruff-check', 'ruff-format']
    assert f'ruff=={version}' in REQUIREMENTS
    assert {pinned(path)['ruff'] for path in (ROOT / 'constraints').glob('*.txt')} == {version}


def test_the_lowest_versions_are_the_lower_bounds():
    bounds = [re.match(r'([\w.-]+)(?:\[\w+\])?(?:>=|==)([\d.]+)', requirement) for requirement in REQUIREMENTS]
    lowest = {match[1].lower().replace('_', '-'): match[2] for match in bounds if match}
    assert pinned(ROOT / 'constraints' / 'lowest.txt') == lowest


def test_the_fast_tests_exist():
    paths = (ROOT / 'tests' / 'fast.txt').read_text().splitlines()
    assert len(paths) > 10 and paths == sorted(set(paths))
    assert all((ROOT / path).is_file() for path in paths)


def test_the_files_that_contributing_names_exist():
    for path in re.findall(r'`([\w./-]*(?:/|\.(?:py|txt|md|toml|yaml)))`', CONTRIBUTING):
        if 'NAME' not in path and path != '__init__.py':
            assert (ROOT / path).exists() or (ROOT / 'cfg_jax' / path).exists(), path


def test_the_names_that_contributing_gives_are_in_their_files():
    """A step says `file`: what to do there, with `names` that the file has."""
    sections = CONTRIBUTING.split('\n## Add a ')[1:]
    assert len(sections) == 4
    for section in sections:
        steps = re.findall(r'^\d\. (.*(?:\n   .*)*)', section, re.MULTILINE)
        assert 1 < len(steps) <= 5
        for path, text in re.findall(r'`([\w./]+)`: ((?:(?!`[\w./]+`: ).|\n)*)', '\n'.join(steps)):
            files = [ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob('*.py')
            content = '\n'.join(file.read_text() for file in files)
            for name in re.findall(r'`([A-Za-z_][\w.]*)[^/`]*`', text):
                assert name.lower().startswith('name') or name in content, f'{path}: {name}'
