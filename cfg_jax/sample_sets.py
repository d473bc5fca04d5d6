"""Sets of generated images on disk: drawn in shards, by one process or many, and gone on with after a kill."""

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
from jax.experimental import multihost_utils

from cfg_jax import build, diffusion, figures, guidance, samplers, sampling, schedules
from cfg_jax.models import blocks, classifier, unet
from cfg_jax.writers import Progress

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
    modules = [schedules, diffusion, guidance, samplers, blocks, unet, classifier, build]
    if ':' in config.guidance.function:
        modules.append(importlib.import_module(config.guidance.function.rpartition(':')[0]))
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def make_labels(config, class_names):
    """The label of each image, int32 [config.sample.num_images]: image i's does not depend on their number.

    Only where all classes are asked for and they are more than the images, these are spread over the classes.
    """
    ids = sampling.parse_labels(config.sample.labels, class_names)
    count = config.sample.num_images
    if not config.sample.labels.strip():
        ids = sampling.spread_classes(len(ids), count)
    ids = np.array(ids, np.int32)
    if config.sample.label_order == 'random':
        return ids[np.random.default_rng(config.sample.seed).integers(0, len(ids), count)]
    return np.resize(ids, count)


def identity(config, classifier_config, params, classifier_params, labels, weight, classifier_weight):
    """What the images of a set depend on, but for their number: a nested dict of plain values.

    params, classifier_params: their digests.
    """
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
        'classes': [int(label) for label in dict.fromkeys(labels.tolist())],
        'label_order': plain['sample']['label_order'],
        'batch_size': plain['sample']['batch_size'],  # of the program that draws them
    }


def describe(config, weight, classifier_weight):
    """A short name for files: 'ancestral256_w0.3'."""
    what = f'{config.sample.sampler}{len(build.sampling_logsnrs(config))}_w{weight:g}'
    if config.guidance.classifier_workdir:
        what += f'_classifier{classifier_weight:g}'
    return what


def wait_for_all(what):
    """Returns once every process of the job has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def open_set(config, classifier_config, workdir, digests, labels, weight, classifier_weight):
    """The `SampleSet` of these images below `workdir`. digests: of the model's and the classifier's parameters."""
    return SampleSet(
        Path(workdir) / 'sample_sets',
        f'{describe(config, weight, classifier_weight)}_seed{config.sample.seed}',
        identity(config, classifier_config, *digests, labels, weight, classifier_weight),
        labels,
        batch_size=config.sample.batch_size,
        shard_images=config.sample.shard_images,
    )


class SampleSet:
    """The images of one model, sampler and weight: `folder`/shard_00000.npz and so on, and manifest.json.

    A shard holds arr_0 (uint8 [n, H, W, C]), arr_1 (int32 [n], labels) and the seconds that it took.
    """

    def __init__(self, parent, name, identity, labels, *, batch_size, shard_images):
        self.identity, self.labels, self._batch_size = identity, labels, batch_size
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

    def is_whole(self):
        """Whether all images are there."""
        return all(self._is_whole(shard) for shard in range(self.num_shards))

    def delete(self):
        """Removes the images."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def draw(self, draw_units, name):
        """Draws what is not there yet, each process its part of the shards; returns when all are there.

        draw_units: units -> iterator over their images (`sampling.image_batches`). name: for the progress line.
        """
        first = jax.process_index() == 0
        missing = [shard for shard in range(self.num_shards) if not self._is_whole(shard)]
        wait_for_all('seen')  # before anyone adds a shard
        if not missing:
            return
        if len(missing) < self.num_shards:
            done = len(self) - sum(stop - start for start, stop in map(self._span, missing))
            print(f'{name}  resuming: {done} of {len(self)} images are there, in {self.folder}', flush=True)
        if first:
            self._write_manifest({'complete': False})
        self._draw_shards(missing[jax.process_index() :: jax.process_count()], draw_units, name)
        wait_for_all('drawn')
        if first:
            self._write_manifest({'complete': True, 'sha256': self.sha256(), 'seconds': self.seconds()})

    def _draw_shards(self, shards, draw_units, name):
        last = math.ceil(len(self) / self._batch_size)
        units = [range(shard * self._units, min((shard + 1) * self._units, last)) for shard in shards]
        total, done = sum(stop - start for start, stop in map(self._span, shards)), 0
        progress, started = Progress(total), time.monotonic()
        drawn = draw_units([unit for of_shard in units for unit in of_shard])
        for shard, of_shard in zip(shards, units):
            images = []
            for _ in of_shard:
                images.append(next(drawn))
                done += len(images[-1])
                if done == total or progress.seconds() > 10:
                    rate, left = progress.rate(done)
                    print(f'{name}  {done}/{total} images  {rate:.1f} images/s  {left} left', flush=True)
            now = time.monotonic()
            self._write_shard(shard, np.concatenate(images), now - started)
            started = now

    def _write_shard(self, shard, images, seconds):
        start, stop = self._span(shard)
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images, arr_1=self.labels[start:stop], seconds=seconds)
        figures.write_atomically(self._path(shard), buffer.getvalue())

    def _write_manifest(self, state):
        manifest = {'num_images': len(self), 'shards': self.num_shards, **state, 'identity': self.identity}
        figures.write_atomically(self.folder / 'manifest.json', (json.dumps(manifest, indent=1) + '\n').encode())

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

    def sha256(self):
        """Of all images, in their order."""
        digest = hashlib.sha256()
        for images in self.shards():
            digest.update(np.ascontiguousarray(images))
        return digest.hexdigest()

    def write_npz(self, path):
        """All of them as one file, as ADM's evaluator reads it: arr_0 images, arr_1 labels. One shard is in memory."""
        path = Path(path)
        temporary = path.with_name(f'.{path.name}.tmp')
        shape = (len(self), *next(self.shards()).shape[1:])
        with zipfile.ZipFile(temporary, 'w') as file:
            with file.open('arr_0.npy', 'w', force_zip64=True) as member:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
                np.lib.format.write_array_header_1_0(member, header)
                for images in self.shards():
                    member.write(np.ascontiguousarray(images).data)
            with file.open('arr_1.npy', 'w') as member:
                np.lib.format.write_array(member, self.labels)
        temporary.replace(path)
