"""Cost of the metrics of 50,000 images: seconds and peak memory, next to the straightforward way.

    python benchmarks/metrics.py                          (about 20 minutes on 2 cores)
    python benchmarks/metrics.py --only=root,statistics

Features are 2048 rectified mixtures of 64 factors, float32, in files. Each measurement is a process of its own that
reads them; the reading is not timed. Times are of the clock and, because other programs may share the cores, of the CPU
(all threads together). The peak is the whole process's, features and libraries included, in MiB.

Predicted before measuring, for N = 50,000 generated, M = 10,000 real, D = 2048, on 2 cores with about 40 GFLOPS in
float64 products, n = D:

- statistics: a symmetric product, N D² = 2.1e11, 5 s, against the full one of np.cov, 4.2e11, 10 s; 0.7 GiB, as one
  block at a time is float64, against 2.5 GiB.
- root: Cholesky n³/3, two products 4 n³, eigenvalues 4/3 n³: 4.9e10, about 3 s, as half of the last is bound by
  memory; sqrtm's Schur form about 25 n³ = 2.1e11, nearly all bound by memory: 30 to 60 s. A ratio of 10.
- precision_recall: D (N² + M²), for half of the pairs, and 2 D N M: 7.4e12, 185 s; scikit-learn's brute-force
  neighbours and distances compute each of these twice: 370 s. 1.5 GiB each: the features, and blocks of float64.

Measured (clock; peak; the cores shared with other work, so ratios are more reliable than seconds): statistics 3.9 s and
0.8 GiB to 7.1 s and 1.4 GiB, with equal CPU time, as OpenBLAS's symmetric product is slower per operation; root 3.5 s
to 27.4 s; FID 4.8 s to 26.7 s. precision_recall, on a machine seven times overloaded, so in seconds of the CPU: 314 s
and 1.2 GiB (388 s and 1.4 GiB for the float32 tiles, settled in float64, that it replaced; equal for every feature).
For 20,000 generated and 10,000 real: 84 s, scikit-learn 152 s, the tiles 99 s.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

DIMENSIONS = 2048


def make_features(path, count, seed, dimensions):
    import numpy as np

    mixing = np.random.default_rng(0).standard_normal((64, dimensions), np.float32)
    mixing /= 8.0 * np.sqrt(np.arange(1, 65, dtype=np.float32))[:, None]
    rng = np.random.default_rng(seed)
    features = np.empty((count, dimensions), np.float32)
    for start in range(0, count, 4096):
        rows = min(4096, count - start)
        factors, noise = (rng.standard_normal((rows, width), np.float32) for width in (64, dimensions))
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


def straightforward_precision_recall(generated, real, k=3):
    import numpy as np
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    def covered(points, centres):
        radii = NearestNeighbors(n_neighbors=k, algorithm='brute').fit(centres).kneighbors()[0][:, -1]
        parts = pairwise_distances_chunked(points, centres, reduce_func=lambda block, _: (block <= radii).any(1))
        return float(np.concatenate(list(parts)).mean())

    return covered(generated, real), covered(real, generated)


# ---------------------------------------------------------------- one measurement


def run(metric, straightforward, folder):
    """Take one measurement: {'seconds', 'cpu', 'peak', 'result'}."""
    import numpy as np

    from cfg_jax import metrics, runtime

    runtime.configure()
    generated = None if metric == 'root' else np.load(folder / 'generated.npy')
    gaussian = tuple(np.load(folder / f'{name}.npy') for name in ('mean', 'covariance'))
    real = (
        np.load(folder / 'real.npy') if metric in ('precision_recall', 'neighbourhoods', 'nearest', 'kernel') else None
    )
    statistics, distance = metrics.feature_statistics, metrics.gaussian_distance
    precision_recall = metrics.precision_recall
    if straightforward:
        statistics, distance = straightforward_statistics, straightforward_distance
        precision_recall = straightforward_precision_recall
    start, cpu = time.perf_counter(), time.process_time()
    if metric == 'statistics':
        mean, covariance = statistics(generated)
        result = [float(np.linalg.norm(mean)), float(np.linalg.norm(covariance))]
    elif metric == 'root':
        other = gaussian[0] + 0.01, np.ascontiguousarray(gaussian[1][::-1, ::-1])
        result = distance(*other, *gaussian)
    elif metric == 'frechet':
        result = distance(*statistics(generated), *gaussian)
    elif metric == 'precision_recall':
        result = precision_recall(generated, real)
    elif metric == 'neighbourhoods':
        found = metrics.neighbourhoods(generated, real)
        result = [float(each.mean()) for each in (found.precise, found.recalled, found.balls / 5, found.members > 0)]
    elif metric == 'nearest':
        result = float(metrics.nearest_neighbours(real, generated, k=50)[0][:, 0].mean())
    elif metric == 'vendi':
        result = metrics.vendi_score(generated)
    elif metric == 'frechet_error':
        result = metrics.frechet_distance_error(generated, *gaussian)
    elif metric == 'extrapolation':
        line = metrics.extrapolated_frechet_distance(generated, *gaussian)
        result = [line.value, line.distances.tolist()]
    elif metric == 'kernel':
        result = metrics.kernel_distance_subsets(generated, real, num_subsets=20)
    # ru_maxrss would include the parent process's peak
    peak = int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) / 1024
    seconds = time.perf_counter() - start, time.process_time() - cpu
    return {'seconds': seconds[0], 'cpu': seconds[1], 'peak': peak, 'result': result}


# key: (name in the table, True if there is a straightforward way)
MEASUREMENTS = {
    'statistics': ('mean and covariance (np.cov)', True),
    'root': ('square root and distance (scipy.linalg.sqrtm)', True),
    'frechet': ('FID against given statistics (both)', True),
    'precision_recall': ('precision and recall (scikit-learn)', True),
    'neighbourhoods': ('precision, recall, density, coverage', False),
    'nearest': ('50 nearest of the generated to the real', False),
    'vendi': ('Vendi score', False),
    'frechet_error': ("FID's standard error", False),
    'extrapolation': ('FID extrapolated, 6 points', False),
    'kernel': ('KID, 20 subsets of 1,000', False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--folder', type=Path, default=Path('/tmp/cfg_jax_benchmark_metrics'), help='where the features are kept'
    )
    parser.add_argument('--generated', type=int, default=50_000)
    parser.add_argument('--real', type=int, default=10_000)
    parser.add_argument('--dimensions', type=int, default=DIMENSIONS)
    parser.add_argument('--only', default=','.join(MEASUREMENTS), help='comma-separated subset of the measurements')
    parser.add_argument('--measure', nargs=2, metavar=('METRIC', 'WAY'), help=argparse.SUPPRESS)  # one process
    options = parser.parse_args()
    folder = options.folder / f'{options.generated}_{options.real}_{options.dimensions}'
    if options.measure:
        print(json.dumps(run(options.measure[0], options.measure[1] == 'straightforward', folder)))
        return

    if not folder.exists():
        import numpy as np

        folder.mkdir(parents=True)
        for seed, (name, count) in enumerate((('real', options.real), ('generated', options.generated)), 1):
            make_features(folder / f'{name}.npy', count, seed, options.dimensions)
        mean, covariance = straightforward_statistics(np.load(folder / 'real.npy'))
        np.save(folder / 'mean.npy', mean)
        np.save(folder / 'covariance.npy', covariance)

    root = Path(__file__).parent.parent

    def one(metric, way):
        chosen = {key: getattr(options, key) for key in ('generated', 'real', 'dimensions', 'folder')}
        sizes = [f'--{key}={value}' for key, value in chosen.items()]
        command = [sys.executable, __file__, *sizes, '--measure', metric, way]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def cells(measured):
        return f'{measured["seconds"]:7.1f}s {measured["cpu"]:7.1f}s {measured["peak"]:6.0f}'

    print(f'{options.generated:,} and {options.real:,} features of {options.dimensions}, {os.cpu_count()} cores')
    heads = f'{"clock":>8} {"CPU":>8} {"MiB":>6}'
    print(f'{"here, then the straightforward way":46} {heads}   {heads}   {"ratio: clock":>12} {"CPU":>6}', flush=True)
    for metric in options.only.split(','):
        name, compared = MEASUREMENTS[metric]
        result = one(metric, 'cfg_jax')
        print(f'{name:46} {cells(result)}', end='   ', flush=True)
        if compared:
            other = one(metric, 'straightforward')
            clock, cpu = (other[key] / result[key] for key in ('seconds', 'cpu'))
            print(f'{cells(other)}   {clock:12.1f} {cpu:6.1f}', end='')
        print(f'\n    {result["result"]}' + (f'\n    {other["result"]}' if compared else ''), flush=True)


if __name__ == '__main__':
    main()
