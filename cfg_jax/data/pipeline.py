"""From a source to batches: a deterministic Grain pipeline whose position can be saved."""

import math

import grain
import numpy as np
from PIL import Image


class RandomFlip(grain.transforms.RandomMap):
    """Mirrors an example's image left to right with probability 1/2."""

    def random_map(self, example, rng: np.random.Generator):
        if rng.random() < 0.5:
            return example | {'image': example['image'][:, ::-1]}
        return example


class RandomCrop(grain.transforms.RandomMap):
    """A random square of `smallest` to 1 times the image's side, resized (bicubic) to the image's size."""

    def __init__(self, smallest=0.8):
        self.smallest = smallest

    def random_map(self, example, rng: np.random.Generator):
        size = example['image'].shape[0]
        side = int(rng.integers(math.ceil(self.smallest * size), size + 1))
        top, left = rng.integers(0, size - side + 1, size=2)
        channels = np.moveaxis(example['image'][top : top + side, left : left + side], -1, 0)
        resized = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
        return example | {'image': np.stack(resized, axis=-1)}


class Batches:
    """An endless iterator over the batches of a Grain data set, whose position is their number: `seek` moves it."""

    def __init__(self, dataset, *, num_threads, num_workers):
        self._dataset, self._num_threads, self._num_workers = dataset, num_threads, num_workers
        self.seek(0)

    def seek(self, position):
        """The next batch is number `position`, from 0. Batch n is the same however it is reached, and read."""
        self.position = position
        reading = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=2 * self._num_threads)
        batches = self._dataset[position:].to_iter_dataset(reading)
        if self._num_workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        self._iterator = iter(batches)

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._iterator)
        self.position += 1
        return batch


def train_batches(
    source,
    *,
    batch_size,
    seed,
    flip=False,
    random_crop=False,
    num_threads=0,
    num_workers=0,
    process_index=0,
    process_count=1,
):
    """`Batches` of this process's share of a source, shuffled anew each epoch.

    batch_size: images of this process. Yields {'image': uint8 [b, H, W, C], 'label': int32 [b]}. Batch n depends on
    n, seed, batch_size and the number of processes alone, not on threads and workers.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()[process_index::process_count].repeat()
    if flip:
        dataset = dataset.random_map(RandomFlip())
    if random_crop:
        dataset = dataset.random_map(RandomCrop())
    dataset = dataset.batch(batch_size, drop_remainder=True)
    return Batches(dataset, num_threads=num_threads, num_workers=num_workers)
