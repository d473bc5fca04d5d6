"""What the README and the pages of docs/ say is there: commands, fields, files, Python."""

import ast
import re
import shlex
import subprocess
import sys

import pytest

import cfg_jax
from cfg_jax.checks import check_config
from cfg_jax.config import default
from tests import tiny
from tests.command_line_test import parsed  # noqa: F401
from tests.tiny import ROOT

README = (ROOT / 'README.md').read_text()
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
PROGRAM = 'python -m cfg_jax.main '
# What a reader fills in, and a value that is allowed there.
FILLED_IN = {'N': '3', 'FILE': 'digits.py', 'OUT': 'out', 'DIR': 'images', 'FOLDER': 'folder'}


def commands(text):
    """Return the commands in the blocks of shell and in `inline code`, each as one line without comments."""
    blocks = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
    lines += re.findall(r'`(python [^`]+)`', text)
    lines = (re.sub(r'(^|\s)#\s.*', '', line) for line in lines)
    return [part.strip() for line in lines for part in line.split('&&') if part.strip()]


ALL = [(path.relative_to(ROOT), command) for path in PAGES for command in commands(path.read_text())]


def filled_in(word):
    name, _, value = word.partition('=')
    folder, _, file = value.rpartition('/')
    return f'{name}={folder + "/" if folder else ""}{FILLED_IN.get(file, file)}' if value else word


def test_the_readme_is_short():
    assert len(README.split()) <= 1050  # with the bars of its tables


def test_ci_runs_the_readmes_command():
    (command,) = re.findall(r"^(pip install -e '\.\[test\]' && pytest)$", README, re.MULTILINE)
    pattern = re.search(r'grep -m 1 -E "(.+)" README\.md', (ROOT / '.ci' / 'run').read_text())[1]
    found = subprocess.run(['grep', '-m', '1', '-E', pattern, 'README.md'], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == command


def test_commands_were_found():
    assert len(ALL) > 40 and {path.name for path, _ in ALL} > {'README.md', 'data.md', 'machines.md', 'CONTRIBUTING.md'}


@pytest.mark.parametrize(
    ('path', 'command'), [pair for pair in ALL if pair[1].startswith(PROGRAM)], ids=lambda value: str(value)[-60:]
)
def test_the_programs_commands_parse(parsed, monkeypatch, tmp_path, path, command):  # noqa: F811
    """Flags, modes, configs and fields exist, and the values are allowed together."""
    monkeypatch.chdir(ROOT)
    for module in re.findall(r'--config.guidance.function=(\w+):', command):  # the page has it, as its Python
        blocks = re.findall(r'```python\n(.*?)```', (ROOT / path).read_text(), re.DOTALL)
        (tmp_path / f'{module}.py').write_text('\n'.join(blocks))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
    words = [filled_in(word) for word in shlex.split(command.removeprefix(PROGRAM))]
    if not any(word.startswith('--config=') for word in words):  # a trained workdir knows its config
        words.insert(0, '--config=configs/digits.py')
    check_config(parsed(*words).config)


@pytest.mark.parametrize(
    ('path', 'command'), [pair for pair in ALL if not pair[1].startswith(PROGRAM)], ids=lambda value: str(value)[-60:]
)
def test_other_commands_name_what_is_there(path, command):
    words = [word for word in shlex.split(command) if '=' not in word or word.startswith('-')]
    scripts = [word for word in words if word.startswith(('launch/', 'benchmarks/', 'tests/', 'configs/', '.ci/'))]
    for script in scripts:
        assert (ROOT / script).exists(), script
    if scripts and scripts[0].startswith('launch/') and not scripts[0].endswith('.yaml'):
        known = (ROOT / scripts[0]).read_text()
        for word in words[words.index(scripts[0]) + 1 :]:
            flag = word.split('=')[0]
            if flag.startswith('--') and flag not in ('--config', '--workdir') and not flag.startswith('--config.'):
                assert f'  {flag}' in known, f'{scripts[0]} has no {flag}'
    for extra in re.findall(r'\.\[(\w+)\]', command):
        assert re.search(rf'^{extra} = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE), extra


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_fields_exist(path):
    text = path.read_text()
    links = re.findall(r'\]\((?!\w+:|#)([^)#]+)[^)]*\)', text)
    for link in links:
        assert (path.parent / link).exists(), link
    for config in re.findall(r'--config=(configs/\S+?\.py)', text):
        assert (ROOT / config).exists(), config
    fields = default().to_dict()
    for section, key in re.findall(r'\bconfig\.(\w+)\.(\w+)', text):
        if section in fields and key != 'key':
            assert key in fields[section], f'config.{section}.{key}'
    for file in re.findall(r'`((?:configs|launch|benchmarks|tests|notebooks|cfg_jax)/[\w./]+\.\w+)`', text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_is_python(path):
    for block in re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.slow  # api_test makes the same calls
def test_the_python_of_the_readme_and_of_its_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg_jax.train('digits', 'runs/digits', tiny.OVERRIDES)
    names = {}
    for page, count in [('README.md', 1), ('docs/python.md', 2)]:  # training for real takes longer: the third block
        for block in re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)[:count]:
            exec(block, names)
            assert names['images'].shape == (16, 8, 8, 1)
    assert (tmp_path / 'digits.png').exists()


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(path):
    assert not re.findall(r'TODO(?!: opensource)|BENCH|TESTMIN|FIXME', path.read_text())
