"""The one table of an evaluation's columns: files, report, printed lines and axes take their names from it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its name in the files, how its values are written and compared, and where it appears.

    label: its name in tables. format: of its numbers, '' for text. better: 'lower', 'higher' or '' (neither).
    title: its name on an axis, if not the label. symbol: its sign, if curves may be drawn over it. error: True if
    '<name>_error' holds its error. tradeoff: its place in tradeoff.csv. costs, report, printed: True if it
    stands in costs.csv, in the report, in the line printed for a row. results.csv has every column. identity: True for
    a setting: rows of results.csv that agree in all of them are the same experiment. unset: its text in rows that were
    written before the column was known. beside: the column that it follows in the report, if not the one before it.
    """

    name: str
    label: str
    format: str = '.6g'
    better: str = ''
    meaning: str = ''
    title: str = ''
    symbol: str = ''
    error: bool = False
    tradeoff: int | None = None
    costs: bool = False
    report: bool = True
    printed: bool = False
    identity: bool = False
    unset: str = ''
    beside: str = ''

    @property
    def arrow(self):
        return {'lower': '↓', 'higher': '↑', '': ''}[self.better]

    @property
    def axis(self):
        return f'{self.title or self.label} {self.arrow}'.strip()


# fmt: off
_TABLE = (  # in the order of results.csv
    Column('date', 'date', '', meaning='start of the evaluation, UTC', report=False),
    Column('samples', 'samples from', '', meaning='file or folder of the samples, if not drawn here', report=False,
           identity=True),
    Column('step', 'step', ',.0f', meaning='training step of the checkpoint', report=False, identity=True),
    Column('sampler', 'sampler', '', tradeoff=9, identity=True),
    Column('num_steps', 'steps', ',.0f', meaning='steps of the sampler', title='steps T', symbol='T', tradeoff=8,
           identity=True),
    Column('guidance_weight', 'w', 'g', meaning='guidance weight; 0 is no guidance',
           title='guidance weight w', symbol='w', tradeoff=0, costs=True, identity=True),
    Column('classifier_weight', 'c', 'g', meaning='weight of the classifier’s gradient; 0 is none',
           title='classifier weight c', symbol='c', costs=True, identity=True),
    Column('fid', 'FID', 'z.3f', 'lower', 'Fréchet inception distance to the reference',
           error=True, tradeoff=1, printed=True),
    Column('fid_infinity', 'FID∞', 'z.3f', 'lower', 'FID extrapolated to infinitely many samples'),
    Column('sfid', 'sFID', 'z.3f', 'lower', 'FID of spatial features', printed=True),
    Column('inception_score', 'IS', '.3f', 'higher', 'Inception score',
           title='Inception score', error=True, tradeoff=2, printed=True),
    Column('precision', 'precision', '.3f', 'higher', 'share of the samples within the reference’s manifold',
           error=True, tradeoff=3, printed=True),
    Column('recall', 'recall', '.3f', 'higher', 'share of the reference within the samples’ manifold',
           error=True, tradeoff=4, printed=True),
    Column('kernel_distance', 'KID', 'z.5f', 'lower', 'unbiased squared kernel distance', error=True),
    Column('accuracy', 'accuracy', '.4f', 'higher', 'share of the samples that the judge puts into their class',
           tradeoff=5, printed=True),
    Column('spread', 'spread', '.3f', meaning='root mean squared distance to the class mean of the features',
           tradeoff=6, printed=True),
    Column('num_samples', 'samples', ',.0f', meaning='number of samples', tradeoff=7, identity=True),
    Column('seed', 'seed', '.0f', tradeoff=10, report=False, identity=True),
    Column('network_evaluations', 'evaluations', ',.0f', meaning='evaluations of the network per image', costs=True),
    Column('classifier_gradients', 'gradients', ',.0f', meaning='gradients of the classifier per image', costs=True),
    Column('seconds_per_image', 's / image', '.3g', meaning='seconds per image', costs=True),
    Column('judge', 'judge', '', costs=True, report=False, identity=True),
    Column('reference', 'reference', '', report=False),
    Column('reference_sha256', 'reference sha256', '', costs=True, report=False, identity=True),
    Column('samples_sha256', 'samples sha256', '', report=False),
    Column('guidance', 'guidance', '', meaning='config.guidance.function; your own has a hash of its module',
           costs=True, report=False, identity=True),
    *(Column(name, name.replace('_', ' '), spec, meaning=meaning, report=False, identity=True)
      for name, spec, meaning in (
          ('folder', '', 'config.eval.folder'),
          ('classifier', '', 'the classifier that guides: its workdir, its step and a hash of its parameters'),
          ('classifier_form', '', 'config.guidance.classifier_form, if a classifier guides'),
          ('clip_first', '', 'config.guidance.clip_first, if a classifier guides'),
          ('spacing', '', 'config.sample.spacing'),
          ('v', 'g', 'config.sample.v, if the sampler is ancestral and the variance not learned'),
          ('eta', 'g', 'config.sample.eta, if the sampler is ddim'),
          ('clip_x', '', 'config.sample.clip_x, or clip_percentile'),
          ('label_order', '', 'config.sample.label_order'),
          ('dtype', '', 'config.model.dtype'),
          ('ema_decay', 'g', 'config.optim.ema_decay'),
          ('model_sha256', '', 'hash of the parameters'),
          ('nearest_k', '.0f', 'config.eval.nearest_k'),
          ('split_images', '.0f', 'config.eval.split_images'),
      )),
    # after all others, since users read the files by place
    Column('interval', 'interval', '', meaning='config.guidance.interval, in λ', identity=True),
    Column('variant', 'variant', '', meaning='name in config.eval.variants', tradeoff=11, costs=True, identity=True),
    Column('overrides', 'changes', '', meaning='what the variant changes in the config', report=False, identity=True),
    Column('grid', 'grid', '', meaning='config.sample.grid, with its ends and rho', report=False, identity=True),
    Column('churn', 'churn', '', meaning='config.sample.churn, churn_interval and churn_noise, if the sampler is heun',
           report=False, identity=True),
    Column('weak', 'weak model', '', meaning='the weak model: its workdir, its step and a hash of its parameters',
           report=False, identity=True),
    Column('density', 'density', '.3f', 'higher', 'mean number of the reference’s balls around a sample, over k',
           error=True, tradeoff=12, beside='recall'),
    Column('coverage', 'coverage', '.3f', 'higher', 'share of the reference’s balls with a sample in them',
           error=True, tradeoff=13, beside='density'),
    Column('vendi', 'Vendi', '.3f', 'higher', 'Vendi score: how many different samples there seem to be',
           error=True, tradeoff=14, beside='coverage'),
    Column('memorised', 'memorised', '.4f', 'lower',
           'share of the samples as close to a training image as the closest 1% of held-out images are',
           error=True, tradeoff=15, printed=True, beside='spread'),
    Column('training_distance', 'distance to training', '.3f',
           meaning='median distance to the nearest training image, over that of held-out images; below 1: closer',
           error=True, tradeoff=16, beside='memorised'),
    Column('coverage_k', 'coverage k', '.0f', meaning='config.eval.coverage_k', report=False, identity=True, unset='5'),
    Column('held_out', 'held out', '', meaning='config.eval.held_out', report=False, identity=True),
    Column('parameters', 'parameters', '', meaning="'ema', their average; 'post-hoc', one of another length; or 'raw'",
           report=False, identity=True, unset='ema'),
    Column('ema_length', 'EMA length', 'g', meaning='sigma_rel of the average that is made of snapshots',
           title='EMA length σ_rel', identity=True),
    Column('weak_ema_length', 'weak EMA length', 'g', meaning='that of the weak model',
           title='EMA length σ_rel of the weak model', identity=True),
    Column('lower_order_final', 'lower order final', '', meaning='config.sample.lower_order_final where it is False',
           report=False, identity=True),
)
# fmt: on
_BY_NAME = {each.name: each for each in _TABLE}


