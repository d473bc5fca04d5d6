"""The documentation builds as a site, and wrong links and anchors fail the build."""

import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.tiny import ROOT

PAGES = sorted(path.relative_to(ROOT / 'docs') for path in (ROOT / 'docs').rglob('*.md'))


def build(root, site):
    """Run `mkdocs build --strict` in `root`."""
    return subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(site)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
    )


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'WARNING' not in done.stderr
    return folder


def page(site, name):
    return (site / name / 'index.html').read_text()


def test_every_page_is_built_and_in_the_navigation(site):
    start = (site / 'index.html').read_text()
    assert 'digits_over_w.png' in start
    for path in PAGES:
        assert (site / path.with_suffix('') / 'index.html').exists(), path
        assert f'href="{path.with_suffix("")}/"' in start, path


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile('<(?:script|img)[^>]* src="([^"]+)|<link rel="stylesheet" href="([^"]+)')
    for path in site.rglob('*.html'):
        assert not [url for pair in loads.findall(path.read_text()) for url in pair if '//' in url], path


def test_links_to_files_of_the_repository_show_them(site):
    assert 'source/configs/digits.py/' in page(site, 'configs')
    shown = html.unescape(re.sub('<[^>]+>', '', page(site, 'source/configs/digits.py')))
    assert (ROOT / 'configs' / 'digits.py').read_text().strip() in shown


def test_formulas_are_mathml_and_functions_link_to_their_reference(site):
    equations = page(site, 'equations')
    assert equations.count('<math') == (ROOT / 'docs' / 'equations.md').read_text().count('$') // 2
    assert 'arithmatex' not in equations
    for module in ('schedules', 'diffusion', 'guidance', 'samplers', 'losses', 'metrics'):
        functions = re.findall(f'href="../reference/mathematics/#cfg_jax.{module}.(\\w+)"', equations)
        assert functions
        for function in functions:
            assert f'id="cfg_jax.{module}.{function}"' in page(site, 'reference/mathematics')


@pytest.mark.parametrize(
    ('text', 'complaint'),
    [
        ('[x](other.md#there) ![x](picture.png) [x](../README.md#start) [x](../LICENSE)', ''),
        ('[x](absent.md)', 'absent.md'),
        ('[x](other.md#nowhere)', '#nowhere'),
        ('[x](#nowhere)', '#nowhere'),
        ('![x](absent.png)', 'absent.png'),
        ('[x](../absent.py)', 'no file absent.py'),
        ('[x](../README.md#nowhere)', '#nowhere'),
    ],
)
def test_wrong_links_and_anchors_fail_the_build(tmp_path, text, complaint):
    """A small site with the real site's hooks and validation."""
    config = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
    kept = {key: config[key] for key in ('hooks', 'exclude_docs', 'validation')}
    (tmp_path / 'mkdocs.yml').write_text(yaml.safe_dump({'site_name': 'x', 'plugins': [], **kept}))
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'site_hooks.py', tmp_path / 'docs')
    (tmp_path / 'docs' / 'page.md').write_text(f'# Page\n\n{text}\n')
    (tmp_path / 'docs' / 'other.md').write_text('# Other\n\n## There\n')
    (tmp_path / 'docs' / 'picture.png').write_bytes(b'')
    for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
        (tmp_path / name).write_text('# Start\n\n[x](docs/page.md)\n')
    (tmp_path / 'LICENSE').write_text('free\n')
    done = build(tmp_path, tmp_path / 'site')
    assert (done.returncode != 0) == bool(complaint), done.stderr
    assert complaint in done.stderr


def test_a_notebook_is_shown_cell_by_cell(tmp_path):
    spec = importlib.util.spec_from_file_location('site_hooks', ROOT / 'docs' / 'site_hooks.py')
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    path = tmp_path / 'a.ipynb'
    path.write_text(
        '{"cells": [{"cell_type": "markdown", "source": ["# A\\n", "b"]}, {"cell_type": "code", "source": ["x = 1"]}]}'
    )
    assert hooks._shown(path) == '# A\nb\n\n`````python\nx = 1\n`````'
