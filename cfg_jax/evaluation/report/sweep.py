"""How the rows of an evaluation fall into curves."""

from cfg_jax.evaluation.columns import OVER, column
from cfg_jax.evaluation.values import has, is_missing, show


class Sweep:
    """The curves of an evaluation: the column they are drawn over, and the names that tell them apart.

    over: the column that varies along a curve; symbol: its letter, such as 'w'; varies: True if any column varies.
    curves: {name: indices of its rows, in the order of the weight}. styles: {name: number of its colour and marker}.
    naming: the columns that `full_name` states.
    """

    def __init__(self, rows):
        varying = [name for name in OVER if len({row[name] for row in rows if has(row, name)}) > 1]
        self.varies = bool(varying)
        self.over = varying[0] if varying else OVER[0]
        self.symbol = column(self.over).symbol
        self._apart = [name for name in varying[1:] if name != 'num_steps']  # steps are named in any case
        order = sorted(range(len(rows)), key=lambda index: rows[index][self.over] if has(rows[index], self.over) else 0)
        names = dict.fromkeys(map(self.name, rows))
        self.curves = {name: [index for index in order if self.name(rows[index]) == name] for name in names}
        self.styles = {name: style for style, name in enumerate(self.curves)}
        self.naming = {self.over, 'sampler', 'num_steps', *self._apart}

    def name(self, row):
        """Return the name of the row's curve."""
        parts = [] if is_missing(row.get('sampler')) else [str(row['sampler'])]
        if has(row, 'num_steps') and self.over != 'num_steps':
            parts.append(f'{show(row, "num_steps")[0]} steps')
        parts += [f'{column(name).symbol} = {show(row, name)[0]}' for name in self._apart]
        return ', '.join(parts) or 'samples'

    def weight(self, row):
        """Return 'w = 0.3', or '' for images of unknown weight."""
        if not has(row, self.over):
            return ''
        return f'{self.symbol} = {show(row, self.over)[0]}'

    def full_name(self, row):
        """Return 'w = 0.3, ddim, 32 steps', or 'samples' for images of unknown origin."""
        return ', '.join(filter(None, (self.weight(row), self.name(row))))
