"""Matplotlib's SVG within an HTML page, whose style sheet gives its colours and its font."""

import re
from xml.etree import ElementTree

from cfg_jax.evaluation.style import PALETTE

_VARIABLES = {color: f'var(--{name})' for name, color in PALETTE.items()}
_DROPPED = ('clip-path', 'font-family', 'font-size', 'transform')  # the only transforms are rotations by 0


def as_html(svg, *, name, css, texts):
    """Return the SVG text of `figures.chart` as an <svg> of these classes that a screen reader calls by this name.

    The artist with gid 'point 3 curve1' becomes <g class="point" data-row="3" data-curve="1">, with texts[3] as its
    title. The Tab key reaches the first point, from which the script moves on.
    """
    (root,) = _converted(ElementTree.fromstring(svg))
    root.attrib = {'class': f'chart {css}'.strip(), 'viewBox': root.get('viewBox'), 'role': 'group', 'aria-label': name}
    for index, point in enumerate(root.iterfind('.//g[@class="point"]')):
        point.attrib |= {'tabindex': '-1' if index else '0', 'role': 'img'}
        marker = point.find('use')
        title = ElementTree.Element('title')
        title.text = texts[int(point.get('data-row'))]
        halo = ElementTree.Element('circle', {'class': 'halo', 'cx': marker.get('x'), 'cy': marker.get('y'), 'r': '12'})
        point[:0] = [title, halo]
    return ElementTree.tostring(root, encoding='unicode')


def _converted(element):
    """Yield an SVG element without namespaces, ids and styles; or its children, if it is a group of matplotlib's own.

    Styles become attributes, which a strict security policy allows and a style sheet overrides.
    """
    tag = element.tag.rpartition('}')[2]
    children = [each for child in element for each in _converted(child)]
    gid = element.get('id', '_')
    if tag in ('style', 'metadata', 'clipPath') or (tag == 'defs' and not children):
        return
    if tag == 'g' and '_' in gid:
        yield from children
        return
    attributes = {}
    for key, value in element.attrib.items():
        pairs = value.split('; ') if key == 'style' else [f'{key.rpartition("}")[2]}: {value}']
        attributes |= dict(pair.split(': ', 1) for pair in pairs)
    if tag == 'g':
        attributes = _of_gid(gid)
    if tag == 'text':
        attributes['aria-hidden'] = 'true'
    made = ElementTree.Element(tag, {key: _short(value) for key, value in attributes.items() if key not in _DROPPED})
    made.text = element.text and element.text.strip()
    made.extend(children)
    yield made


def _of_gid(gid):
    """Return the attributes of 'label alone curve2': class="label alone" and data-curve="2"; a number is a row's."""
    attributes = {'class': ' '.join(word for word in gid.split() if not word[-1].isdigit())}
    for word in gid.split():
        if word[-1].isdigit():
            attributes['data-curve' if word.startswith('curve') else 'data-row'] = word.removeprefix('curve')
    return attributes


def _short(value):
    """Return an attribute's value with colours as variables of the page, and numbers of at most one decimal."""
    value = re.sub(r'-?\d+\.\d{3,}', lambda number: f'{float(number[0]):.1f}', ' '.join(value.split()))
    return _VARIABLES.get(value, value)
