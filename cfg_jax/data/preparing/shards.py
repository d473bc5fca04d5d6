"""The shards of a split that is being prepared: how one is written, and which are done already."""

import collections
import contextlib
import dataclasses
import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from cfg_jax import files
from cfg_jax.data import images
from cfg_jax.data.preparing import tfds_writer
from cfg_jax.errors import UserError, printable

# Errors in reading an image that say nothing about the image: it must not be left out because of them
_PASSING_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
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
    """Everything that a process needs to write shards of one split.

    raw: the archive's `RawImages`. label_ids: int [C], the data set's labels of the archive's classes. features: TFDS's
    FeaturesDict. name: the data set's, without its config. folder: where shards are written; once one is whole, a JSON
    file in progress/ says what became of its images. home: the data set's folder, to which all of it moves at the end.
    settings: plain values on which the records depend.
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
        """Return the file name of a shard."""
        return tfds_writer.shard_name(self.name, self.split, shard, self.num_shards)

    def bounds(self, shard):
        """Return the numbers of a shard's images, as a range."""
        first, last = (len(self.raw) * (shard + i) // self.num_shards for i in (0, 1))
        return range(first, last)

    def result_path(self, shard):
        """Return the path of the JSON file about a shard."""
        return self.folder / 'progress' / f'{shard:05d}.json'

    def result(self, shard):
        """Return what became of a shard's images, as `write` saved it, or None while the shard is not whole."""
        name = self.shard_name(shard)
        exists = (self.folder / name).exists() or (self.home / name).exists()
        return read_json(self.result_path(shard)) if exists else None

    def begin(self):
        """Save the settings in the folder, or check that they are those of the shards in it; delete other files."""
        saved = read_json(self.folder / 'settings.json')
        begun = saved is not None and any((self.folder / 'progress').glob('*.json'))
        if begun:
            results = {shard: self.result(shard) for shard in range(self.num_shards)}
            contents = {shard: result.get('content') for shard, result in results.items() if result}
            check_same(self.settings, saved, self.folder, lambda: self.holds(contents))
        for left in list(self.folder.rglob('.*.tmp') if begun else self.folder.iterdir()):
            if left.name != 'lock':
                remove(left)
        files.write_json(self.folder / 'settings.json', self.settings)

    def holds(self, contents):
        """Return True if the archive's images still have these checksums, {shard: int, or None if it is unknown}."""
        print(f'the times of files in {printable(self.settings["path"])} have changed; comparing contents', flush=True)
        return None not in contents.values() and all(self._content(shard) == contents[shard] for shard in contents)

    def _content(self, shard):
        """Return the checksum of a shard's images as the archive has them."""
        checksum = 0
        for index in self.bounds(shard):
            with contextlib.suppress(images.ImageError):
                checksum = zlib.crc32(self.raw.read(index), checksum)
        return checksum

    def encode(self, image):
        """Return an image as the archive has it, resampled, as the bytes of a PNG file; raises ImageError."""
        settings = self.settings
        channels = settings['image_channels']
        if isinstance(image, bytes):
            image = images.decode(image, channels)
        elif image.shape[-1] != channels:
            raise images.ImageError(f'has {image.shape[-1]} channels, not the {channels} of config.data.image_channels')
        size, upsample = settings['image_size'], settings['upsample']
        return images.encode_png(images.resample(image, size, settings['resampling'], upsample=upsample))

    def write(self, shard, report):
        """Write a shard and the JSON file about it. report(done, skipped): called after each image with counts."""
        serialize = tfds_writer.example_serializer(self.features)
        classes, skipped, content = collections.Counter(), [], 0

        def records():
            nonlocal content
            for index in self.bounds(shard):
                name = self.raw.names[index]
                try:
                    image = self.raw.read(index)
                    content = zlib.crc32(image, content)
                    png = self.encode(image)
                except images.ImageError as error:
                    if not os.path.exists(self.settings['path']):
                        raise UserError(f'{self.settings["path"]} no longer exists (config.prepare.path).') from None
                    if getattr(error.__cause__, 'errno', None) in _PASSING_ERRORS:
                        raise UserError(
                            f'{printable(name)}: {error} (config.prepare.path); rerun the same command to resume.'
                        ) from None
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
            result = {'count': count, 'num_bytes': size, 'classes': classes, 'skipped': skipped, 'content': content}
            files.write_json(self.result_path(shard), result)


def check_same(settings, saved, folder, same_content):
    """Raise UserError, which names the first difference, unless the settings are those saved for the folder.

    same_content: a function that tells whether files are the same although their sizes or times are not.
    """
    different = [key for key, value in settings.items() if saved.get(key) != value]
    if different and not (different == ['files'] and same_content()):
        key = different[0]
        what = f'the images of config.prepare.path have changed ({key})'
        if key == 'files':
            what = 'the sizes or times of files of config.prepare.path have changed'
        if key in _FIELDS:
            what = f'{_FIELDS[key]} was {saved.get(key)!r} and is now {settings[key]!r}'
        raise UserError(f'{folder} was made with other settings: {what}; undo that, or delete the folder.')


def read_json(path):
    """Return the content of a JSON file, or None if it does not exist or is incomplete."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def remove(path):
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder):
    """Turn every OSError within into a UserError about writing the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'{folder} cannot be written: {error} (config.data.data_dir); rerun the same command to resume.'
        ) from error
