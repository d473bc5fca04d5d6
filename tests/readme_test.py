"""What the README says is there."""

import re
import subprocess

from tests.tiny import ROOT

README = (ROOT / 'README.md').read_text()


def test_ci_runs_the_readmes_command():
    (command,) = re.findall(r"^(pip install -e '\.\[test\]' && pytest)$", README, re.MULTILINE)
    pattern = re.search(r'grep -m 1 -E "(.+)" README\.md', (ROOT / '.ci' / 'run').read_text())[1]
    found = subprocess.run(['grep', '-m', '1', '-E', pattern, 'README.md'], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == command


def test_files_and_fields_exist():
    for path in re.findall(r'\]\((?!http)([^)]+)\)', README) + re.findall(r'--config=(\S+)', README):
        assert (ROOT / path).exists(), path
    from cfg_jax.config import default

    fields = set(default().to_dict())
    for section, key in re.findall(r'config\.(\w+)\.(\w+)', README):
        if section in fields and key != 'key':
            assert key in default()[section], f'config.{section}.{key}'


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r'TODO|BENCH|TESTMIN', README)
