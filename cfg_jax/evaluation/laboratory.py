"""The figures of the laboratory: arrays and rows of `experiments` to pictures in the one style (`style.Picture`)."""

import numpy as np

from cfg_jax.evaluation import style
from cfg_jax.evaluation.style import PALETTE

_MARKERS = 'os^DvP'
_LINES = ('-', '--', ':', '-.', '-', '--')
_LEAST = 1e-9  # on logarithmic axes smaller values are drawn here
_HIGH = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
_NAMES = {'target': 'target p(x|c) p(c|x)^w', 'ancestral': 'guided, ancestral', 'ddim': 'guided, DDIM'}
_LOOKS = {'target': ('c5', 'o'), 'ancestral': ('c0', 's'), 'ddim': ('c1', '^')}


# ---------------------------------------------------------------- parts of several figures


def _color(number):
    return PALETTE[f'c{number % style.NUM_COLORS}']


def _square(axis, reach, title='', *, x=True, y=True):
    """Make an axis a square of the plane, from -reach to reach in data units."""
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect='equal')
    axis.grid(visible=False)
    ticks = [-np.floor(reach), 0, np.floor(reach)]
    axis.set_xticks(ticks), axis.set_yticks(ticks)
    axis.tick_params(axis='y', pad=3)
    axis.tick_params(labelbottom=x, labelleft=y)
    axis.set_title(title, pad=5)
    if x:
        axis.set_xlabel('x₁')
    if y:
        axis.set_ylabel('x₂')


