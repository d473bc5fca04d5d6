"""A deterministic Grain pipeline from a source to batches, whose position can be saved."""

import math
import multiprocessing.dummy  # Grain's threads would import this and `popen_spawn_posix`, at once
import multiprocessing.popen_spawn_posix
import signal
import threading

import grain
import numpy as np
from PIL import Image

from cfg_jax.data.workers import end_with_parent


class IndexShare:
    """A sequence; item n: the indices of this process's rows of batch n, int64 [b]. Other rows are not computed."""

    def __init__(self, indices, batch_size, rows):
        self.indices, self.batch_size, self.rows = indices, batch_size, rows

    def __len__(self):
        return len(self.indices) // self.batch_size

    def __getitem__(self, n):
        return np.array([self.indices[i] for i in (n * self.batch_size + self.rows).tolist()])


class ReadImages(grain.transforms.Map):
    """Read the images of these indices from the source."""

    def __init__(self, source):
        self.source = source
        source.import_readers()

    def __setstate__(self, state):
        self.__dict__ = state
        if multiprocessing.parent_process() is not None:  # in one of Grain's workers
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group: the parent still saves
                    signal.signal(number, signal.SIG_IGN)
            end_with_parent()
        self.source.import_readers()  # in a new worker its reading threads have not started yet

    def map(self, indices):
        return self.source.batch(indices)


class RandomFlip(grain.transforms.RandomMap):
    """Mirror each image left to right with probability 1/2. Draws for the global batch, and uses these rows of it."""

    def __init__(self, batch_size, rows):
        self.batch_size, self.rows = batch_size, rows

    def random_map(self, batch, rng: np.random.Generator):
        flipped = rng.random(self.batch_size)[self.rows] < 0.5
        pixels = batch['image'].view(f'V{batch["image"].shape[-1]}')  # a pixel is moved as one value, in half the time
        pixels[flipped] = pixels[flipped, :, ::-1]
        return batch


class RandomCrop(grain.transforms.RandomMap):
    """Cut a random square of `smallest` to 1 times each image's side, and resize it (bicubic) to the image's size.

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
    """An endless iterator over the batches of a Grain data set. `position` is the number of the next one."""

    def __init__(self, dataset, *, num_threads, num_workers):
        self._dataset, self._num_threads, self._num_workers = dataset, num_threads, num_workers
        self._iterator = None
        self.seek(0)

    def seek(self, position):
        """Make batch `position`, from 0, the next. Batch n is the same however it is reached and read."""
        self.close()
        self.position = position
        # As many batches ahead as there are threads: at 256x256 each of them is 50 MB.
        reading = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=self._num_threads)
        batches = self._dataset[position:].to_iter_dataset(reading)
        if self._num_workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        self._iterator = iter(batches)

    def close(self):
        """Stop threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None  # Grain's iterators complain if they outlive the interpreter's modules

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._iterator)
        if self._num_workers:  # out of memory that workers share: JAX's CPU arrays would hold on to it, up to the exit
            batch = {key: np.array(values) for key, values in batch.items()}
        self.position += 1
        return batch


def train_batches(source, *, batch_size, seed, rows=None, flip=False, random_crop=False, num_threads=0, num_workers=0):
    """Return the `Batches` of a `sources.Source`, or this process's part of each, reshuffled every epoch.

    batch_size: images of all processes. rows: int [b], the rows of each batch that this process reads; all by default.
    Yields {'image': uint8 [b, H, W, C], 'label': int32 [b]}. Batch n of all processes together depends on n, seed and
    batch_size alone, not on threads, workers or the number of processes. The stream continues from epoch to epoch
    without a gap: each epoch shows every image exactly once, and a batch may hold the end of one and the start of the
    next.
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
