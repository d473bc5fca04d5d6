"""How the rows of an evaluation fall into curves."""

from cfg_jax.evaluation.columns import OVER, column
from cfg_jax.evaluation.values import has, is_missing, show


class Sweep:
    """The curves of an evaluation: the column they are drawn over, and the names that tell them apart.

    over: the column that varies along a curve; symbol: its letter, such as 'w'; varies: True if any column varies.
    curves: {name: indices of its rows, in the order of the weight}. styles: {name: number of its colour and marker}.
    naming: the columns that `full_name` states.

    A row with a 'variant' belongs to the curve of that name. Variants may be swept over different weights, and may be
    one point each.
    """

    def __init__(self, rows):
        varying = [name for name in OVER if _varies(rows, name)]
        self._named = any(map(_is_variant, rows))
        if self._named:  # what varies between variants, such as the steps, need not be told apart
            weights = [name for name in OVER if name != 'num_steps']
            groups = {}
            for row in rows:
                groups.setdefault(row.get('variant'), []).append(row)
            within = [name for name in OVER if any(_varies(group, name) for group in groups.values())]
            varying = list(dict.fromkeys([*within, *(name for name in varying if name in weights)]))
        self.varies = bool(varying)
        self.over = varying[0] if varying else OVER[0]
        self.symbol = column(self.over).symbol
        self._apart = [name for name in varying[1:] if name != 'num_steps']  # steps are named in any case
        columns = (self.over, *self._apart)
        places = [[row[name] if has(row, name) else 0 for name in columns] for row in rows]
        order = sorted(range(len(rows)), key=places.__getitem__)
        names = dict.fromkeys(map(self.name, rows))
        self.curves = {name: [index for index in order if self.name(rows[index]) == name] for name in names}
        self.styles = {name: style for style, name in enumerate(self.curves)}
        self.naming = {self.over, *(('variant',) if self._named else ('sampler', 'num_steps')), *self._apart}

    def name(self, row):
        """Return the name of the row's curve."""
        if self._named:
            return str(row['variant']) if _is_variant(row) else 'samples'
        parts = [] if is_missing(row.get('sampler')) else [str(row['sampler'])]
        if has(row, 'num_steps') and self.over != 'num_steps':
            parts.append(f'{show(row, "num_steps")[0]} steps')
        parts += [f'{column(name).symbol} = {show(row, name)[0]}' for name in self._apart]
        return ', '.join(parts) or 'samples'

    def over_of(self, rows):
        """Return the column that varies along a curve of these rows."""
        return next((name for name in (self.over, *self._apart) if _varies(rows, name)), self.over)

    def weight(self, row):
        """Return 'w = 0.3', or '' for images of unknown weight; of variants 'w = 0, c = 2' if both weights vary."""
        shown = [self.over, *(self._apart if self._named else ())]
        return ', '.join(f'{column(name).symbol} = {show(row, name)[0]}' for name in shown if has(row, name))

    def full_name(self, row):
        """Return 'w = 0.3, ddim, 32 steps', or 'samples' for images of unknown origin."""
        return ', '.join(filter(None, (self.weight(row), self.name(row))))


def _is_variant(row):
    return not is_missing(row.get('variant'))


def _varies(rows, name):
    return len({row[name] for row in rows if has(row, name)}) > 1
