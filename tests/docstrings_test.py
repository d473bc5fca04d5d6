"""Docstrings begin with a verb or with the thing's name."""

import ast

import pytest

from tests.tiny import ROOT

FILES = sorted((ROOT / 'cfg_jax').rglob('*.py'))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_name(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DOCUMENTED)]
    docstrings = [(getattr(node, 'name', 'the module'), ast.get_docstring(node) or '') for node in nodes]
    bad = [f'{name}: {text[:60]}' for name, text in docstrings if text.startswith(('What', 'Of ', 'Whether', 'From '))]
    assert not bad
