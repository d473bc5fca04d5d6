"""From a source to batches: a deterministic Grain pipeline whose position can be saved."""

import grain
import numpy as np


class RandomFlip(grain.transforms.RandomMap):
    """Mirrors an example's image left to right with probability 1/2."""

    def random_map(self, example, rng: np.random.Generator):
        if rng.random() < 0.5:
            return example | {'image': example['image'][:, ::-1]}
        return example


def train_batches(source, *, batch_size, seed, flip, num_threads=0, num_workers=0, process_index=0, process_count=1):
    """An endless iterator over this process's share of shuffled batches.

    batch_size: images of this process. Yields {'image': uint8 [b, H, W, C], 'label': int32 [b]}. The order depends on
    seed and process_count alone; each epoch is shuffled anew. `get_state`/`set_state` move the position.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()[process_index::process_count].repeat()
    if flip:
        dataset = dataset.random_map(RandomFlip())
    dataset = dataset.batch(batch_size, drop_remainder=True)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads))
    if num_workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)
