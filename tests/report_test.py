import base64
import copy
import csv
import functools
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfg_jax.evaluation import ranking, report
from cfg_jax.evaluation.report.sweep import Sweep
from cfg_jax.evaluation.style import NUM_COLORS, PALETTE
from tests import browser

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0)
COLUMNS = (
    *('guidance_weight', 'sampler', 'num_steps', 'fid', 'sfid', 'kernel_distance', 'inception_score', 'precision'),
    *('recall', 'accuracy', 'spread', 'num_samples', 'seed', 'seconds_per_image', 'network_evaluations'),
)
HOSTILE = '</textarea></script><script>alert(1)</script><img src="http://x.org/y" onerror=\'alert(2)\'>&amp;'


def some_rows(samplers=('ancestral', 'ddim'), weights=WEIGHTS):
    """Return rows like the digits': the FID falls and rises, the Inception score rises, the variety falls."""
    return [
        {
            'guidance_weight': w,
            'sampler': sampler,
            'num_steps': 32,
            'fid': 1.08 + (w - 0.3) ** 2 * 0.54 + 0.3 * index,
            'fid_error': 0.04 + 0.02 * w,
            'sfid': 1.7 + w,
            'kernel_distance': 0.0012 + 0.001 * w,
            'inception_score': 9.9 - 0.4 * math.exp(-3 * w) - 0.07 * index - 0.02 * w,
            'inception_score_error': 0.02,
            'precision': 1 - 0.09 * math.exp(-2 * w) - 0.01 * index,
            'recall': 0.93 - 0.15 * w,
            'accuracy': 0.99,
            'spread': np.float64(5.1 - 0.3 * w),
            'num_samples': 1000,
            'seed': np.int64(0),
            'seconds_per_image': np.float32(0.0057),
            'network_evaluations': 64.0,
        }
        for index, sampler in enumerate(samplers)
        for w in weights
    ]


def variants(count, weights=(0.0, 0.5, 2.0)):
    """Return rows of so many variants, as `some_rows` makes them."""
    return [
        {**row, 'variant': f'variant {index}', 'fid': row['fid'] + 0.2 * index}
        for index in range(count)
        for row in some_rows(('ddim',), weights)
    ]


def bare(rows):
    """Return the rows with FID and Inception score alone, of which a page has three figures, not six."""
    return [{key: row[key] for key in row if key not in ('precision', 'recall')} for row in rows]


def picture(size=120, value=90):
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(buffer, 'png')
    return buffer.getvalue()


def page(rows=None, **changes):
    rows = some_rows() if rows is None else rows
    given = {
        'title': 'Digits',
        'columns': COLUMNS,
        'settings': {'seed': 0, 'sample': {'sampler': 'ddim', 'nested': {'steps': (8, 16), 'name': ''}}},
        'references': {'judge': 'trained', 'reference': 'digits.npz', 'sha256': '4b0d' * 16, 'checkpoint step': 3000},
        'grids': [(row, picture(value=index)) for index, row in enumerate(rows)],
        'notes': ['The FID of 1,000 samples is biased.'],
    }
    return report.render(rows=rows, **{**given, **changes})


@functools.cache
def plain_page():
    """Return the page of the default rows, which takes a second to draw."""
    return page()


class Node:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children, self.texts = tag, attributes, [], []

    def all(self, tag, css=None):
        """Yield the elements below with this tag and class, in order."""
        for child in self.children:
            if child.tag == tag and (css is None or css in child.attributes.get('class', '').split()):
                yield child
            yield from child.all(tag, css)

    def text(self):
        return ''.join(part if isinstance(part, str) else part.text() for part in self.texts)


class Tree(HTMLParser):
    """The page as a tree; fails where elements do not close in the order in which they open."""

    EMPTY = frozenset(('meta', 'link', 'img', 'br', 'input'))

    def __init__(self, text):
        super().__init__()
        self.stack = [Node('', {})]
        self.feed(text)
        self.close()
        assert len(self.stack) == 1, f'{self.stack[-1].tag} is not closed'
        (self.root,) = self.stack[0].children

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f'{tag} has an attribute twice'
        node = Node(tag, dict(attributes))
        self.stack[-1].children.append(node)
        self.stack[-1].texts.append(node)
        if tag not in self.EMPTY:
            self.stack.append(node)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag, tag

    def handle_data(self, data):
        self.stack[-1].texts.append(data)


def parse(text):
    return Tree(text).root


def the_charts(tree):
    """Return {heading: its charts}."""
    return {next(f.all('h3')).text(): list(f.all('svg', 'chart')) for f in tree.all('figure') if any(f.all('h3'))}


