"""What the metrics of 50,000 images cost: seconds and peak memory, next to numpy's and scipy's straightforward way.

    python benchmarks/metrics.py                          (some 15 minutes on 2 cores)
    python benchmarks/metrics.py --only=root,statistics

Features are 2048 rectified mixtures of 64 factors, float32, in files; each measurement is a process of its own that
reads them, and its times are without the reading: of the clock and, where other programs use the cores too, of the
CPU, all threads together. The peak is the process's, features and libraries included, in MiB.

Predicted before measuring, for N = 50,000 generated, M = 10,000 real, D = 2048, on 2 cores that give some 40 GFLOPS in
float64 and 80 in float32 (products), n = D:

- statistics: a symmetric product, N D² = 2.1e11, 5 s, against the full one of np.cov, 4.2e11, 10 s; 0.7 GiB, for a
  block at a time is float64, against 2.5 GiB.
- root: Cholesky n³/3, two products 4 n³, eigenvalues 4/3 n³: 4.9e10, some 3 s, as half of the last is bound by memory;
  sqrtm's Schur form some 25 n³ = 2.1e11, nearly all bound by memory: 30 to 60 s. A ratio of 10.
- precision_recall: N² D (half of the pairs, each for both) + M² D + 2 N M D = 7.4e12 in float32, 95 s; straightforward
  in float64, by the same formula in blocks, 2 N² D + 2 M² D + 4 N M D = 1.5e13, 370 s. 1.5 GiB: the features and a
  float32 copy. scipy's cdist, one thread, 3 operations a pair and dimension: over an hour, so it is measured for
  some rows and scaled.

Measured (clock; peak; the cores shared with other work, so that ratios hold better than seconds): statistics 3.9 s and
0.8 GiB to 7.1 s and 1.4 GiB, though no less CPU time, for OpenBLAS's symmetric product is slower an operation; root
3.5 s to 27.4 s; FID 4.8 s to 26.7 s; precision_recall 98 s and 1.5 GiB to 336 s and 2.4 GiB, by cdist 3,440 s.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

DIMENSIONS = 2048
ROWS = 40  # that cdist is measured for


def make_features(path, count, seed):
    import numpy as np

    mixing = np.random.default_rng(0).standard_normal((64, DIMENSIONS), np.float32)
    mixing /= 8.0 * np.sqrt(np.arange(1, 65, dtype=np.float32))[:, None]
    rng = np.random.default_rng(seed)
    features = np.empty((count, DIMENSIONS), np.float32)
    for start in range(0, count, 4096):
        rows = min(4096, count - start)
        factors, noise = (rng.standard_normal((rows, width), np.float32) for width in (64, DIMENSIONS))
        features[start : start + rows] = np.maximum(0.3 + factors @ mixing + 0.1 * noise, 0.0)
    np.save(path, features)


# ---------------------------------------------------------------- the straightforward ways


def straightforward_statistics(features):
    import numpy as np

    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)


def straightforward_distance(mean_a, covariance_a, mean_b, covariance_b):
    import numpy as np
    import scipy.linalg

    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a + covariance_b - 2.0 * root))


def straightforward_precision_recall(generated, real, k=3, block=1024):
    """By |a|² + |b|² - 2ab in float64, in blocks of rows; distances are not settled further."""
    import numpy as np

    def distances(points, centres, squares):
        for start in range(0, len(points), block):
            rows = points[start : start + block]
            result = rows @ centres.T
            result *= -2.0
            result += squares
            result += np.square(rows).sum(1)[:, None]
            yield result

    a, b = generated.astype(np.float64), real.astype(np.float64)
    squares = {id(x): np.square(x).sum(1) for x in (a, b)}
    radii = {
        id(x): np.concatenate([np.partition(d, k, axis=1)[:, k].copy() for d in distances(x, x, squares[id(x)])])
        for x in (a, b)
    }
    inside = [
        np.concatenate([(d <= radii[id(y)]).any(1) for d in distances(x, y, squares[id(y)])]).mean()
        for x, y in ((a, b), (b, a))
    ]
    return [float(each) for each in inside]


def cdist_seconds(generated, real):
    """Seconds of scipy's cdist and numpy's partition over all pairs, from ROWS rows of each kind."""
    import numpy as np
    from scipy.spatial.distance import cdist

    total = 0.0
    for points, centres, radii in (
        (generated, generated, 1),
        (real, real, 1),
        (generated, real, 0),
        (real, generated, 0),
    ):
        centres = centres.astype(np.float64)
        start = time.perf_counter()
        distances = cdist(points[:ROWS], centres)
        distances = np.partition(distances, 3, axis=1) if radii else (distances <= 1.0).any(1)
        total += (time.perf_counter() - start) * len(points) / ROWS
    return total


# ---------------------------------------------------------------- one measurement


def run(what, ours, folder):
    """One measurement: {'seconds', 'cpu', 'peak', 'result'}."""
    import numpy as np

    from cfg_jax import metrics, runtime

    runtime.configure()
    generated = None if what == 'root' else np.load(folder / 'generated.npy')
    gaussian = tuple(np.load(folder / f'{name}.npy') for name in ('mean', 'covariance'))
    real = np.load(folder / 'real.npy') if what in ('precision_recall', 'kernel', 'cdist') else None
    start, cpu = time.perf_counter(), time.process_time()
    if what == 'statistics':
        mean, covariance = (metrics.feature_statistics if ours else straightforward_statistics)(generated)
        result = [float(np.linalg.norm(mean)), float(np.linalg.norm(covariance))]
    elif what == 'root':
        other = gaussian[0] + 0.01, np.ascontiguousarray(gaussian[1][::-1, ::-1])
        result = (metrics.gaussian_distance if ours else straightforward_distance)(*other, *gaussian)
    elif what == 'frechet':
        statistics = metrics.feature_statistics if ours else straightforward_statistics
        result = (metrics.gaussian_distance if ours else straightforward_distance)(*statistics(generated), *gaussian)
    elif what == 'precision_recall':
        result = (metrics.precision_recall if ours else straightforward_precision_recall)(generated, real)
    elif what == 'cdist':
        result = cdist_seconds(generated, real)
    elif what == 'frechet_error':
        result = metrics.frechet_distance_error(generated, *gaussian)
    elif what == 'extrapolation':
        line = metrics.extrapolated_frechet_distance(generated, *gaussian)
        result = [line.value, line.distances.tolist()]
    elif what == 'kernel':
        result = metrics.kernel_distance_subsets(generated, real, num_subsets=20)
    # not ru_maxrss, which begins with that of the process that started this one
    peak = int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) / 1024
    seconds = time.perf_counter() - start, time.process_time() - cpu
    return {'seconds': seconds[0], 'cpu': seconds[1], 'peak': peak, 'result': result}


# what: (name in the table, whether there is a straightforward way)
MEASUREMENTS = {
    'statistics': ('mean and covariance (np.cov)', True),
    'root': ('square root and distance (scipy.linalg.sqrtm)', True),
    'frechet': ('FID against given statistics (both)', True),
    'precision_recall': ('precision and recall (float64 blocks)', True),
    'frechet_error': ("FID's standard error", False),
    'extrapolation': ('FID extrapolated, 6 points', False),
    'kernel': ('KID, 20 subsets of 1,000', False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=Path('/tmp/cfg_jax_benchmark_metrics'), help='for the features')
    parser.add_argument('--generated', type=int, default=50_000)
    parser.add_argument('--real', type=int, default=10_000)
    parser.add_argument('--only', default=','.join(MEASUREMENTS), help='some of them, by commas')
    parser.add_argument('--measure', nargs=2, metavar=('WHAT', 'WHOSE'), help=argparse.SUPPRESS)  # one process
    options = parser.parse_args()
    folder = options.folder / f'{options.generated}_{options.real}'
    if options.measure:
        print(json.dumps(run(options.measure[0], options.measure[1] == 'ours', folder)))
        return

    if not folder.exists():
        import numpy as np

        folder.mkdir(parents=True)
        for seed, (name, count) in enumerate((('real', options.real), ('generated', options.generated)), 1):
            make_features(folder / f'{name}.npy', count, seed)
        mean, covariance = straightforward_statistics(np.load(folder / 'real.npy'))
        np.save(folder / 'mean.npy', mean)
        np.save(folder / 'covariance.npy', covariance)

    root = Path(__file__).parent.parent

    def one(what, whose):
        sizes = ['--generated', str(options.generated), '--real', str(options.real), '--folder', str(options.folder)]
        command = [sys.executable, __file__, *sizes, '--measure', what, whose]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def cells(measured):
        return f'{measured["seconds"]:7.1f}s {measured["cpu"]:7.1f}s {measured["peak"]:6.0f}'

    print(f'{options.generated:,} and {options.real:,} features of {DIMENSIONS}, {os.cpu_count()} cores')
    heads = f'{"clock":>8} {"CPU":>8} {"MiB":>6}'
    print(f'{"ours, then the straightforward way":46} {heads}   {heads}   {"ratio: clock":>12} {"CPU":>6}', flush=True)
    for what in options.only.split(','):
        name, compared = MEASUREMENTS[what]
        ours = one(what, 'ours')
        print(f'{name:46} {cells(ours)}', end='   ', flush=True)
        if compared:
            other = one(what, 'theirs')
            clock, cpu = (other[key] / ours[key] for key in ('seconds', 'cpu'))
            print(f'{cells(other)}   {clock:12.1f} {cpu:6.1f}', end='')
        print(f'\n    {ours["result"]}' + (f'\n    {other["result"]}' if compared else ''), flush=True)
        if what == 'precision_recall':
            print(f"    scipy's cdist, from {ROWS} rows of each: {one('cdist', 'theirs')['result']:.0f}s", flush=True)


if __name__ == '__main__':
    main()
