"""The job of --mode=prepare: turn a folder or archive of images into ArrayRecord files in TFDS's layout.

Unfinished work is kept beside the data set's folder, in <version>.incomplete-<split>; the same command resumes it.
"""

import collections
import hashlib
import math
import os
import re
import shutil
import time
from pathlib import Path

from cfg_jax import files
from cfg_jax.checks import check_config
from cfg_jax.config import changed
from cfg_jax.data import workers
from cfg_jax.data.preparing import archives, raw_images, shards, tfds_writer
from cfg_jax.errors import UserError, printable
from cfg_jax.progress import Progress, duration, rounded


def run(config, workdir):
    """Prepare config.prepare.splits, or config.data.split, and return the data set's folder.

    Nothing is written into the workdir.
    """
    del workdir
    check_config(config)
    splits = tuple(dict.fromkeys(config.prepare.splits)) or (config.data.split,)
    try:
        for split in splits:
            tfds_writer.check_split(split)
        configs = [changed(config, {'data.split': split}) for split in splits]
        raws = [open_raw(config) for config in configs]  # all are there, before the first of them takes its time
        folders = [prepare_split(config, raw) for config, raw in zip(configs, raws)]
    except UserError as error:
        if not config.prepare.splits:
            raise
        raise UserError(str(error).replace('config.data.split', 'config.prepare.splits')) from error
    return folders[-1]


def open_raw(config):
    """Return the images of config.data.split in the archive config.prepare.path."""
    if not config.prepare.path:
        raise UserError('config.prepare.path is not set; give a folder or zip of images, or an archive: docs/data.md.')
    return archives.open_images(config.prepare.path, split=config.data.split, name=config.data.name)


def prepare_split(config, raw):
    """Prepare config.data.split of the images that `open_raw` has opened, and return the data set's folder."""
    data, start = config.data, time.monotonic()
    target = locate(config, raw)
    if len(target.class_names) != data.num_classes:
        raise UserError(
            f'config.data.num_classes is {data.num_classes}, but {target.info.full_name} from {config.prepare.path} '
            f'has {len(target.class_names)} classes.'
        )
    label_ids = target.label_ids(raw.class_names)
    settings = make_settings(config, raw, target)
    folder = target.folder.with_name(f'{target.folder.name}.incomplete-{data.split}')
    work = shards.Work(raw, label_ids, target.features, target.name, data.split, folder, target.folder, settings)
    with shards.writing(folder):
        if is_prepared(target, work):
            shutil.rmtree(folder, ignore_errors=True)
            print(f'already prepared: {printable(str(target.folder))}', flush=True)
            return target.folder
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(
            folder / 'lock', f'another process is preparing {folder} (config.data.name, config.data.split).'
        ):
            work.begin()
            _write_shards(work, config.prepare.num_workers or os.cpu_count())
            report = _finish(work, locate(config, raw))  # another split may have been added meanwhile
    _print_report(report, target.folder / f'prepared-{data.split}.json', time.monotonic() - start)
    return target.folder


def is_prepared(target, work):
    """Return True if the split exists, made with the same settings. Raises UserError if it is anything else."""
    split, settings, path = work.split, work.settings, target.folder / f'prepared-{work.split}.json'
    if split in target.prepared_splits():
        report = shards.read_json(path)
        if report is None:
            raise UserError(
                f'{target.folder} has the split {split!r} already, but not from --mode=prepare; give another '
                'config.data.split, config.data.name or config.data.data_dir.'
            )
        contents = dict(enumerate(report.get('content', [None])))
        shards.check_same(settings, report['settings'], target.folder, lambda: work.holds(contents))
        if report['settings'] != settings:  # the files' times alone
            files.write_json(path, report | {'settings': settings})
        return True
    if not target.prepared_splits() and target.folder.exists() and any(target.folder.iterdir()):
        raise UserError(f'{target.folder} holds files but no dataset_info.json; delete it (config.data.data_dir).')
    return False


def locate(config, raw):
    """Return the data set that the config names, a `tfds_writer.Target`, as it is on the disk now."""
    data = config.data
    shape = (data.image_size, data.image_size, data.image_channels)
    return tfds_writer.locate(data.name, data.data_dir, raw.class_names, shape)


def default_shards(num_images):
    """Return the number of files: one per 10,000 images, but up to 16 of at least 250, for as many processes."""
    return max(math.ceil(num_images / 10_000), min(16, math.ceil(num_images / 250)))


def make_settings(config, raw, target):
    """Return all that the records depend on, as plain values. Work is resumed with the same settings only."""
    data, asked = config.data, config.prepare.num_shards
    if asked > len(raw):
        raise UserError(
            f'config.prepare.num_shards is {asked}; allowed: up to {len(raw)}, the images in {config.prepare.path}.'
        )
    listing = hashlib.sha256(repr(target.class_names).encode())
    label_ids = target.label_ids(raw.class_names)
    for name, label in zip(raw.names, raw.labels):
        class_name = target.class_names[label_ids[label]]
        listing.update(f'{name}\0{class_name}\n'.encode(errors='surrogatepass'))
    stamps = hashlib.sha256()
    for stamp in raw.stamps():
        stamps.update(stamp)
    return {
        'path': str(Path(config.prepare.path).expanduser().absolute()),
        'kind': raw.kind,
        'num_images': len(raw),
        'listing': listing.hexdigest(),  # of the images' names and classes, and the order of the classes
        'files': stamps.hexdigest(),  # of the files' sizes and times, or their checksums
        'image_size': data.image_size,
        'image_channels': data.image_channels,
        'resampling': data.resampling,
        'upsample': data.upsample,
        'num_shards': asked or default_shards(len(raw)),
    }