def the_table(tree):
    (table,) = (table for table in tree.all('table') if table.attributes.get('id') == 'results')
    head = [cell.text() for cell in table.all('th')]
    return [dict(zip(head, line.all('td'))) for line in table.all('tr') if any(line.all('td'))]


def the_csv(tree):
    (area,) = tree.all('textarea')
    return list(csv.DictReader(area.text().lstrip('\n').splitlines()))


# ---------------------------------------------------------------- the page


def test_the_page_is_well_formed_whole_and_the_same_each_time():
    rows = some_rows()
    before = copy.deepcopy(rows)
    text = page(rows)
    tree = parse(text)
    assert rows == before and plain_page() == text
    assert not re.search(r'https?:|//\w+\.|@import|url\(', text)
    for node in (each for tag in ('img', 'link', 'script', 'a', 'iframe') for each in tree.all(tag)):
        for name in ('src', 'href', 'srcset'):
            assert node.attributes.get(name, 'data:').startswith('data:')
    assert not any(tree.all('a'))
    headings = [(tag, node.text()) for tag in ('h1', 'h2') for node in tree.all(tag)]
    expected = ['Digits', 'Fidelity and variety', 'Samples', 'All numbers', 'Where the numbers come from', 'Settings']
    assert [heading for _, heading in headings] == expected
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'aria-labelledby="([^"]*)"', text)) <= set(ids)


