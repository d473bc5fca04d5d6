"""The tables, the pictures and the report of an evaluation."""

import sys
from pathlib import Path

import cfg_jax
from cfg_jax import build, files
from cfg_jax.evaluation import columns, figures, grids, ranking, report, results, scoring, style
from cfg_jax.evaluation.report.sweep import Sweep
from cfg_jax.jobs.evaluate import curves, judging, searching


class Record:
    """The findings of one judge in an evaluation, curve by curve, and its files in the workdir.

    rows: of all sets so far. folder: of the tables, pictures and the report.
    """

    def __init__(self, measuring, workdir, class_names):
        self.measuring, self._workdir, self._class_names = measuring, workdir, class_names
        self.folder = measuring.folder(workdir)
        self.rows, self._pictures, self._influences, self._sets = [], [], [], []

    def add(self, curve, judged):
        """Add a set of images of a curve, and write its picture and the tables."""
        self._sets.append(judged)
        self.rows.append(judged.row)
        self._pictures.append((judged.row, judged.picture))
        self._influences.append(judged.influences)
        name = f'{curve.suffix}_{judged.name.replace("=", "")}'
        files.write(self.folder / f'samples{name}.png', judged.picture)
        if judged.nearest:
            files.write(self.folder / f'nearest{name}.png', judged.nearest)
        files.write(self.folder / 'tradeoff.csv', results.as_csv(self.rows, columns.TRADEOFF).encode())
        files.write(self.folder / 'costs.csv', results.as_csv(self.rows, columns.COSTS).encode())
        if judged.confusion is not None:
            by_class = [(each.name, scoring.accuracy_by_class(each.confusion)) for each in self._sets]
            table = results.accuracy_table(self._class_names, by_class)
            files.write(self.folder / f'accuracy_by_class{curve.suffix}.csv', table.encode())

    def end_curve(self, curve):
        """Write the pictures of a curve whose sets have been added."""
        write_curve_pictures(curve, self.folder, self._sets, self.measuring.scorer, self._class_names)
        self._sets = []

    def end(self):
        """Write results.csv, the report, and the pictures of all curves together."""
        write_summary(self._workdir, self.rows, self._pictures, self.measuring, self._influences)


def write_search(folder, tried):
    """Write search.csv: every point that the searches of all curves so far have tried."""
    files.write(folder / 'search.csv', results.as_csv(tried, searching.COLUMNS).encode())


def write_curve_pictures(curve, folder, sets, scorer, class_names):
    """Write the pictures of a whole curve: the same noise at every weight, the trade-off, the confused classes."""
    config, suffix = curve.config, curve.suffix
    rows, (over, _) = [judged.row for judged in sets], curves.swept(config)
    symbol = columns.SYMBOLS[over]
    names = [f'{symbol} = {row[over]:g}' for row in rows]
    grid = grids.grid([judged.first for judged in sets], names)
    grids.save_png(folder / f'samples{suffix}_over_{symbol}.png', grid)
    title = f'{curve.variant}, {title_of(config, rows)}' if curve.variant else title_of(config, rows)
    picture = figures.tradeoff(rows, title=title, over=over, real=judging.real_values(scorer.real))
    style.save(folder / f'tradeoff{suffix}', picture)
    if scorer.judge.confusion is not None:
        matrices = {'held-out images': scorer.judge.confusion}
        matrices |= {name: judged.confusion for name, judged in zip(names, sets)}
        title = f'The classes that the judge {scorer.judge.name!r} sees, in % of each label'
        style.save(folder / f'confusion{suffix}', figures.confusion(matrices, class_names, title=title))


def title_of(config, rows, *, guidance=True):
    """Return a line that says what the curves show. guidance: name it too, if all curves have the same."""
    row = rows[0]
    parts = [f'{row["num_samples"]:,} samples per weight']
    if row['step'] is not None:  # drawn here
        parts += [f'{row["num_steps"]} {row["sampler"]} steps', f'training step {row["step"]:,}']
        parts += [guidance_name(row['guidance'], max(each['classifier_gradients'] for each in rows))] * guidance
    return f'{build.data_name(config)}: {", ".join(parts)}, judge {judge_of(row)!r}'


def judge_of(row):
    """Return the name of the judge of a row, without its hash."""
    return row['judge'].partition(':')[0]


def guidance_name(function, by_classifier):
    """Return the name of a guidance in titles. function: the column 'guidance', which older tables do not have."""
    if not function:
        function = 'conditional' if by_classifier else 'classifier_free'
    names = {'classifier_free': 'classifier-free', 'conditional': '', 'unconditional': 'unconditional model'}
    own = function.partition(',')[0].rpartition(':')[2]
    name = names.get(own, own)
    if own in ('conditional', 'unconditional'):
        return f'{name}, {"classifier" if by_classifier else "no"} guidance'.removeprefix(', ')
    return f'{name} and classifier guidance' if by_classifier else f'{name} guidance'


