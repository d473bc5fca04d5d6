"""stub"""

from cfg_jax.evaluation import results

_ABOUT = ('date', 'samples', 'step', 'seed', 'judge', 'reference', 'reference_sha256', 'samples_sha256')
IN_REPORT = tuple(key for key in results.RESULTS if not key.endswith('_error') and key not in _ABOUT)


def summary_line(row):
    shown = {'fid': 'FID', 'sfid': 'sFID', 'inception_score': 'IS'}
    shown |= {key: key for key in ('precision', 'recall', 'accuracy', 'spread')}
    return '  '.join(
        f'{label} {row[key]:.{4 if key == "accuracy" else 3}f}' for key, label in shown.items() if key in row
    )