def test_the_security_policy_lets_only_the_pages_own_style_and_script_in():
    text = plain_page()
    tree = parse(text)
    (policy,) = (node.attributes['content'] for node in tree.all('meta') if 'http-equiv' in node.attributes)
    for tag in ('style', 'script'):
        (inside,) = re.findall(f'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
        assert f'{tag}-src {report._hash(inside)}' in policy
    assert "default-src 'none'" in policy and 'unsafe' not in policy


def test_nothing_that_is_given_becomes_markup():
    rows = [{**row, 'sampler': HOSTILE, HOSTILE: HOSTILE} for row in some_rows(('ddim',))]
    tree = parse(
        page(
            rows,
            title=HOSTILE,
            columns=(*COLUMNS, HOSTILE),
            settings={HOSTILE: {HOSTILE: HOSTILE}, 'names': (HOSTILE, 'b')},
            references={HOSTILE: HOSTILE},
            notes=[HOSTILE],
        )
    )
    assert len(list(tree.all('script'))) == 1
    assert len(list(tree.all('img'))) == len(rows)

    def walk(node):
        assert not [name for name in node.attributes if name.startswith('on')]
        for child in node.children:
            walk(child)

    walk(tree)
    assert the_table(tree)[0][HOSTILE.replace('_', ' ')].text() == HOSTILE == the_csv(tree)[0][HOSTILE]
    assert next(tree.all('h1')).text() == next(tree.all('li')).text() == HOSTILE
    (origin,) = tree.all('dl', 'origin')
    assert origin.text() == 2 * HOSTILE
    names, part = tree.all('details')
    assert f'{HOSTILE}, b' in names.text() and part.text() == 3 * HOSTILE


def test_every_number_is_in_the_table_and_in_full_in_the_csv():
    rows = some_rows()
    tree = parse(plain_page())
    for row, cells, line in zip(rows, the_table(tree), the_csv(tree), strict=True):
        assert cells['FID ↓'].text().replace(' (best)', '') == f'{row["fid"]:.3f} ± {row["fid_error"]:.3f}'
        assert cells['KID ↓'].text().replace(' (best)', '') == f'{row["kernel_distance"]:.5f}'
        assert cells['samples'].text() == '1,000' and cells['s / image'].text() == '0.0057'
        for key in (*COLUMNS, 'fid_error', 'inception_score_error'):
            assert type(row[key])(line[key]) == row[key]
        assert float(cells['FID ↓'].attributes['data-value']) == row['fid']


def test_columns_without_a_format_are_shown_as_they_are():
    rows = [{'guidance_weight': w, 'fid': 2.0, 'my_number': 1 / 3, 'flag': True} for w in (0, 1)]
    cells = the_table(parse(page(rows, columns=('guidance_weight', 'my_number', 'flag'), grids=())))
    assert [cell.text() for cell in cells[1].values()] == ['1', '0.333333', 'True']


def test_missing_values_are_dashes_and_interrupt_the_curves():
    rows = some_rows(('ddim',))
    rows[2]['fid'], rows[3]['recall'] = float('nan'), None
    del rows[4]['sfid']
    for row in rows:
        row['spread'] = None
    tree = parse(page(rows))
    table, lines = the_table(tree), the_csv(tree)
    assert table[2]['FID ↓'].text() == table[3]['recall ↑'].text() == table[4]['sFID ↓'].text() == '–'
    assert lines[2]['fid'] == lines[3]['recall'] == lines[4]['sfid'] == ''
    assert 'spread' not in table[0] and lines[0]['spread'] == ''
    assert 'nan' not in tree.text().replace('navigator', '').lower().split('use strict')[0]
    for heading, count in (('FID over w', 6), ('Recall over w', 6), ('Precision over w', 7)):
        (chart,) = the_charts(tree)[heading]
        assert len(list(chart.all('g', 'point'))) == count
        ((line,),) = (group.all('path') for group in chart.all('g', 'line'))
        assert line.attributes['d'].count('M') == (2 if count == 6 else 1)


def test_one_row_is_a_page_without_curves():
    tree = parse(page(some_rows(('ddim',), (0.3,))))
    assert not any(tree.all('svg', 'chart')) and not any(tree.all('strong'))
    assert len(the_table(tree)) == len(list(tree.all('img'))) == 1
    assert 'Lowest' not in tree.text()
    assert len(the_table(parse(page([{'fid': 2.0}], grids=(), notes=(), settings={}, references={})))) == 1


def test_samples_of_unknown_weight_are_called_samples():
    row = {'fid': 2.0, 'inception_score': 9.0, 'num_samples': 100}
    text = page([row], grids=[(row, picture())], notes=(), settings={}, references={})
    assert 'w = –' not in text and 'alt="Samples"' in text
    assert 'FID2.000samples' in parse(text).text()


def test_the_letters_of_the_table_are_explained():
    rows = [{**row, 'classifier_weight': 2.0} for row in some_rows(('ddim',))]
    text = parse(page(rows, columns=('guidance_weight', 'classifier_weight', 'fid'), grids=())).text()
    assert 'w: guidance weight; 0 is no guidance. c: weight of the classifier’s gradient; 0 is none.' in text


def test_what_was_not_measured_has_no_figure():
    rows = [{'guidance_weight': w, 'inception_score': 9 + w} for w in (0, 1)]
    assert list(the_charts(parse(page(rows, grids=())))) == ['Inception score over w']


def test_precision_takes_the_place_of_an_inception_score_that_no_row_has():
    rows = [{key: value for key, value in row.items() if not key.startswith('inception')} for row in some_rows()]
    headings = list(the_charts(parse(page(rows, grids=()))))
    assert headings[:2] == ['FID against precision', 'FID over w'] and not any('Inception' in each for each in headings)
    assert 'FID against precision' not in the_charts(parse(plain_page()))


def test_each_sampler_and_number_of_steps_is_a_curve():
    rows = some_rows(('ancestral', 'ddim')) + [{**row, 'num_steps': 128} for row in some_rows(('ddim',))]
    tree = parse(page(rows, grids=()))
    (legend,) = tree.all('ul', 'legend')
    names = ['ancestral, 32 steps', 'ddim, 32 steps', 'ddim, 128 steps']
    assert [item.text()[1:] for item in legend.all('li')] == names
    for heading, drawn in the_charts(tree).items():
        assert len(drawn) == (2 if heading == 'FID against Inception score' else 1)  # for wide and narrow screens
        for chart in drawn:
            lines = [next(group.all('path')) for group in chart.all('g', 'line')]
            assert [line.attributes['stroke'] for line in lines] == ['var(--c0)', 'var(--c1)', 'var(--c2)']
            points = list(chart.all('g', 'point'))
            assert [int(point.attributes['data-row']) for point in points] == list(range(21))
            assert [point.attributes['tabindex'] for point in points] == ['0'] + ['-1'] * 20
            assert len({next(point.all('use')).attributes['href'] for point in points}) == 3
            assert 'w = 0.3, ddim, 128 steps: ' in next(points[16].all('title')).text()
    assert len({swatch.text() for swatch in legend.all('span', 'swatch')}) == 3


@pytest.mark.parametrize(
    ('changes', 'names', 'heading'),
    [
        ([{'classifier_weight': c} for c in (0, 1, 2)], ['ddim, 32 steps'], 'FID over c'),
        ([{'num_steps': steps} for steps in (8, 16, 1024)], ['ddim'], 'FID over T'),
        (
            [{'guidance_weight': w, 'classifier_weight': c} for w in (0, 1) for c in (0, 2)],
            ['ddim, 32 steps, c = 0', 'ddim, 32 steps, c = 2'],
            'FID over w',
        ),
    ],
)
def test_curves_are_drawn_over_what_varies(changes, names, heading):
    (row,) = bare(some_rows(('ddim',), (0.3,)))
    rows = [{**row, 'fid': 1.0 + index, **change} for index, change in enumerate(changes)]
    sweep = Sweep(rows)
    assert list(sweep.curves) == names
    assert heading in the_charts(parse(page(rows)))


def test_variants_are_curves_of_their_names_and_are_ranked_above_all():
    rows = variants(3)
    ranked = ranking.rank(rows)
    given = {'ranking': ranked, 'ranking_columns': ranking.columns_of(ranked, ranking.IN_REPORT)}
    text = page(bare(rows), columns=('variant', *COLUMNS), grids=(), **given, ranking_note='A note on ties.')
    tree = parse(text)
    assert [node.text() for node in tree.all('h2')][:2] == ['Ranking', 'Fidelity and variety']
    (legend,) = tree.all('ul', 'legend')
    assert [item.text()[1:] for item in legend.all('li')] == ['variant 0', 'variant 1', 'variant 2']
    table = next(tree.all('table'))
    head, *lines = ([cell.text() for kind in ('th', 'td') for cell in line.all(kind)] for line in table.all('tr'))
    assert head[:5] == ['variant', 'FID ↓', 'tie', 'above the first ↓', 'w'] and 'interval' not in head
    assert [(line[0][1:], line[2]) for line in lines] == [
        (f'variant {i}', t) for i, t in enumerate(('first', 'no', 'no'))
    ]
    # each line is marked with the point of its least FID
    marked = [int(line.attributes['data-row']) for line in table.all('tr') if 'data-row' in line.attributes]
    assert [rows[index]['fid'] for index in marked] == [row['fid'] for row in ranked]
    assert next(iter(the_table(tree)[0])) == 'variant' and 'A note on ties.' in text
    points = [point for chart in tree.all('svg', 'chart') for point in chart.all('g', 'point')]
    assert {(p.attributes['data-row'], p.attributes['data-curve']) for p in points} == {
        (str(index), str(index // 3)) for index in range(9)
    }


def test_many_curves_have_labels_for_each_one_alone_and_a_logarithmic_axis():
    rows = bare(variants(8, WEIGHTS))
    for row in rows[-7:]:
        row['fid'] += 30
    drawn = the_charts(parse(page(rows, grids=())))
    (chart,), (wide, _) = (drawn[heading] for heading in ('FID over w', 'FID against Inception score'))
    assert 'FID ↓, logarithmic' in [text.text() for text in chart.all('text')]
    together = [group for group in wide.all('g', 'label') if 'alone' not in group.attributes['class']]
    assert [group.text() for group in together] == ['w = 0.3, FID 1.080']
    alone = [group.attributes['data-curve'] for group in wide.all('g', 'alone')]
    assert set(alone) == set(map(str, range(8))) and len(alone) > 40  # most of 55 find a place
    for line in wide.all('g', 'line'):
        assert line.attributes['data-curve'] in alone


def test_rows_in_any_order_give_the_curve_in_the_order_of_the_weight():
    rows = some_rows(('ddim',))
    (members,) = Sweep(rows[::-1]).curves.values()
    assert members == list(range(6, -1, -1))


def test_the_lowest_fid_and_the_best_of_each_column_are_marked():
    rows = some_rows()
    tree = parse(plain_page())
    for heading, charts in the_charts(tree).items():
        for chart in charts:
            (ring,) = (next(group.all('use')) for group in chart.all('g', 'best'))
            (marker,) = (
                next(point.all('use')) for point in chart.all('g', 'point') if point.attributes['data-row'] == '2'
            )
            assert all(ring.attributes[key] == marker.attributes[key] for key in 'xy')
            bold = [label.text() for label in chart.all('text') if label.attributes.get('font-weight') == '700']
            assert bold == ['w = 0.3, FID 1.080'] * heading.startswith('FID')
    marked = {
        (index, name)
        for index, row in enumerate(the_table(tree))
        for name, cell in row.items()
        if any(cell.all('strong'))
    }
    # both samplers have the same sFID, KID and recall at each weight; accuracy does not differ, spread has no best
    ties = {(index, name) for index in (0, 7) for name in ('sFID ↓', 'KID ↓', 'recall ↑')}
    score = max(range(14), key=lambda index: rows[index]['inception_score'])
    assert marked == {(2, 'FID ↓'), (score, 'IS ↑'), (6, 'precision ↑')} | ties
    assert 'Lowest FID1.080 ± 0.046w = 0.3, ancestral, 32 steps' in next(tree.all('header')).text()


def test_error_bars_are_as_long_as_the_errors():
    rows = bare(some_rows(('ddim',)))
    chart = the_charts(parse(page(rows)))['FID against Inception score'][0]
    markers = [next(point.all('use')).attributes for point in chart.all('g', 'point')]
    places = np.array([(marker['x'], marker['y']) for marker in markers], float)
    (group,) = chart.all('g', 'error')
    bars = np.array([re.findall(r'[-\d.]+', bar.attributes['d']) for bar in group.all('path')], float).reshape(-1, 2, 4)
    lengths = np.stack([bars[:, 0, 2] - bars[:, 0, 0], bars[:, 1, 1] - bars[:, 1, 3]], axis=1)
    for axis, key in enumerate(('inception_score', 'fid')):
        shown, errors = (np.array([row[name] for row in rows]) for name in (key, f'{key}_error'))
        scale = np.ptp(places[:, axis]) / np.ptp(shown)
        np.testing.assert_allclose(lengths[:, axis], 2 * errors * scale, atol=0.2)
        np.testing.assert_allclose((bars[:, axis, axis] + bars[:, axis, axis + 2]) / 2, places[:, axis], atol=0.11)
    for row in rows:
        row['fid_error'] = row['inception_score_error'] = None
    tree = parse(page(rows[:2]))
    assert not any(tree.all('g', 'error')) and 'Bars' not in tree.text()


def test_the_data_are_a_line_where_they_are_near():
    rows = bare(some_rows(('ddim',)))
    near, far = (the_charts(parse(page(rows, real={'inception_score': score}))) for score in (9.95, 200.0))
    for drawn, count in ((near, 1), (far, 0)):
        for heading in ('FID against Inception score', 'Inception score over w'):
            for chart in drawn[heading]:
                assert len(list(chart.all('g', 'real'))) == count
                assert [text.text() for text in chart.all('text')].count('data 9.950') == count
    assert not any(near['FID over w'][0].all('g', 'real'))
    floor = the_charts(parse(page(rows, real={'fid': 1.0})))
    for heading in ('FID against Inception score', 'FID over w'):
        for chart in floor[heading]:
            assert [text.text() for text in chart.all('text')].count('data halves 1.000') == 1


def test_samples_are_embedded_as_they_are():
    rows = bare(some_rows())
    grids = [(row, picture(size, index)) for index, (row, size) in enumerate(zip(rows, (90, 400) * 7))]
    text = page(rows, grids=grids)
    images = list(parse(text).all('img'))
    for image, (_, png), size in zip(images, grids, (90, 400) * 7, strict=True):
        kind, _, data = image.attributes['src'].partition(',')
        assert kind == 'data:image/png;base64' and base64.b64decode(data) == png
        assert image.attributes['width'] == image.attributes['height'] == str(size)
        assert image.attributes['loading'] == 'lazy'
        assert (image.attributes.get('class') == 'pixelated') == (size == 90)
    assert images[9].attributes['alt'] == 'Samples at w = 0.3, ddim, 32 steps'
    captions = [caption.text() for caption in parse(text).all('figcaption') if not any(caption.all('h3'))]
    assert captions[2] == f'w = 0.3 FID 1.080 · IS {rows[2]["inception_score"]:.3f}'
    assert [node.text() for node in parse(text).all('h3', 'group')] == ['●ancestral, 32 steps', '■ddim, 32 steps']
    with pytest.raises(ValueError, match='must be a PNG'):
        page(rows[:1], grids=[(rows[0], b'GIF89a')])


def test_settings_are_a_table_for_each_part():
    general, sample = parse(plain_page()).all('details')
    assert general.text() == 'generalseed0'
    assert sample.text() == "samplesamplerddimnested.steps8, 16nested.name''"


def test_labels_stay_clear_of_each_other_and_of_the_points():
    rows = bare(some_rows(('ancestral', 'ddim', 'third', 'fourth'), np.linspace(0, 3, 13).round(2).tolist()))
    drawn = the_charts(parse(page(rows, grids=())))
    for chart in (chart for charts in drawn.values() for chart in charts):
        labels = [next(group.all('text')) for group in chart.all('g', 'label')]
        boxes = []
        for label in labels:
            x, y, half = float(label.attributes['x']), float(label.attributes['y']), 3.2 * len(label.text())
            boxes.append((x - half, y - 10, x + half, y + 2))
        for point in chart.all('g', 'point'):
            x, y = (float(next(point.all('use')).attributes[key]) for key in 'xy')
            boxes.append((x - 4, y - 4, x + 4, y + 4))
        for index, (left, top, right, bottom) in enumerate(boxes[: len(labels)]):
            for other in boxes[index + 1 :]:
                assert not (left < other[2] and other[0] < right and top < other[3] and other[1] < bottom)
    wide = list(drawn['FID against Inception score'][0].all('g', 'label'))
    assert len(wide) > 20  # of 52: most find a place


def test_colors_have_contrast_in_both_schemes():
    style = Path(report.__file__).with_name('report.css').read_text()
    light, dark = (
        dict(re.findall(r'--(\w+): (#\w{6});', part)) for part in style.split('prefers-color-scheme: dark')[:2]
    )
    assert light.keys() == dark.keys()
    assert PALETTE.items() <= light.items()

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for scheme in (light, dark):
        for name in ('ink', 'soft', *(f'c{index}' for index in range(NUM_COLORS))):
            low, high = sorted((luminance(scheme[name]), luminance(scheme['paper'])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, name  # WCAG 2, 1.4.3


# ---------------------------------------------------------------- in a browser

in_a_browser = pytest.mark.skipif(browser.PROGRAM is None, reason='Chromium is not installed')


@pytest.fixture(scope='module')
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('report') / 'report.html'
    rows = [*some_rows()[:-1], {**some_rows()[-1], 'fid': None}]
    columns = (*COLUMNS, 'my_' + 'long_' * 8 + 'name')
    long = {'settings': {'part': {'a_name_that_is_long' * 5: 'x' * 300}}, 'notes': ['y' * 200], 'title': 'T' + 'w' * 90}
    grids = [(row, picture(600, 15 * index)) for index, row in enumerate(rows)]
    path.write_text(page(rows, columns=columns, grids=grids, real={'inception_score': 9.95}, **long))
    return path


@in_a_browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1400, 400])
def test_the_page_fits_its_window(chromium, file, tmp_path, width, scheme):
    chromium.open(file, width=width, scheme=scheme)
    chromium.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert chromium.evaluate('document.documentElement.scrollWidth <= innerWidth')
    visible = '[...document.querySelectorAll(".chart")].filter(each => each.getBoundingClientRect().width)'
    assert chromium.evaluate(f'{visible}.length') == 6
    edges = chromium.evaluate(f'{visible}.map(each => each.getBoundingClientRect().right)')
    assert max(edges) <= width
    # the letters of the charts, as they are scaled
    assert chromium.evaluate(f'Math.min(...{visible}.map(e => 12 * e.clientWidth / e.viewBox.baseVal.width))') >= 10
    chromium.screenshot(tmp_path / 'page.png')
    shot = np.asarray(Image.open(tmp_path / 'page.png').convert('L'))
    assert shot.shape[1] == width
    assert np.median(shot) > 240 if scheme == 'light' else np.median(shot) < 40
    assert shot.std() > 10
    assert chromium.errors == []


@in_a_browser
@pytest.mark.parametrize(('width', 'size'), [(1400, 'wide'), (400, 'narrow')])
def test_pointing_at_a_point_shows_its_numbers(chromium, file, width, size):
    chromium.open(file, width=width)
    assert chromium.evaluate("document.getElementById('tip').hidden")
    chromium.point_at(f'.chart.{size} .point[data-row="9"] use')
    row = some_rows()[9]
    told = chromium.evaluate("document.getElementById('tip').innerText")
    assert told.startswith('w = 0.3, ddim, 32 steps')
    for text in (f'{row["fid"]:.3f} ± {row["fid_error"]:.3f}', f'{row["recall"]:.3f}', '1,000', '0.0057', '64'):
        assert text in told
    box = chromium.evaluate('(({left, right, top, bottom}) => [left, right, top, bottom])(tip.getBoundingClientRect())')
    assert 0 <= box[0] < box[1] <= width and 0 <= box[2] < box[3] <= 900
    # the row is found in the table and in the other charts
    assert chromium.evaluate('document.querySelectorAll(\'tr.active[data-row="9"]\').length') == 1
    assert chromium.evaluate("document.querySelectorAll('.point.active').length") == 7
    chromium.point_at('h1')
    assert chromium.evaluate("document.getElementById('tip').hidden")
    # and the row's points in the charts
    chromium.point_at('#results tr[data-row="3"] td')
    marked = "[...document.querySelectorAll('.point.active')].map(point => point.dataset.row)"
    assert chromium.evaluate(marked) == ['3'] * 7 and chromium.evaluate("document.getElementById('tip').hidden")
    assert chromium.errors == []


@in_a_browser
def test_the_keyboard_reaches_every_point(chromium, file):
    chromium.open(file, width=1400)
    chromium.evaluate("document.querySelector('.chart.wide .point').focus()")
    seen = []
    for _ in range(13):
        title = chromium.evaluate("document.querySelector('#tip b').innerText")
        seen.append((title, chromium.evaluate("document.activeElement.getAttribute('aria-label')")))
        chromium.press('ArrowRight')
    expected = [f'w = {w:g}, {sampler}, 32 steps' for sampler in ('ancestral', 'ddim') for w in WEIGHTS][:13]
    assert [title for title, _ in seen] == expected
    assert all(label.startswith(title) for title, label in seen)
    assert chromium.evaluate('document.querySelectorAll(\'.chart.wide .point[tabindex="0"]\').length') == 1
    chromium.press('Escape')
    assert chromium.evaluate("document.getElementById('tip').hidden")
    assert chromium.errors == []


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """A page of eight variants of three points each."""
    path, rows = tmp_path_factory.mktemp('many') / 'report.html', bare(variants(8))
    ranked = ranking.rank(rows)
    given = {'ranking': ranked, 'ranking_columns': ranking.columns_of(ranked, ranking.IN_REPORT)}
    path.write_text(page(rows, columns=('variant', *COLUMNS), grids=(), **given))
    return path


VISIBLE = "filter(e => getComputedStyle(e).display !== 'none')"  # checkVisibility does not know hidden parts of SVG
PRESSED = "[...document.querySelectorAll('.legend [aria-pressed]')].map(e => e.getAttribute('aria-pressed') === 'true')"
SHOWN = f"[...document.querySelectorAll('.chart.wide .line')].{VISIBLE}.map(e => Number(e.dataset.curve))"
GREY = "[...document.querySelectorAll('#results tr[data-row]')].filter(e => getComputedStyle(e).opacity < 1).length"
LABELS = f"[...document.querySelectorAll('.chart.wide .alone')].{VISIBLE}.length"


def button(number):
    return f'.legend li:nth-child({number + 1}) button'


@in_a_browser
def test_the_legend_hides_and_shows_curves(chromium, many):
    chromium.open(many, width=1400)
    everything = list(range(8))
    assert chromium.evaluate(SHOWN) == everything and chromium.evaluate(PRESSED) == [True] * 8
    assert chromium.evaluate(f'[{GREY}, {LABELS}]') == [0, 0]
    chromium.point_at(button(2), click=True)
    assert chromium.evaluate(SHOWN) == [0, 1, 3, 4, 5, 6, 7] and chromium.evaluate(GREY) == 3
    assert chromium.evaluate(PRESSED) == [number != 2 for number in everything]
    for selector in ('.point', '.error', '.line'):
        of_curve = f"""[...document.querySelectorAll('{selector}[data-curve="2"]')]"""
        assert chromium.evaluate(f'[{of_curve}.length > 0, {of_curve}.{VISIBLE}.length]') == [True, 0], selector
    chromium.point_at(button(2), click=True)
    assert chromium.evaluate(SHOWN) == everything and chromium.evaluate(GREY) == 0
    # one alone: a double click, or shift and a click; the same again, or the button, shows all
    chromium.point_at(button(5), click=2)
    assert chromium.evaluate(SHOWN) == [5] and chromium.evaluate(GREY) == 21 and chromium.evaluate(LABELS) > 1
    chromium.point_at(button(3), click=True, shift=True)
    assert chromium.evaluate(SHOWN) == [3]
    chromium.point_at(button(3), click=True, shift=True)
    assert chromium.evaluate(SHOWN) == everything
    chromium.point_at(button(0), click=True)
    chromium.point_at('.legend .all', click=True)
    assert chromium.evaluate(SHOWN) == everything and chromium.evaluate("document.querySelector('.all').disabled")
    assert chromium.errors == []


@in_a_browser
def test_the_legend_works_with_the_keyboard(chromium, many):
    chromium.open(many, width=400)
    chromium.evaluate(f"document.querySelector('{button(0)}').focus()")
    chromium.press('Enter')
    assert chromium.evaluate(PRESSED) == [False] + [True] * 7
    # the Tab key and the arrows reach the points that are shown
    first = "[...document.querySelectorAll('.chart')].map(c => c.querySelector('.point[tabindex=\"0\"]').dataset.curve)"
    assert set(chromium.evaluate(first)) == {'1'}
    chromium.evaluate('document.querySelector(\'.chart.narrow .point[tabindex="0"]\').focus()')
    chromium.press('ArrowLeft')
    assert chromium.evaluate('document.activeElement.dataset.row') == '3'
    chromium.evaluate(f"document.querySelector('{button(4)}').focus()")
    chromium.press('Enter', shift=True)
    assert chromium.evaluate(PRESSED) == [number == 4 for number in range(8)]
    assert chromium.evaluate('document.documentElement.scrollWidth <= innerWidth')
    assert chromium.errors == []


@in_a_browser
def test_a_line_of_the_ranking_marks_its_point(chromium, many):
    chromium.open(many, width=1400)
    chromium.point_at('[aria-labelledby="ranking"] tbody tr:nth-child(2) td')
    assert chromium.evaluate("[...document.querySelectorAll('.point.active')].map(p => p.dataset.row)") == ['4'] * 4
    assert chromium.errors == []


@in_a_browser
def test_columns_sort_with_what_is_missing_last(chromium, file):
    chromium.open(file, width=1400)
    order = "[...document.querySelectorAll('#results tbody tr')].map(line => Number(line.dataset.row))"
    fids = [row['fid'] for row in some_rows()]
    chromium.point_at('th[data-name="FID"] button', click=True)
    assert chromium.evaluate(order) == [*sorted(range(13), key=fids.__getitem__), 13]
    chromium.point_at('th[data-name="FID"] button', click=True)
    assert chromium.evaluate(order) == [*sorted(range(13), key=fids.__getitem__, reverse=True), 13]
    assert chromium.evaluate("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == 'descending'
    assert chromium.errors == []


@in_a_browser
def test_the_table_is_copied_as_csv(chromium, file):
    chromium.open(file, width=1400)
    chromium.evaluate('navigator.clipboard.writeText = async text => { window.copied = text }')
    chromium.point_at('#copy', click=True)
    lines = list(csv.DictReader(chromium.evaluate('window.copied').splitlines()))
    assert [float(line['fid'] or 'nan') for line in lines[:-1]] == [row['fid'] for row in some_rows()[:-1]]
    assert lines[-1]['fid'] == ''
    # a page that may not write to the clipboard shows the text
    chromium.evaluate("navigator.clipboard.writeText = async () => { throw new Error('no') }")
    chromium.point_at('#copy', click=True)
    assert chromium.evaluate('csv.checkVisibility() && csv.selectionEnd - csv.selectionStart') > 1000
    assert chromium.errors == []


@in_a_browser
@pytest.mark.parametrize('width', [1400, 400])
def test_a_picture_is_enlarged_and_turns_to_its_neighbours(chromium, file, width):
    chromium.open(file, width=width)
    chromium.point_at('.samples button', click=True)
    shown = "document.querySelector('dialog output').value"
    assert chromium.evaluate(shown) == 'w = 0, ancestral, 32 steps'
    chromium.press('ArrowRight')
    assert chromium.evaluate(shown) == 'w = 0.1, ancestral, 32 steps'
    same = "document.querySelector('dialog img').src === document.querySelectorAll('.samples img')[1].src"
    assert chromium.evaluate(same)
    assert chromium.evaluate("document.querySelector('dialog img').clientWidth") == (600 if width == 1400 else 368)
    assert chromium.evaluate('document.documentElement.scrollWidth <= innerWidth')
    chromium.evaluate("document.querySelector('dialog').close()")
    assert chromium.errors == []


@in_a_browser
def test_the_curves_show_without_the_script(chromium, file, tmp_path):
    bare = tmp_path / 'bare.html'
    bare.write_text(re.sub('<script>.*</script>', '', file.read_text(), flags=re.DOTALL))
    chromium.open(bare, width=1400)
    assert chromium.evaluate("[...document.querySelectorAll('.chart.wide .point use')].every(m => m.checkVisibility())")
    assert not chromium.evaluate("[...document.querySelectorAll('.scripted')].some(m => m.checkVisibility())")
    assert chromium.errors == []


@in_a_browser
def test_the_browser_reports_what_goes_wrong(chromium, tmp_path):
    """An empty list of errors means something: the policy stops a foreign script, and an error is seen."""
    injected = tmp_path / 'injected.html'
    injected.write_text(plain_page().replace('</main>', '<script>window.foreign = 1</script></main>'))
    chromium.open(injected, width=1400)
    assert chromium.evaluate('window.foreign') is None
    assert 'Content Security Policy' in json.dumps(chromium.errors)
    chromium.errors.clear()
    chromium.evaluate("setTimeout(() => { throw new Error('seen') })")
    chromium.evaluate('new Promise(done => setTimeout(done, 20))')
    assert 'seen' in json.dumps(chromium.errors)
    chromium.errors.clear()