def _report_order():
    """Return the names of the report's columns: the variant's, then those of the table, each at its place."""
    names = []
    for each in (each for each in _TABLE if each.report and each.name != 'variant'):
        names.insert(names.index(each.beside) + 1 if each.beside else len(names), each.name)
    return 'variant', *names


_OF_RANKINGS = {
    each.name: each
    for each in (
        Column('rank', '#', '.0f', meaning='place by FID'),
        Column('tie', 'tie', '', meaning='yes: it cannot be told from the first'),
        Column(
            'fid_above', 'above the first', 'z.3f', 'lower', 'FID less that of the first, with its error', error=True
        ),
        Column('search_fid', 'FID in the search', 'z.3f', 'lower', 'FID that the search found, too low on average'),
    )
}

TRADEOFF = tuple(
    each.name for each in sorted((each for each in _TABLE if each.tradeoff is not None), key=lambda each: each.tradeoff)
)
COSTS = tuple(each.name for each in _TABLE if each.costs)
RESULTS = tuple(name for each in _TABLE for name in (each.name, *[f'{each.name}_error'] * each.error))
IDENTITY = tuple(each.name for each in _TABLE if each.identity)
IN_REPORT = _report_order()
NUMERIC = frozenset(each.name for each in _TABLE if each.format)
OVER = ('guidance_weight', 'classifier_weight', 'num_steps')  # what curves may be drawn over, the first that varies
SYMBOLS = {name: _BY_NAME[name].symbol for name in OVER}


def column(name):
    """Return the column of this name; one that is not in the table is shown as it is."""
    return _BY_NAME.get(name) or _OF_RANKINGS.get(name) or Column(name, str(name).replace('_', ' '))


def summary_line(row):
    """Return 'FID 1.042  IS 9.775  precision 0.937 ...': the measures that a reader looks for first."""
    return '  '.join(
        f'{each.label} {row[each.name]:{each.format}}' for each in _TABLE if each.printed and each.name in row
    )
