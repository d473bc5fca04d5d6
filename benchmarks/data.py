"""Measure how fast 64x64 images reach a training step: this pipeline against PyTorch's DataLoader with Pillow.

    python benchmarks/data.py --torch_python=/path/to/venv/bin/python     (a venv with torch, numpy and pillow)

Both read the same PNG files, crops of scikit-learn's two photographs scaled to 64x64, from a folder; this pipeline also
reads the ArrayRecord files that --mode=prepare makes of it. Both shuffle, decode, mirror at random and batch, uint8.
Each measurement is a process of its own; rounds alternate, and medians are printed. "A core" is images per second of
CPU time, of the process and its workers together. The last lines show the memory of the whole process tree as more
images are read. Without --torch_python the peer is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 256


def make_folder(folder, count):
    """Write `count` PNG files of 64x64 in ten class folders."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(load_sample_image(name)) for name in ('china.jpg', 'flower.jpg')]
    for number in range(count):
        path = folder / f'class{number % 10}' / f'{number:06d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph = photographs[number % 2]
        left, top = rng.integers(0, photograph.width - 240), rng.integers(0, photograph.height - 240)
        cropped = photograph.crop((left, top, left + 240, top + 240))
        cropped.resize((64, 64), Image.Resampling.BOX).save(path)


def torch_batches(folder, workers):
    """Yield the peer's batches, epoch after epoch: a map-style data set over the files, Pillow, and DataLoader."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    torch.set_num_threads(1)

    class Images(Dataset):
        def __init__(self):
            self.paths = sorted(Path(folder).glob('*/*.png'))
            classes = {name: label for label, name in enumerate(sorted({path.parent.name for path in self.paths}))}
            self.labels = [classes[path.parent.name] for path in self.paths]

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            with Image.open(self.paths[index]) as file:
                image = np.array(file.convert('RGB'))
            if torch.rand(()) < 0.5:
                image = image[:, ::-1]
            return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), self.labels[index]

    options = {'persistent_workers': True} if workers else {}
    loader = DataLoader(Images(), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers, **options)
    while True:
        yield from loader


def our_batches(folder, workers):
    """Return this pipeline's batches of a folder, or of the data set that was prepared from it."""
    from absl import flags

    from cfg_jax.data import pipeline, sources

    flags.FLAGS(['benchmark'])
    if (Path(folder) / 'dataset_info.json').exists():
        source = sources.TfdsSource('', 'train', folder, (64, 64, 3))
    else:
        source = sources.FolderSource(folder, (64, 64, 3))
    batches = pipeline.train_batches(source, batch_size=BATCH, seed=0, flip=True, num_workers=workers)
    return ((batch['image'], batch['label']) for batch in batches)


def process_tree():
    """Return the pids of this process and all its descendants."""
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(')', 1)[1].split()[1])
        except OSError:  # the process has ended
            continue
    tree = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def cpu_seconds():
    """Return the CPU time of this process and its workers so far."""
    ticks = 0
    for pid in process_tree():
        fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK')


def memory():
    """Return the memory of this process and its workers in bytes (proportional set size)."""
    total = 0
    for pid in process_tree():
        for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
            if line.startswith('Pss:'):
                total += 1024 * int(line.split()[1])
    return total


def measure(reader, folder, workers, images):
    """Print {'images_per_second', 'images_per_core_second', 'memory': [(images, bytes), ...]} as JSON."""
    batches = iter((torch_batches if reader == 'torch' else our_batches)(folder, workers))
    for _ in range(4):  # while workers start and files are opened
        next(batches)
    start, cpu, seen, samples = time.perf_counter(), cpu_seconds(), 0, []
    while seen < images:
        seen += len(next(batches)[1])
        if seen * 10 // images > len(samples):
            samples.append((seen, memory()))
    rate, per_core = seen / (time.perf_counter() - start), seen / (cpu_seconds() - cpu)
    print(json.dumps({'images_per_second': rate, 'images_per_core_second': per_core, 'memory': samples}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch_python', help='python of an environment with torch, numpy and pillow')
    parser.add_argument(
        '--folder', type=Path, default=Path('/tmp/cfg_jax_benchmark_data'), help='where to put the images'
    )
    parser.add_argument('--files', type=int, default=20_000, help='images on disk')
    parser.add_argument('--images', type=int, default=20_000, help='images read in one measurement')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--memory_images', type=int, default=200_000, help='images read to measure memory; 0 skips it')
    parser.add_argument('--measure', nargs=2, metavar=('READER', 'FOLDER'), help=argparse.SUPPRESS)  # one process
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options.workers[0], options.images)
        return

    folder = options.folder / f'png{options.files}'
    if not folder.exists():
        print(f'making {options.files} images', flush=True)
        make_folder(folder, options.files)
    prepared = options.folder / 'tfds' / f'png{options.files}' / '1.0.0'
    root = Path(__file__).parent.parent
    if not prepared.exists():
        fields = {
            'data.data_dir': options.folder / 'tfds', 'data.name': folder.name, 'data.num_classes': 10,
            'prepare.path': folder,
        }  # fmt: skip
        flags = [f'--config.{field}={value}' for field, value in fields.items()]
        command = [sys.executable, '-m', 'cfg_jax.main', f'--config={root}/configs/imagenet64.py', '--mode=prepare']
        subprocess.run([*command, *flags], check=True, cwd=root)
    size = sum(path.stat().st_size for path in folder.rglob('*.png')) / options.files

    def one(reader, source, workers, images):
        python = options.torch_python if reader == 'torch' else sys.executable
        command = [python, __file__, '--measure', reader, str(source), '--workers', str(workers)]
        environment = {**os.environ, 'PYTHONPATH': str(root)}
        done = subprocess.run([*command, '--images', str(images)], capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    readers = {'ArrayRecord': ('ours', prepared), 'folder': ('ours', folder)}
    if options.torch_python:
        readers['DataLoader + Pillow, folder'] = ('torch', folder)
    print(f'{options.files} files of {size:.0f} bytes; batches of {BATCH}; medians of {options.rounds} rounds')
    results = {}
    for _ in range(options.rounds):
        for workers in options.workers:
            for name, (reader, source) in readers.items():
                results.setdefault((workers, name), []).append(one(reader, source, workers, options.images))
    print(f'{"workers":>7}  {"reader":28} {"images/s":>9} {"MB/s":>7} {"a core":>8} {"to DataLoader a core":>21}')
    for (workers, name), rounds in results.items():
        rate, per_core = (
            statistics.median(r[key] for r in rounds) for key in ('images_per_second', 'images_per_core_second')
        )
        peers = results.get((workers, 'DataLoader + Pillow, folder'), [])
        ratios = [a['images_per_core_second'] / b['images_per_core_second'] for a, b in zip(rounds, peers)]
        ratio = f'{statistics.median(ratios):.2f}' if ratios else '-'
        print(f'{workers:7}  {name:28} {rate:9.0f} {rate * size / 1e6:7.1f} {per_core:8.0f} {ratio:>21}', flush=True)
    for workers in (0, max(options.workers)) if options.memory_images else ():
        samples = one('ours', prepared, workers, options.memory_images)['memory']
        print(f'memory with {workers} workers: ' + ', '.join(f'{n} {size / 2**20:.0f} MiB' for n, size in samples))


if __name__ == '__main__':
    main()