def _mixed(densities, *, strength=0.85):
    """Return an image [P, P, 3] of densities [C, P, P], each in its class's colour on white."""
    image = np.ones((*densities.shape[1:], 3))
    for number, density in enumerate(densities):
        color = np.array([int(_color(number)[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0
        image *= 1.0 - strength * (density / density.max())[..., None] * (1.0 - color)
    return image


def _density(axis, grid, densities):
    """Draw densities [C, P, P], a colour for each, with contours at 5, 30 and 70% of their peaks."""
    reach = grid.line[-1] + (grid.line[1] - grid.line[0]) / 2
    axis.imshow(_mixed(densities), extent=(-reach, reach, -reach, reach), origin='lower', interpolation='bilinear')
    for number, density in enumerate(densities):
        levels = np.array([0.05, 0.3, 0.7]) * density.max()
        axis.contour(grid.line, grid.line, density, levels, colors=_color(number), linewidths=0.8)


def _cloud(axis, x, number, *, size=2.0):
    axis.scatter(*x.T[:2], s=size, color=_color(number), alpha=0.5, linewidths=0, rasterized=True)


def _values(rows, quantity, method, over):
    """Return (places, values, errors) of the rows of a quantity and a method, in order of the column `over`."""
    chosen = sorted(
        (row for row in rows if row['quantity'] == quantity and row['method'] == method), key=lambda row: row[over]
    )
    return np.array([(row[over], row['value'], row.get('error', 0.0)) for row in chosen]).T


def _reach(densities, grid, x, *, share=0.004):
    """Return how far from 0 densities [..., P, P] reach that share of their peaks, and most samples x [..., n, 2]."""
    high = densities.reshape(-1, *densities.shape[-2:])
    high = (high > share * high.max(axis=(1, 2), keepdims=True)).any(axis=0)
    of_samples = np.quantile(np.abs(x).reshape(-1, x.shape[-2] * 2), 0.9995, axis=1).max()
    return float(max(np.abs(grid.line)[high.any(axis=0) | high.any(axis=1)].max(), of_samples))


# ---------------------------------------------------------------- the CFG paper's figure 2


def densities_and_clouds(grid, densities, clouds, weights):
    """Draw the paper's figure 2: each class's guided target, and samples of guidance below, as w grows.

    densities: [weights, classes, P, P]. clouds: [weights, classes, n, 2].
    """
    columns = len(weights)
    reach = _reach(densities, grid, clouds)
    with style.figure((680, 680 / columns * 2 + 60), rows=2, columns=columns, squeeze=False) as (figure, axes):
        for column, weight in enumerate(weights):
            first = column == 0
            _density(axes[0, column], grid, densities[column])
            _square(axes[0, column], reach, f'w = {weight:g}', x=False, y=first)
            for number, x in enumerate(clouds[column]):
                _cloud(axes[1, column], x, number)
            _square(axes[1, column], reach, y=first)
        axes[0, 0].set_ylabel('target density\nx₂'), axes[1, 0].set_ylabel('guided samples\nx₂')
        return style.picture(figure)


# ---------------------------------------------------------------- vector fields and trajectories


def fields_and_paths(grid, logsnrs, densities, points, fields, paths, *, weight):
    """Draw the guided score at three λ over the density of z, and DDIM's way from noise to data for several w.

    densities: [λ, P, P], p(z_λ | c). points [n, 2], fields [λ, n, 2]: where the score was taken. weight: w of the
    fields. paths: {w: z [T + 1, n, 2]}.
    """
    reach = 3.6
    with style.figure((680, 560), rows=2, columns=3) as (figure, axes):
        for column, logsnr in enumerate(logsnrs):
            axis = axes[0, column]
            _density(axis, grid, densities[column][None])
            length = np.linalg.norm(fields[column], axis=1, keepdims=True)
            arrows = fields[column] / np.maximum(length, 1e-9) * np.sqrt(length / length.max())
            axis.quiver(*points.T, *arrows.T, angles='xy', scale=22, width=0.006, color=PALETTE['ink'])
            _square(axis, reach, f'score, λ = {logsnr:g}, w = {weight:g}'.replace('-', '−'), x=False, y=column == 0)
            axis.set_ylabel('z₂' if column == 0 else '')
        for column, (weight, z) in enumerate(paths.items()):
            axis = axes[1, column]
            for path in z.swapaxes(0, 1):
                axis.plot(*path.T, color=_color(0), linewidth=0.7, alpha=0.6)
            axis.scatter(*z[0].T, s=12, facecolors='none', edgecolors=PALETTE['soft'], linewidths=1, label='noise')
            axis.scatter(*z[-1].T, s=12, color=PALETTE['c1'], zorder=3, label='sample')
            _square(axis, reach, f'DDIM, w = {weight:g}', y=column == 0)
            axis.set_xlabel('z₁'), axis.set_ylabel('z₂' if column == 0 else '')
        handles, labels = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower left', ncols=2)
        return style.picture(figure)


# ---------------------------------------------------------------- the target against what guidance yields


def target_and_yield(grid, densities, drawn, weights):
    """Draw the target's density, that of guided DDIM samples, and all marginals along x₂, at each of the weights.

    densities: [weights, P, P]. drawn: {'ancestral', 'ddim': x [weights, n, 2]}.
    """
    columns, line = len(weights), grid.line
    reach = _reach(densities, grid, drawn['ddim'])
    edges = np.append(line[::4] - (line[1] - line[0]) / 2, line[-1] + (line[1] - line[0]) / 2)
    with style.figure((680, 680 / columns * 3 + 60), rows=3, columns=columns, squeeze=False) as (figure, axes):
        for column, weight in enumerate(weights):
            first = column == 0
            _density(axes[0, column], grid, densities[column][None])
            _square(axes[0, column], reach, f'w = {weight:g}', x=False, y=first)
            counts, _, _ = np.histogram2d(*drawn['ddim'][column].T[::-1], bins=[edges, edges], density=True)
            axes[1, column].imshow(
                _mixed(counts[None]), extent=(edges[0], edges[-1]) * 2, origin='lower', interpolation='bilinear'
            )
            _square(axes[1, column], reach, y=first)
            axis, middles = axes[2, column], (edges[1:] + edges[:-1]) / 2
            marginal = densities[column].sum(axis=1) * (line[1] - line[0])
            axis.fill_between(line, marginal, color=PALETTE['faint'])
            axis.plot(line, marginal, color=PALETTE['c5'], label=_NAMES['target'])
            for name, x in drawn.items():
                height, _ = np.histogram(x[column][:, 1], bins=edges, density=True)
                style_of = {'ancestral': '--', 'ddim': '-'}[name]
                axis.plot(middles, height, style_of, color=PALETTE[_LOOKS[name][0]], label=_NAMES[name])
            axis.set(xlim=(-reach, reach), ylim=(0, None), xlabel='x₂')
            axis.set_xticks([-np.floor(reach), 0, np.floor(reach)])
            axis.tick_params(axis='y', pad=3)
        top = max(axis.get_ylim()[1] for axis in axes[2])
        for column, axis in enumerate(axes[2]):
            axis.set_ylim(0, top), axis.tick_params(labelleft=column == 0)
        for axis, name in zip(axes[:, 0], ('target\nx₂', 'guided, DDIM\nx₂', 'density of x₂')):
            axis.set_ylabel(name)
        handles, labels = axes[2, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower left', ncols=3)
        return style.picture(figure)


def difference(rows):
    """Draw the numbers of `experiments.target_and_yield` over w: mean, deviation, and energy distance."""
    quantities = {
        'mean along the axis': 'mean of x₂',
        'deviation along the axis': 'deviation of x₂',
        'energy distance to the target': 'energy distance to target',
    }
    with style.figure((680, 260), columns=3) as (figure, axes):
        for axis, (quantity, title) in zip(axes, quantities.items()):
            for method in _NAMES:
                found = _values(rows, quantity, method, 'weight')
                if len(found):
                    color, marker = _LOOKS[method]
                    axis.errorbar(
                        *found[:2], found[2], color=PALETTE[color], marker=marker, capsize=3, label=_NAMES[method]
                    )
            axis.set_title(title)
            axis.set_xlabel('guidance weight w'), axis.tick_params(axis='y', pad=4)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend([each[0] for each in handles], labels, loc='outside lower left', ncols=3)
        return style.picture(figure)


# ---------------------------------------------------------------- the forms of guidance

_SHOWN = ('no guidance', 'rule=linear', 'rule=apg', 'schedule=power', 'interval=(1, 3)')  # their samples are drawn
_FORM_COLORS = {'rule': 'c0', 'interval': 'c1', 'schedule': 'c2', 'weak': 'c3', 'momentum': 'c4'}  # others: grey


def forms(grid, density, rows, drawn, *, num_points=1000):
    """Draw samples of some forms over the target, and the energy distance of every form, the closest at the top.

    density: of the target at the last of the weights, [P, P]. rows, drawn: of `forms.compare`.
    """
    weights = sorted({row['weight'] for row in rows})
    clouds = {name: drawn[name][-1][:num_points] for name in _SHOWN}
    low, high = np.quantile(np.concatenate(list(clouds.values())), [0.001, 0.999], axis=0)
    middle, half = (low + high) / 2, 0.55 * (high - low).max()
    mosaic = [[name for name in clouds for _ in weights], [weight for weight in weights for _ in clouds]]
    with style.figure((680, 580), mosaic=mosaic, height_ratios=[1, 2.7]) as (figure, axes):
        for name, x in clouds.items():
            axis = axes[name]
            axis.scatter(*x.T, s=2.0, color=_form_color(name), alpha=0.5, linewidths=0, rasterized=True)
            levels = np.array([0.05, 0.3, 0.7]) * density.max()
            axis.contour(*[grid.line] * 2, density, levels, colors=PALETTE['ink'], linewidths=0.8)
            _square(axis, half, name, y=name == _SHOWN[0])
            axis.set(xlim=middle[0] + [-half, half], ylim=middle[1] + [-half, half], xticks=(-1, 0, 1))
            axis.set_yticks(range(int(np.ceil(middle[1] - half)), int(middle[1] + half) + 1))
        axes[_SHOWN[0]].set_ylabel(f'w = {weights[-1]:g}\nx₂')
        for weight in weights:
            _distances(axes[weight], [row for row in rows if row['weight'] == weight])
            axes[weight].set_title(f'energy distance to target, w = {weight:g}', pad=5)
        return style.picture(figure)


def _form_color(name):
    return PALETTE[_FORM_COLORS.get(name.split('=')[0], 'c5')]


def _distances(axis, rows, *, least=1e-3, greatest=10.0):
    """Draw the energy distance of each form, sorted, with a standard error to either side; smaller ones at `least`."""
    found = {row['method']: (row['value'], row['error']) for row in rows
             if row['quantity'] == 'energy distance to the target'}  # fmt: skip
    names = sorted(found, key=lambda name: found[name][0])
    for place, name in enumerate(names):
        value, error = found[name]
        low, shown, high = np.clip([value - error, value, value + error], least, None)
        look = {'color': _form_color(name)}
        axis.plot([low, high], [place] * 2, **look)
        axis.plot(shown, place, 'D' if name in ('no guidance', 'rule=linear') else 'o', markersize=6, **look)
        right = shown * shown < least * greatest  # of the point is more room
        place_of = {'xytext': (6 if right else -6, 0), 'ha': 'left' if right else 'right', 'va': 'center'}
        text = name.replace('-', '−')
        axis.annotate(text, (high if right else low, place), textcoords='offset points', **place_of, **look)
    axis.set(xscale='log', xlim=(least * 0.8, max(greatest, 1.2 * high)), ylim=(len(names) - 0.5, -0.5), yticks=())
    axis.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axis.minorticks_off()
    axis.grid(visible=True, axis='x')


# ---------------------------------------------------------------- how fast solvers converge

_SOLVER_NAMES = {'ddim': 'DDIM', 'dpmpp_2m': 'DPM-Solver++ 2M', 'unipc_2': 'UniPC-2', 'heun': 'Heun'}


def solvers(rows):
    """Draw each solver's error over its steps and over its calls of the denoiser, with the fitted slopes."""
    errors = {row['method']: _values(rows, 'error of x', row['method'], 'steps') for row in rows}
    floor = errors.pop('float32')[1, 0]
    calls = {method: _values(rows, 'calls of the denoiser', method, 'steps')[1] for method in errors}
    slopes = {(row['quantity'], row['method']): row['value'] for row in rows}
    with style.figure((680, 400), columns=2, sharey=True) as (figure, axes):
        for axis, over in zip(axes, ('steps', 'calls')):
            for number, (method, (steps, values, bars)) in enumerate(errors.items()):
                slope = slopes.get((f'slope over {over}', method))
                label = _SOLVER_NAMES[method] + ('' if slope is None else f', slope {slope:.2f}'.replace('-', '−'))
                look = {'color': _color(number), 'marker': _MARKERS[number], 'linestyle': _LINES[number]}
                axis.errorbar(steps if over == 'steps' else calls[method], values, bars, **look, label=label)
            axis.axhline(floor, color=PALETTE['c5'], linewidth=1, linestyle=':')
            axis.set(xscale='log', yscale='log')
            ticks = sorted({*calls['ddim'], *(calls['ddim'][-1:] * 2 if over == 'calls' else ())})
            axis.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
            axis.yaxis.set_major_formatter(lambda value, _: '10' + str(round(np.log10(value))).translate(_HIGH))
            axis.minorticks_off()
            axis.tick_params(axis='y', pad=4)
            axis.set_xlabel({'steps': 'steps', 'calls': 'calls of the denoiser'}[over])
            handles, labels = axis.get_legend_handles_labels()
            axis.legend([each[0] for each in handles], labels, loc='upper left', bbox_to_anchor=(0, -0.16))
        axes[0].set_title('root mean square error of x', pad=5)
        axes[0].annotate('rounding of float32', (ticks[0], floor), xytext=(0, -15), textcoords='offset points',
                         color=PALETTE['c5'])  # fmt: skip
        return style.picture(figure)


# ---------------------------------------------------------------- conditional with w, unconditional with w + 1


def either_side(rows, clouds, *, weight, reach=3.2):
    """Draw how far apart the two ways of classifier guidance are, over λ, and what trained networks draw by each.

    rows: of `experiments.from_either_side`. clouds: the conditional's and the unconditional's samples [2, n, 2].
    """
    titles = f'conditional, w = {weight:g}', f'unconditional, w = {weight + 1:g}'
    with style.figure((680, 290), columns=3, width_ratios=[1.3, 1, 1]) as (figure, axes):
        _over_logsnr(axes[0], rows, 'relative difference of eps')
        axes[0].set_title('|eps − eps′| / |eps|', pad=5)
        for number, (axis, x, title) in enumerate(zip(axes[1:], clouds, titles)):
            _cloud(axis, x, 0)
            _square(axis, reach, title, y=number == 0)
        axes[1].set_ylabel('samples of the networks\nx₂')
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower left', ncols=2)
        return style.picture(figure)


def _over_logsnr(axis, rows, quantity):
    """Draw a quantity over λ, a curve for each method, on a logarithmic scale."""
    for number, method in enumerate(dict.fromkeys(row['method'] for row in rows)):
        logsnr, values, errors = _values(rows, quantity, method, 'logsnr')
        shown = np.maximum(values, _LEAST)
        axis.plot(logsnr, shown, _LINES[number % 6], marker=_MARKERS[number % 6], color=_color(number), label=method)
        axis.fill_between(logsnr, np.maximum(shown - errors, _LEAST), shown + errors, color=_color(number), alpha=0.2)
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter(lambda value, _: '10' + str(round(np.log10(value))).translate(_HIGH))
    axis.minorticks_off()
    axis.set_xlabel('λ, log signal-to-noise ratio'), axis.tick_params(axis='y', pad=4)


# ---------------------------------------------------------------- scaled scores and less noise


def baselines(grid, density, rows, drawn, strengths, *, shown=3, num_points=1500):
    """Draw samples of guidance and of the ineffective baselines, and the class's probability over their spread.

    density: of all classes, [P, P]. rows, drawn: of `experiments.baselines`. strengths: {method: strengths}. shown: the
    number of the strength whose samples are drawn.
    """
    methods, reach = list(drawn), 2.4
    names = {method: method.replace('noise of the steps', 'step noise').replace('noise at the start', 'start noise')
             for method in methods}  # fmt: skip
    places = {'ha': ['center', 'right', 'center', 'left'], 'xytext': [(0, 7), (-7, 5), (0, -19), (5, -15)]}
    mosaic = [['data', *methods[1:], methods[0]], ['chart'] * (len(methods) + 1)]
    with style.figure((680, 540), mosaic=mosaic, height_ratios=[1, 2]) as (figure, axes):
        clouds = {'data': (drawn[methods[0]][0], 5, 'p(x|c)')}
        for number, method in enumerate(methods):
            short = names[method].replace('guidance, w', 'w =').replace(' scaled by', ' ×')
            clouds[method] = drawn[method][shown], number, f'{short} {strengths[method][shown]:g}'
        for name, (x, number, title) in clouds.items():
            axes[name].contour(*[grid.line] * 2, density, np.array([0.1, 0.5]) * density.max(), colors=PALETTE['c5'],
                               linewidths=0.5, alpha=0.6)  # fmt: skip
            _cloud(axes[name], x[:num_points], number)
            _square(axes[name], reach, title, y=name == 'data')
        chart = axes['chart']
        for number, method in enumerate(methods):
            found = {quantity: _values(rows, quantity, method, 'strength')
                     for quantity in ('spread', 'class probability')}  # fmt: skip
            (strength, x, x_error), (_, y, y_error) = found.values()
            look = {'color': _color(number), 'marker': _MARKERS[number], 'linestyle': _LINES[number]}
            chart.errorbar(x, y, y_error, x_error, **look, capsize=2, label=names[method])
            for at in zip(strength, x, y):
                if at[0] != strengths[method][0]:
                    place = {key: value[number] for key, value in places.items()}
                    chart.annotate(f'{at[0]:g}', at[1:], textcoords='offset points', color=_color(number), **place)
        chart.set_xlabel("spread, as a share of the data's"), chart.invert_xaxis()
        chart.set_title('mean p(c|x) of the samples; the numbers are w, or the factor', pad=5)
        chart.tick_params(axis='y', pad=4)
        handles, labels = chart.get_legend_handles_labels()
        figure.legend([each[0] for each in handles], labels, loc='outside lower left', ncols=2)
        return style.picture(figure)


# ---------------------------------------------------------------- is the guided field a gradient?


def antisymmetry(rows):
    """Draw how far each field is from a gradient, over λ. rows: of `experiments.antisymmetry`."""
    with style.figure((680, 420)) as (figure, axis):
        _over_logsnr(axis, rows, 'antisymmetric part')
        axis.set_title('|J − Jᵀ| / |J + Jᵀ|, J = ∂eps/∂z: 0 for a gradient; less than 10⁻⁹ drawn there', pad=5)
        figure.legend(loc='outside lower left', ncols=2)
        return style.picture(figure)
