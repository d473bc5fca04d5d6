"""From a source to batches: a deterministic Grain pipeline whose position can be saved."""

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

import grain
import numpy as np
from PIL import Image


class IndexShare:
    """The indices of this process's rows of batch n of a stream, int64 [b]; nothing is computed of the others'."""

    def __init__(self, indices, batch_size, rows):
        self.indices, self.batch_size, self.rows = indices, batch_size, rows

    def __len__(self):
        return len(self.indices) // self.batch_size

    def __getitem__(self, n):
        return np.array([self.indices[i] for i in (n * self.batch_size + self.rows).tolist()])


class ReadImages(grain.transforms.Map):
    """The images of these indices, read from the source."""

    def __init__(self, source):
        self.source = source

    def __setstate__(self, state):
        self.__dict__ = state
        _end_with_the_parent()

    def map(self, indices):
        return self.source.batch(indices)


def _end_with_the_parent():
    """In one of Grain's worker processes: lets it end when its parent is gone, even by SIGKILL, and not before."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a group: the parent still saves

    def wait():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class RandomFlip(grain.transforms.RandomMap):
    """Mirrors each image left to right with probability 1/2. Draws for the global batch, and uses these rows of it."""

    def __init__(self, batch_size, rows):
        self.batch_size, self.rows = batch_size, rows

    def random_map(self, batch, rng: np.random.Generator):
        flipped = rng.random(self.batch_size)[self.rows] < 0.5
        pixels = batch['image'].view(f'V{batch["image"].shape[-1]}')  # moved whole, in half the time
        pixels[flipped] = pixels[flipped, :, ::-1]
        return batch


class RandomCrop(grain.transforms.RandomMap):
    """A random square of `smallest` to 1 times each image's side, resized (bicubic) to the image's size.

    Draws for the global batch, and uses these rows of it.
    """

    def __init__(self, batch_size, rows, smallest=0.8):
        self.batch_size, self.rows, self.smallest = batch_size, rows, smallest

    def random_map(self, batch, rng: np.random.Generator):
        size = batch['image'].shape[1]
        sides = rng.integers(math.ceil(self.smallest * size), size + 1, self.batch_size)[:, None]
        corners = rng.integers(0, size - sides + 1, (self.batch_size, 2))
        squares = np.concatenate([corners, sides], axis=1)[self.rows]
        images = [self._crop(image, *square) for image, square in zip(batch['image'], squares)]
        return batch | {'image': np.stack(images)}

    def _crop(self, image, top, left, side):
        size = image.shape[0]
        channels = np.moveaxis(image[top : top + side, left : left + side], -1, 0)
        resized = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
        return np.stack(resized, axis=-1)


class Batches:
    """An endless iterator over the batches of a Grain data set, whose position is their number: `seek` moves it."""

    def __init__(self, dataset, *, num_threads, num_workers):
        self._dataset, self._num_threads, self._num_workers = dataset, num_threads, num_workers
        self.seek(0)

    def seek(self, position):
        """The next batch is number `position`, from 0. Batch n is the same however it is reached, and read."""
        self.position = position
        # As many batches ahead as there are threads: at 256x256 each of them is 50 MB.
        reading = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=self._num_threads)
        batches = self._dataset[position:].to_iter_dataset(reading)
        if self._num_workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        self._iterator = iter(batches)

    def close(self):
        """Stops threads and workers."""
        self._iterator.close()

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._iterator)
        self.position += 1
        return batch


def train_batches(source, *, batch_size, seed, rows=None, flip=False, random_crop=False, num_threads=0, num_workers=0):
    """`Batches` of a `sources.Source`, or of this process's part of each, shuffled anew each epoch.

    batch_size: images of all processes. rows: the numbers of those that this process has, int [b]; all of them unless
    given. Yields {'image': uint8 [b, H, W, C], 'label': int32 [b]}. Batch n of all processes together depends on n,
    seed and batch_size alone: not on threads, workers or the number of processes. The stream runs through the epochs
    without a gap, so that each shows every image exactly once, even where a batch holds the end of one and the start of
    the next.
    """
    rows = np.arange(batch_size) if rows is None else rows
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    shares = grain.MapDataset.source(IndexShare(indices, batch_size, rows)).seed(seed)
    dataset = shares.map(ReadImages(source))
    if flip:
        dataset = dataset.random_map(RandomFlip(batch_size, rows))
    if random_crop:
        dataset = dataset.random_map(RandomCrop(batch_size, rows))
    return Batches(dataset, num_threads=num_threads, num_workers=num_workers)
