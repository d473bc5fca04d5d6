"""The shards of a split that is being prepared: what each process makes, and what lies there to go on from."""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np

from cfg_jax import files
from cfg_jax.data import images
from cfg_jax.data.preparing import tfds_writer
from cfg_jax.errors import UserError

# setting -> the field that it comes from
_FIELDS = {
    'path': 'config.prepare.path',
    'num_shards': 'config.prepare.num_shards',
    'image_size': 'config.data.image_size',
    'image_channels': 'config.data.image_channels',
    'resampling': 'config.data.resampling',
    'upsample': 'config.data.upsample',
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything that a process needs to make shards of one split.

    raw: the archive. label_ids: of its classes, in the data set. folder: where shards are made. home: the data set's,
    where they end. Beside a shard in `folder`, a JSON file tells what became of its images, once it is whole.
    """

    raw: object
    label_ids: np.ndarray
    features: object
    name: str
    split: str
    folder: Path
    home: Path
    settings: dict

    @property
    def num_shards(self):
        return self.settings['num_shards']

    def shard_name(self, shard):
        return tfds_writer.shard_name(self.name, self.split, shard, self.num_shards)

    def bounds(self, shard):
        """The images of a shard, as a range."""
        first, last = (len(self.raw) * (shard + i) // self.num_shards for i in (0, 1))
        return range(first, last)

    def result_path(self, shard):
        return self.folder / 'progress' / f'{shard:05d}.json'

    def result(self, shard):
        """What became of a shard's images, or None while it is not whole."""
        name = self.shard_name(shard)
        there = (self.folder / name).exists() or (self.home / name).exists()
        return read_json(self.result_path(shard)) if there else None

    def begin(self):
        """Claims the folder for these settings, or checks that they are those that it was begun with."""
        there = read_json(self.folder / 'settings.json')
        begun = there is not None and any((self.folder / 'progress').glob('*.json'))
        if begun:
            check_same(self.settings, there, self.folder)
        for left in list(self.folder.rglob('.*.tmp') if begun else self.folder.iterdir()):
            if left.name != 'lock':
                remove(left)
        files.write_json(self.folder / 'settings.json', self.settings)

    def encode(self, index):
        """An image as PNG, resampled; raises ImageError."""
        settings, image = self.settings, self.raw.read(index)
        channels = settings['image_channels']
        if isinstance(image, bytes):
            image = images.decode(image, channels)
        elif image.shape[-1] != channels:
            raise images.ImageError(f'has {image.shape[-1]} channels, and {channels} are asked for')
        size, upsample = settings['image_size'], settings['upsample']
        return images.encode_png(images.resample(image, size, settings['resampling'], upsample=upsample))

    def write(self, shard, report):
        """Makes a shard. report(images done, of them skipped) is called as it goes."""
        serialize = tfds_writer.example_serializer(self.features)
        classes, skipped = collections.Counter(), []

        def records():
            for index in self.bounds(shard):
                name = self.raw.names[index]
                try:
                    png = self.encode(index)
                except images.ImageError as error:
                    if not os.path.exists(self.settings['path']):
                        raise UserError(f'{self.settings["path"]} is gone (config.prepare.path).') from None
                    skipped.append((name, str(error)))
                    report(1, 1)
                    continue
                label = int(self.label_ids[self.raw.labels[index]])
                classes[label] += 1
                texts = {'id': f'{self.split}_{index:05d}', 'file_name': os.fsencode(Path(name).name)}
                yield serialize({'image': png, 'label': label, **texts})
                report(1, 0)

        with writing(self.folder):
            count, size = tfds_writer.write_shard(self.folder / self.shard_name(shard), records())
            result = {'count': count, 'num_bytes': size, 'classes': classes, 'skipped': skipped}
            files.write_json(self.result_path(shard), result)


def check_same(settings, there, folder):
    """UserError unless the settings are those that the folder was begun with; the first that differs is named."""
    different = [key for key, value in settings.items() if there.get(key) != value]
    if different:
        key = different[0]
        what = f'the images of config.prepare.path are others now ({key})'
        if key == 'files':
            what = 'files of config.prepare.path have other sizes or times than they had then'
        if key in _FIELDS:
            what = f'{_FIELDS[key]} is {settings[key]!r} here and {there.get(key)!r} there'
        raise UserError(f'{folder} was made with other settings: {what}; use those, or delete that folder.')


def read_json(path):
    """None where there is no such file, or only a part of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def remove(path):
    """Deletes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder):
    """Whatever goes wrong with the disk within becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'{folder} cannot be written: {error} (config.data.data_dir); the same command goes on from there.'
        ) from error