def _write_shards(work, num_workers):
    """Write the shards that do not exist yet, in this process or in several."""
    results = [work.result(shard) for shard in range(work.num_shards)]
    missing = [shard for shard, result in enumerate(results) if result is None]
    finished = [result for result in results if result is not None]
    if finished:
        print(f'resuming: {len(finished)} of {len(results)} shards done', flush=True)
    skipped = sum(len(result['skipped']) for result in finished)
    lines = _Lines(len(work.raw), sum(result['count'] for result in finished) + skipped, skipped)
    num_workers = min(num_workers, len(missing))
    if num_workers > 1:
        workers.run(work.write, missing, num_workers, lines.add)
    else:
        for shard in missing:
            work.write(shard, lines.add)
    lines.show()


class _Lines:
    """A counter of images that prints a progress line when the percentage changes, every 2 to 10 seconds."""

    def __init__(self, total, done, skipped):
        self._done, self._skipped, self._shown = done, skipped, -1
        self._progress = Progress(total, done)

    def add(self, done, skipped):
        """Count images, and perhaps print a line."""
        self._done, self._skipped = self._done + done, self._skipped + skipped
        seconds = self._progress.seconds()
        percent, shown = (100 * done // self._progress.total for done in (self._done, self._shown))
        if seconds > 10 or (seconds > 2 and percent != shown):
            self.show()

    def show(self):
        """Print a line, unless nothing was done since the last."""
        total, done = self._progress.total, self._done
        if done == self._shown:
            return
        self._shown = done
        rate, left = self._progress.rate(done)
        print(f'prepared {done}/{total}  {rounded(rate)} images/s  {self._skipped} skipped  {left} left', flush=True)


def _finish(work, target):
    """Make the shards a data set, visible at once and as a whole; return the report."""
    if (work.label_ids != target.label_ids(work.raw.class_names)).any():
        raise UserError(
            f'the order of the classes in {target.folder} has changed meanwhile; delete {work.folder} and start again.'
        )
    results = [work.result(shard) for shard in range(work.num_shards)]
    report = make_report(work, results, target.class_names)
    if not report['written']:
        shutil.rmtree(work.folder)
        name, reason = report['skipped'][0]
        raise UserError(f'none of the {len(work.raw)} images can be used; {printable(name)}: {reason}.{_hint(report)}')
    files.write_json(work.folder / f'prepared-{work.split}.json', report)
    lengths, num_bytes = [result['count'] for result in results], sum(result['num_bytes'] for result in results)
    settings = work.settings
    description = (
        f'{report["written"]} images of {Path(settings["path"]).name!r} ({settings["kind"]}), resampled by '
        f'{settings["resampling"]!r} to {settings["image_size"]}x{settings["image_size"]}, as PNG.'
    )
    tfds_writer.write_metadata(target, work.folder, work.split, lengths, num_bytes, description)
    if target.prepared_splits():
        _move_into(work, target.folder)
    else:
        os.rename(work.folder, target.folder)
        for left in ('progress', 'settings.json', 'lock'):
            shards.remove(target.folder / left)
    tfds_writer.sync_folder(target.folder.parent)
    return report


def _move_into(work, folder):
    """Add a split to a data set: its files first, and last dataset_info.json, which names them."""
    for name in [work.shard_name(shard) for shard in range(work.num_shards)] + [f'prepared-{work.split}.json']:
        if (work.folder / name).exists():
            os.replace(work.folder / name, folder / name)
    tfds_writer.sync_folder(folder)
    os.replace(work.folder / 'dataset_info.json', folder / 'dataset_info.json')
    shutil.rmtree(work.folder)


def make_report(work, results, class_names):
    """Return the content of prepared-<split>.json."""
    classes = collections.Counter()
    for result in results:
        classes.update({class_names[int(label)]: count for label, count in result['classes'].items()})
    return {
        'settings': work.settings,
        'written': sum(result['count'] for result in results),
        'classes': {name: classes[name] for name in class_names},
        'content': [result.get('content') for result in results],  # a checksum of each shard's images in the archive
        'skipped': [entry for result in results for entry in result['skipped']],
        'ignored': [list(entry) for entry in work.raw.ignored],
    }


def _hint(report):
    """Return advice if most images were too small, else ''."""
    small = sum(reason.startswith('smaller than') for _, reason in report['skipped'])
    if 2 * small <= report['settings']['num_images']:
        return ''
    return f' {small} are too small: set config.data.upsample=True or a smaller config.data.image_size.'


def _print_report(report, path, seconds):
    """Print how many images were prepared, which were skipped and why, and where the report is."""
    skipped = report['skipped']
    total = report['settings']['num_images']
    print(f'prepared {report["written"]} of {total} images in {duration(seconds)}: {printable(str(path.parent))}')
    # the text after a colon differs from image to image
    for reason, count in collections.Counter(re.split(':', reason)[0] for _, reason in skipped).most_common():
        print(f'skipped {count}: {reason}')
    for name, reason in skipped[:10]:
        print(f'  {printable(name)}: {reason}')
    for line in raw_images.notes(report['classes'], report['classes'].values(), report['ignored']):
        print(line)
    if hint := _hint(report):
        print(f'most were skipped:{hint}')
    print(f'report: {printable(str(path))}', flush=True)
