"""The networks that are measured, in words that every contestant understands.

image: (channels, height, width); batch: images of a training step; sampled: images drawn at once. The rest as in
config.model. All have ADM's shape: residual blocks that resample, scale-shift norms, and attention at some sizes and in
the middle.
"""

_UNET = {'channels': 64, 'heads': 4, 'groups': 32, 'attention': (16, 8)}

SHAPES = {
    # configs/digits.py, 0.2M parameters
    'digits': {
        'image': (1, 8, 8), 'channels': 16, 'mult': (1, 2), 'blocks': 1, 'attention': (4,), 'heads': 2, 'groups': 8,
        'batch': 64, 'sampled': 64,
    },
    # 8.0M parameters
    'unet8m': {**_UNET, 'image': (3, 32, 32), 'mult': (1, 2, 2), 'blocks': 2, 'batch': 16, 'sampled': 64},
    # for memory, measured at this batch and its double, whose difference is what an image adds
    'unet64': {**_UNET, 'image': (3, 64, 64), 'mult': (1, 2, 3, 4), 'blocks': 1, 'batch': 4, 'sampled': 4},
    'unet128': {**_UNET, 'image': (3, 128, 128), 'mult': (1, 2, 3, 4), 'blocks': 1, 'batch': 2, 'sampled': 2},
}  # fmt: skip
NUM_CLASSES = 10
NULL_LABEL = 10
TASKS = ('train', 'forward', 'sample', 'memory')
