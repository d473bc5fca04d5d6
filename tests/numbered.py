"""A source of numbered images, which needs few imports: worker processes start with it."""

import numpy as np

from cfg_jax.data import sources


class Numbered(sources.Source):
    """A source whose image i is filled with i, except for a bright left column."""

    def __len__(self):
        return 50

    def batch(self, indices):
        images = np.tile(np.asarray(indices, np.uint8)[:, None, None, None], (1, 4, 4, 1))
        images[:, :, 0] = 255
        return {'image': images, 'label': np.asarray(indices, np.int32)}
