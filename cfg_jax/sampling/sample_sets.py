"""Sets of generated images on disk: drawn in shards, by one process or many, and resumed after a kill."""

import contextlib
import functools
import hashlib
import io
import json
import math
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np

from cfg_jax import files
from cfg_jax.distributed import processes
from cfg_jax.progress import Progress

_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def params_digest(params):
    """Return text that is the same for the same parameters, at whatever step they were saved."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f'{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}'.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def all_missing(sets):
    """Return the missing shards of each set as process 0 sees them, so that all processes divide the same list."""
    return processes.of_first([images.missing() for images in sets] if processes.is_first() else None)


class SampleSet:
    """The images of one model, sampler and weight: `folder`/shard_00000.npz and so on, and manifest.json.

    identity: what the images depend on, apart from their number; a nested dict of plain values. labels: int32 [N].
    batch_size: images that a device draws at once.
    A shard holds arr_0 (uint8 [n, H, W, C]), arr_1 (int32 [n], labels) and the seconds that drawing it took.
    """

    def __init__(self, parent, name, identity, labels, *, batch_size, shard_images):
        self.name, self.identity, self.labels, self.batch_size = name, identity, labels, batch_size
        self._units = math.ceil(shard_images / batch_size)  # in a shard
        self._shard_images = self._units * batch_size
        digest = hashlib.sha256(json.dumps([identity, self._shard_images], sort_keys=True).encode()).hexdigest()
        self.folder = Path(parent) / f'{name}_{digest[:8]}'

    def __len__(self):
        return len(self.labels)

    @property
    def num_shards(self):
        """The number of shards, an int."""
        return math.ceil(len(self) / self._shard_images)

    def _span(self, shard):
        return shard * self._shard_images, min((shard + 1) * self._shard_images, len(self))

    def _path(self, shard):
        return self.folder / f'shard_{shard:05d}.npz'

    def _is_whole(self, shard):
        """Return True if the shard's file can be read and holds the images asked for."""
        start, stop = self._span(shard)
        try:
            with np.load(self._path(shard)) as arrays:
                return (
                    arrays['seconds'] >= 0
                    and len(arrays['arr_0']) >= stop - start
                    and (arrays['arr_1'][: stop - start].tolist() == self.labels[start:stop].tolist())
                )
        except _DAMAGED:
            return False

    def delete(self):
        """Remove the images from disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def missing(self):
        """Return the numbers of the shards that are not on disk yet."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def draw(self, draw_units, name, missing=None):
        """Draw the missing shards, each process its part of them; return when all are on disk.

        draw_units: units -> iterator over their images (`generate.image_batches`); its work before it returns is not
        counted in the seconds. name: for the progress line. missing: this set's entry of `all_missing`, if known.
        """
        if missing is None:
            (missing,) = all_missing([self])
        if missing:
            if len(missing) < self.num_shards:
                done = len(self) - sum(stop - start for start, stop in map(self._span, missing))
                print(f'{name}  resuming: {done} of {len(self)} images are drawn already, in {self.folder}', flush=True)
            elif processes.is_first():
                self._print_changes(name)
            if processes.is_first():
                self._write_manifest({'complete': False})
            self._draw_shards(missing[jax.process_index() :: jax.process_count()], draw_units, name)
            processes.wait_for_all('drawn')
        if processes.is_first() and (missing or not self._has_manifest()):
            self._write_manifest({'complete': True, 'sha256': self.sha256, 'seconds': self.seconds()})

    def _draw_shards(self, shards, draw_units, name):
        last = math.ceil(len(self) / self.batch_size)
        units = [range(shard * self._units, min((shard + 1) * self._units, last)) for shard in shards]
        total, done = sum(stop - start for start, stop in map(self._span, shards)), 0
        drawn = draw_units([unit for of_shard in units for unit in of_shard])
        progress, started = Progress(total, compiles=True), time.monotonic()
        with progress.watched(name):
            for shard, of_shard in zip(shards, units):
                images = []
                for _ in of_shard:
                    images.append(next(drawn))
                    done += len(images[-1])
                    progress.show(done, name)
                now = time.monotonic()
                self._write_shard(shard, np.concatenate(images), now - started)
                started = now

    def _write_shard(self, shard, images, seconds):
        start, stop = self._span(shard)
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images, arr_1=self.labels[start:stop], seconds=seconds)
        files.write(self._path(shard), buffer.getvalue())

    def _write_manifest(self, state):
        manifest = {'num_images': len(self), 'shards': self.num_shards, **state, 'identity': self.identity}
        files.write_json(self.folder / 'manifest.json', manifest)

    def _has_manifest(self):
        try:
            manifest = json.loads((self.folder / 'manifest.json').read_text())
            return manifest['complete'] and manifest['num_images'] == len(self)
        except (OSError, ValueError, KeyError):
            return False

    def _print_changes(self, name):
        """Print how the newest set of the same name differs, since the user may expect to find its images here."""
        manifests = self.folder.parent.glob(f'{self.name}_*/manifest.json')
        newest = max(manifests, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None or newest.parent == self.folder:  # the same set with fewer images
            return
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            old, new = json.loads(newest.read_text())['identity'], json.loads(json.dumps(self.identity))
            changed = ', '.join(key for key, value in new.items() if old.get(key) != value)
            print(f'{name}  drawing again: {newest.parent.name} differs in {changed or "shard size"}', flush=True)

    def shards(self):
        """Yield the images of each shard in turn, uint8 [n, H, W, C]."""
        for shard in range(self.num_shards):
            start, stop = self._span(shard)
            with np.load(self._path(shard)) as arrays:
                yield arrays['arr_0'][: stop - start]

    def first(self, count):
        """Return the first `count` images, or all if there are fewer: uint8 [n, H, W, C]."""
        images = []
        for shard in self.shards():
            images.append(shard[: count - sum(map(len, images))])
            if sum(map(len, images)) == count:
                break
        return np.concatenate(images)

    def at(self, indices):
        """Return the images of these numbers, in this order: uint8 [n, H, W, C]."""
        found = {}
        for shard in sorted({int(index) // self._shard_images for index in indices}):
            start, stop = self._span(shard)
            with np.load(self._path(shard)) as arrays:
                images = arrays['arr_0']
            found |= {index: images[index - start] for index in indices if start <= index < stop}
        return np.stack([found[index] for index in indices])

    def seconds(self):
        """Return the seconds that drawing all images took, including the first call's compilation."""
        total = 0.0
        for shard in range(self.num_shards):
            with np.load(self._path(shard)) as arrays:
                total += float(arrays['seconds'])
        return total

    @functools.cached_property
    def sha256(self):
        """The sha256 of all images in order, in hexadecimal; they must be drawn."""
        digest = hashlib.sha256()
        for images in self.shards():
            digest.update(np.ascontiguousarray(images))
        return digest.hexdigest()

    def write_npz(self, path):
        """Write all images as one file for ADM's evaluator: arr_0 images, arr_1 labels. Memory holds one shard."""
        shape = (len(self), *next(self.shards()).shape[1:])
        with files.whole(path) as temporary, zipfile.ZipFile(temporary, 'w') as file:
            with file.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
                np.lib.format.write_array_header_1_0(member, header)
                for images in self.shards():
                    member.write(np.ascontiguousarray(images).data)
            with file.open('arr_1.npy', 'w') as member:
                np.lib.format.write_array(member, self.labels)