def write_summary(workdir, rows, pictures, measuring, influences=None):
    """Write results.csv, the report and, if another curve is given, comparison.png and .svg.

    pictures: [(row, PNG bytes)]. influences: of each row's images on its FID, for `ranking.rank`.
    """
    config, folder, path = measuring.config, measuring.folder(workdir), Path(workdir) / 'results.csv'
    names, former = results.read_all(path)
    every, replaced = results.merged(former, rows)
    files.write(path, results.as_csv(every, names).encode())
    ranked = ranking.rank(rows, influences) if several_curves(config) or config.eval.search else []
    if ranked:
        files.write(folder / 'ranking.csv', results.as_csv(ranked, ranking.columns_of(ranked)).encode())
    page_path = folder / ('samples_report.html' if config.eval.samples else 'report.html')
    files.write(page_path, report_page(config, rows, pictures, measuring, ranked).encode(errors='backslashreplace'))
    if measuring.other:
        pairs = (config.eval.compare_with, measuring.other), (config.eval.folder or '.', rows)
        both = {curve_name(name, rows): rows for name, rows in pairs}
        style.save(folder / 'comparison', figures.comparison(both, title=title_of(config, rows, guidance=False)))
        print(f'wrote {folder}/comparison.png and .svg', flush=True)
    sweep, data, judge = Sweep(rows), build.data_name(config), f'judge {config.eval.judge!r}'
    named = {name: [rows[index] for index in members] for name, members in sweep.curves.items()}
    if curves.are_named(config):
        title = f'{data}: {rows[0]["num_samples"]:,} samples per weight, {judge}'
        style.save(folder / 'variants', figures.comparison(named, title=title))
    if (over := curves.mapped(config)) and len(rows) > len(named):
        where = f'FID, {rows[0]["num_samples"]:,} samples each, {judge}'
        style.save(folder / 'fid_map', figures.fid_map(rows, sweep.over, over, title=f'{data}: {where}'))
    if lengths := curves.over_ema(config):
        title = f'{data}: FID, {rows[0]["num_samples"]:,} samples each, {judge}'
        style.save(folder / 'fid_over_ema', figures.over_ema(rows, lengths, title=title))
    if sweep.over == 'num_steps':  # nothing else varies along the curves, one for each sampler
        where = f'w = {rows[0]["guidance_weight"]:g}'
        where += '' if curves.are_named(config) else f', grid {rows[0]["grid"]}'
        title = f'{data}: {rows[0]["num_samples"]:,} samples, {where}, {judge}'
        style.save(folder / 'evaluations', figures.over_evaluations(named, title=title))
    print(*ranking.lines(ranked) if ranked else (), sep='\n', end='\n' if ranked else '', flush=True)
    beside = '' if config.eval.samples else ', its tables and its pictures'
    again = f', {replaced} in place of rows of the same settings' if replaced else ''
    print(f'wrote {page_path}{beside}; added to {path}: {len(rows)}{again}', flush=True)


def several_curves(config):
    """Return True if the evaluation has more than one curve, or variants, which have names."""
    return curves.are_named(config) or len(config.eval.samplers) > 1 or len(config.eval.num_steps) > 1


def report_page(config, rows, pictures, measuring, ranked=()):
    """Return report.html as text. ranked: the rows of `ranking.rank`."""
    notes = []
    if config.eval.search:
        by = '' if 'search_fid' in rows[0] else ' by the first judge'
        notes.append(
            f'Each curve is one point: a search{by} on {config.eval.search_samples:,} samples (search.csv) chose it, '
            'and other samples measured it again, because the least of many noisy values is too low.'
        )
    if rows[0]['num_samples'] < 10_000:
        notes.append(
            f'{rows[0]["num_samples"]:,} samples: FID is biased upwards at such numbers and compares only with FID of '
            'equally many samples; FID∞ is its extrapolation to infinitely many.'
        )
    if config.eval.judge == 'dinov2':
        notes.append("The judge is 'dinov2': FID here is FD-DINOv2, which compares only with FD-DINOv2 in papers.")
    elif config.eval.judge != 'inception':
        notes.append(
            f'The judge is {config.eval.judge!r}: compare its numbers only with its own, not with those in papers.'
        )
    facts, real = measuring.facts, measuring.scorer.real
    origin = {
        'judge': facts['judge'],
        'reference': facts['reference'],
        'reference sha256': facts['reference_sha256'],
        'FID of two halves of it': floor_fact(real),
        'training step': facts['step'],
        'samples': facts['samples'],
        'date': facts['date'],
        'cfg_jax': cfg_jax.__version__,
        'command': ' '.join(['python -m cfg_jax.main', *sys.argv[1:]]),
    }
    title = title_of(config, rows)
    if several_curves(config):
        title = config.data.name or config.data.source
        title += f': {len(ranked)} variants' if config.eval.variants else ''
    return report.render(
        title=title,
        rows=rows,
        columns=columns.IN_REPORT,
        settings=config.to_dict(),
        references={name: value for name, value in origin.items() if value not in (None, '')},
        grids=pictures,
        notes=notes,
        ranking=ranked,
        ranking_columns=ranking.columns_of(ranked, ranking.IN_REPORT),
        ranking_note=ranking.note(ranked, searched=config.eval.search),
        real=judging.real_values(real),
    )


def floor_fact(real):
    """Return FID of two halves of the reference and their sizes as text, None if it is not known."""
    if not real.floor:
        return None
    size = f' (± the deviation of one split; {real.num_images // 2:,} images each)' if real.num_images else ''
    return f'{judging.floor_text(real)}{size}'


def curve_name(folder, rows):
    """Return the name of a folder's curve in a plot with others."""
    kind = guidance_name(rows[0].get('guidance'), max(row['classifier_gradients'] for row in rows))
    return kind if folder == '.' else f'{kind} ({folder})'
