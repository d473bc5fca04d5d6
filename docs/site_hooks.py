"""Hooks of mkdocs: pages for files outside docs/, and formulas without a script.

README.md is the start page. A page links to a file of the repository with a relative path, as on GitHub; on the site
that file is a page of its own, so links work without the repository's address, and a missing file fails the build.
Formulas become MathML, which browsers draw themselves. A function in the tables of equations links to its reference.
"""

import html
import json
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}
_SOURCES = {page: source for source, page in PAGES.items()}
_LANGUAGES = {'.py': 'python', '.sh': 'bash', '.sbatch': 'bash', '.yaml': 'yaml', '.yml': 'yaml', '.toml': 'toml'}
_LINK = re.compile(r'(\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)\s]*)?\))')
_FUNCTION = re.compile(r'(\[`(\w+)\.(?!py`)(\w+)`\])\((?:\.\./)?cfg_jax/\2\.py\)')
_FORMULA = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_FUNCTION_NAME = re.compile('<mi>(log|tan|arctan|cos|exp)</mi>')
_log = get_plugin_logger('site_hooks')


def on_files(files, config):
    """Add the pages of PAGES and of the files that they and docs/ link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for source in sorted({target for page in files.documentation_pages() for target in _outside(page.src_uri)}):
        content = f'---\nsearch:\n  exclude: true\n---\n# {source}\n\n{_shown(ROOT / source)}\n'
        files.append(File.generated(config, _page_of(source), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's own pages."""
    if page.file.src_uri.startswith('source/'):
        return markdown
    markdown = _FUNCTION.sub(r'\1[cfg_jax.\2.\3]', markdown)

    def pointed(match):
        source = _resolved(page.file.src_uri, match[2])
        if source.startswith('docs/'):
            target = source.removeprefix('docs/')
        elif (ROOT / source).is_file():
            target = _page_of(source)
        else:
            _log.warning(f'{page.file.src_uri} links to {match[2]}, but there is no file {source}')
            return match[0]
        return match[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.') + match[3]

    return _LINK.sub(pointed, markdown)


def on_page_content(content, page, config, files):
    """Replace each formula by its MathML."""

    def drawn(match):
        # a thin space after the name of a function, as TeX sets it
        return _FUNCTION_NAME.sub(r'\g<0><mspace width="0.17em" />', convert(html.unescape(match[1])))

    return _FORMULA.sub(drawn, content)


def _page_of(source):
    return PAGES.get(source, f'source/{source}.md')


def _resolved(page, link):
    """Return the path, from the repository's root, of a link on a page."""
    folder = '' if page in _SOURCES else posixpath.join('docs', posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link))


def _outside(page):
    """Return the files outside docs/ that a page links to, as paths from the root."""
    path = ROOT / _SOURCES.get(page, os.path.join('docs', page))
    if not path.is_file():
        return []
    found = (_resolved(page, link) for _, link, _ in _LINK.findall(_FUNCTION.sub('', path.read_text())))
    return [source for source in found if not source.startswith(('docs/', *PAGES)) and (ROOT / source).is_file()]


def _shown(path):
    """Return a file as Markdown: itself, its text in a block of code, or a notebook's cells one after the other."""
    if path.suffix == '.md':
        return path.read_text().partition('\n')[2]  # its heading is replaced by the file's name
    if path.suffix != '.ipynb':
        return _block(_LANGUAGES.get(path.suffix, 'text'), path.read_text())
    cells = [(cell['cell_type'], ''.join(cell['source'])) for cell in json.loads(path.read_text())['cells']]
    return '\n\n'.join(text if kind == 'markdown' else _block('python', text) for kind, text in cells)


def _block(language, text):
    return f'`````{language}\n{text}\n`````'
