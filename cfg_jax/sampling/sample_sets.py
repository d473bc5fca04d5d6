"""Sets of generated images on disk: drawn in shards, by one process or many, and gone on with after a kill."""

import contextlib
import functools
import hashlib
import importlib
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

from cfg_jax import build, diffusion, files, guidance, samplers, schedules
from cfg_jax.config import default
from cfg_jax.data import sources
from cfg_jax.distributed import processes
from cfg_jax.models import blocks, classifier, unet
from cfg_jax.progress import Progress
from cfg_jax.sampling import generate

_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def params_digest(params):
    """Text that is the same for the same parameters (or None), whatever the step they were saved at."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f'{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}'.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def code_digest(config):
    """Text that changes with the code that draws: ours, and the module of a guidance of the user's own.

    What that module imports in turn is not looked at.
    """
    modules = [schedules, diffusion, guidance, samplers, blocks, unet, classifier, build, generate]
    if ':' in config.guidance.function:
        modules.append(importlib.import_module(config.guidance.function.rpartition(':')[0]))
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def classes(config, class_names):
    """The label ids of config.sample.labels; of all classes, where they are more than the images, as many, spread."""
    ids = generate.parse_labels(config.sample.labels, class_names)
    return ids if config.sample.labels.strip() else sources.spread(len(ids), config.sample.num_images).tolist()


def make_labels(ids, count, *, order, seed):
    """The label of each of `count` images, int32: image i's does not depend on their number.

    ids: those to choose from. order: 'balanced' (in turn) or 'random' (drawn by the seed).
    """
    ids = np.array(ids, np.int32)
    if order == 'random':
        return ids[np.random.default_rng(seed).integers(0, len(ids), count)]
    return np.resize(ids, count)


def identity(config, classifier_config, digests, ids, weight, classifier_weight):
    """What the images of a set depend on, but for their number: a nested dict of plain values.

    digests: of the model's and the classifier's parameters. ids: the classes that its labels are chosen from.
    """
    params, classifier_params = digests
    plain = config.to_dict()
    drawing = {key: plain['sample'][key] for key in ('sampler', 'num_steps', 'spacing', 'v', 'eta', 'clip_x', 'seed')}
    guided = plain['guidance'] | {'guidance_weight': weight, 'classifier_weight': classifier_weight}
    return {
        'params': params,
        'code': code_digest(config),
        'classifier_params': classifier_params,
        'classifier': classifier_config
        and {**build.model_identity(classifier_config), 'dtype': classifier_config.model.dtype},
        'model': build.model_identity(config)['model'],
        'dtype': plain['model']['dtype'],
        'diffusion': plain['diffusion'],
        'sample': drawing,
        'guidance': guided,
        'classes': list(ids),
        'label_order': plain['sample']['label_order'],
        'batch_size': plain['sample']['batch_size'],  # of the program that draws them
    }


def describe(config, weight, classifier_weight):
    """A short name for files: 'ancestral256_w0.3_seed0'; with the guidance function, v and eta where they are others
    than the usual ones.
    """
    usual, ours = default(), config.sample
    what = f'{ours.sampler}{len(build.sampling_logsnrs(config))}'
    if config.guidance.function != usual.guidance.function:
        what += f'_{config.guidance.function.rpartition(":")[2]}'
    noise = {'ancestral': 'v', 'ddim': 'eta'}[ours.sampler]
    if ours[noise] != usual.sample[noise]:
        what += f'_{noise}{ours[noise]:g}'
    what += f'_w{weight:g}'
    if config.guidance.classifier_workdir:
        what += f'_classifier{classifier_weight:g}'
    return f'{what}_seed{config.sample.seed}'


def open_set(config, classifier_config, workdir, digests, ids, count, weight, classifier_weight):
    """The `SampleSet` of `count` images below `workdir`. The other arguments are as in `identity`."""
    return SampleSet(
        Path(workdir) / 'sample_sets',
        describe(config, weight, classifier_weight),
        identity(config, classifier_config, digests, ids, weight, classifier_weight),
        make_labels(ids, count, order=config.sample.label_order, seed=config.sample.seed),
        batch_size=config.sample.batch_size,
        shard_images=config.sample.shard_images,
    )


def all_missing(sets):
    """The missing shards of each set as process 0 sees them, so that all processes share out the same."""
    return processes.of_first([images.missing() for images in sets] if processes.is_first() else None)


class SampleSet:
    """The images of one model, sampler and weight: `folder`/shard_00000.npz and so on, and manifest.json.

    A shard holds arr_0 (uint8 [n, H, W, C]), arr_1 (int32 [n], labels) and the seconds that it took.
    """

    def __init__(self, parent, name, identity, labels, *, batch_size, shard_images):
        self.name, self.identity, self.labels, self._batch_size = name, identity, labels, batch_size
        self._units = math.ceil(shard_images / batch_size)  # of a shard
        self._shard_images = self._units * batch_size
        digest = hashlib.sha256(json.dumps([identity, self._shard_images], sort_keys=True).encode()).hexdigest()
        self.folder = Path(parent) / f'{name}_{digest[:8]}'

    def __len__(self):
        return len(self.labels)

    @property
    def num_shards(self):
        return math.ceil(len(self) / self._shard_images)

    def _span(self, shard):
        return shard * self._shard_images, min((shard + 1) * self._shard_images, len(self))

    def _path(self, shard):
        return self.folder / f'shard_{shard:05d}.npz'

    def _is_whole(self, shard):
        """Whether the shard's file can be read and holds the images asked for."""
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
        """Removes the images."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def missing(self):
        """The shards that are not there yet."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def draw(self, draw_units, name, missing=None):
        """Draws what is not there yet, each process its part of the shards; returns when all are there.

        draw_units: units -> iterator over their images (`generate.image_batches`); what it does before it returns is
        not counted in the seconds. name: for the progress line. missing: of `all_missing`, if that has been asked.
        """
        if missing is None:
            (missing,) = all_missing([self])
        if missing:
            if len(missing) < self.num_shards:
                done = len(self) - sum(stop - start for start, stop in map(self._span, missing))
                print(f'{name}  resuming: {done} of {len(self)} images are there, in {self.folder}', flush=True)
            elif processes.is_first():
                self._say_what_changed(name)
            if processes.is_first():
                self._write_manifest({'complete': False})
            self._draw_shards(missing[jax.process_index() :: jax.process_count()], draw_units, name)
            processes.wait_for_all('drawn')
        if processes.is_first() and (missing or not self._has_manifest()):
            self._write_manifest({'complete': True, 'sha256': self.sha256, 'seconds': self.seconds()})

    def _draw_shards(self, shards, draw_units, name):
        last = math.ceil(len(self) / self._batch_size)
        units = [range(shard * self._units, min((shard + 1) * self._units, last)) for shard in shards]
        total, done = sum(stop - start for start, stop in map(self._span, shards)), 0
        drawn = draw_units([unit for of_shard in units for unit in of_shard])
        progress, started = Progress(total), time.monotonic()
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

    def _say_what_changed(self, name):
        """Prints in what the newest set of the same name differs: its images might have been expected here."""
        manifests = self.folder.parent.glob(f'{self.name}_*/manifest.json')
        newest = max(manifests, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None or newest.parent == self.folder:  # the same, of fewer images
            return
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            there, here = json.loads(newest.read_text())['identity'], json.loads(json.dumps(self.identity))
            changed = ', '.join(key for key, value in here.items() if there.get(key) != value)
            print(f'{name}  drawn anew: {newest.parent.name} has another {changed or "shard size"}', flush=True)

    def shards(self):
        """The images of each shard in turn, uint8 [n, H, W, C]."""
        for shard in range(self.num_shards):
            start, stop = self._span(shard)
            with np.load(self._path(shard)) as arrays:
                yield arrays['arr_0'][: stop - start]

    def first(self, count):
        """The first `count` images, or all of fewer."""
        images = []
        for shard in self.shards():
            images.append(shard[: count - sum(map(len, images))])
            if sum(map(len, images)) == count:
                break
        return np.concatenate(images)

    def seconds(self):
        """What drawing all of them took, the first call's compilation included."""
        total = 0.0
        for shard in range(self.num_shards):
            with np.load(self._path(shard)) as arrays:
                total += float(arrays['seconds'])
        return total

    @functools.cached_property
    def sha256(self):
        """Of all images, in their order, once they are drawn."""
        digest = hashlib.sha256()
        for images in self.shards():
            digest.update(np.ascontiguousarray(images))
        return digest.hexdigest()

    def write_npz(self, path):
        """All of them as one file, as ADM's evaluator reads it: arr_0 images, arr_1 labels. One shard is in memory."""
        shape = (len(self), *next(self.shards()).shape[1:])
        with files.whole(path) as temporary, zipfile.ZipFile(temporary, 'w') as file:
            with file.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
                np.lib.format.write_array_header_1_0(member, header)
                for images in self.shards():
                    member.write(np.ascontiguousarray(images).data)
            with file.open('arr_1.npy', 'w') as member:
                np.lib.format.write_array(member, self.labels)
