"""docs/equations.md names functions that exist, and every function that stands under an equation."""

import ast
import importlib
import re

import pytest

from tests.tiny import ROOT

PAGE = (ROOT / 'docs' / 'equations.md').read_text()
LINKS = re.findall(r'\[`(\w+)\.(\w+)`\]\((\S+)\)', PAGE)
MODULES = ['schedules', 'diffusion', 'guidance', 'samplers', 'losses', 'distillation']
BANNER = '# ' + 64 * '-'


def public_functions(module):
    """Return the public functions below the module's first banner, each with the last banner above it."""
    text = (ROOT / 'cfg_jax' / f'{module}.py').read_text()
    banners = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(BANNER)]
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_') and node.lineno > banners[0]:
            yield node.name, max(number for number in banners if number < node.lineno)


@pytest.mark.parametrize(('module', 'function', 'link'), LINKS)
def test_every_function_on_the_page_exists(module, function, link):
    assert callable(getattr(importlib.import_module(f'cfg_jax.{module}'), function))
    assert link == f'../cfg_jax/{module}.py' and (ROOT / 'docs' / link).exists()


@pytest.mark.parametrize('module', [*MODULES, 'metrics'])
def test_every_function_under_an_equation_is_on_the_page(module):
    named = {function for its_module, function, _ in LINKS if its_module == module}
    assert {name for name, _ in public_functions(module)} == named


@pytest.mark.parametrize('module', MODULES)
def test_a_banner_heads_few_functions(module):
    """A banner states one equation, so at most its forms and inverses stand below it."""
    banners = [banner for _, banner in public_functions(module)]
    assert max(banners.count(banner) for banner in banners) <= 3
