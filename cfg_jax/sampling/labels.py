"""The classes of the images to draw: from text to label ids, checked on the host."""

import re

import numpy as np

from cfg_jax.errors import UserError


def parse_labels(text, class_names):
    """Return the label ids of a text such as '0,1,2' or 'cat,dog'; of all classes if it is empty.

    A number is read as an id, not as a class name. Raises UserError for anything that is not a class.
    """
    if not text.strip():
        return list(range(len(class_names)))
    ids = []
    for item in (item.strip() for item in text.split(',')):
        if re.fullmatch('[+-]?[0-9]+', item):
            ids.append(int(item))
        elif item in class_names:
            ids.append(class_names.index(item))
        else:
            names = ', '.join(map(repr, class_names[:10])) + (', ...' if len(class_names) > 10 else '')
            raise UserError(
                f'label {item!r} is not a class; allowed: 0 to {len(class_names) - 1} or a name of {names} '
                '(config.sample.labels).'
            )
    check_labels(ids, len(class_names))
    return ids


def check_labels(labels, num_classes):
    """Raise UserError for a label outside [0, num_classes): under jit it would clamp or become NaN in silence."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f'label {label} is not a class; allowed: 0 to {num_classes - 1} (config.sample.labels).')


def make_labels(ids, count, *, order, seed):
    """Return the label of each of `count` images, int32; image i has the same label for any count.

    ids: the classes to choose from. order: 'balanced' (in turn) or 'random' (drawn with the seed).
    """
    ids = np.array(ids, np.int32)
    if order == 'random':
        return ids[np.random.default_rng(seed).integers(0, len(ids), count)]
    return np.resize(ids, count)
