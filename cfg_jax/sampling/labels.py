"""The classes of the images to draw: from text to label ids, checked on the host."""

import functools
import re

import numpy as np

from cfg_jax.errors import UserError
from cfg_jax.files import composed


@functools.lru_cache(maxsize=8)
def _label_ids(class_names):
    """Return {class name: label id}; the two Unicode spellings of a name are one name."""
    return {composed(name): label for label, name in reversed(list(enumerate(class_names)))}


def meanings(item, class_names):
    """Return (label id, label id) of a text read as a class name and read as an id; None where it is no class.

    'name:2' and 'id:2' mean one of the two: both label ids are then the same.
    """
    kind, _, rest = item.partition(':')
    by_name = _label_ids(tuple(class_names)).get(composed(item))
    by_id = int(item) if re.fullmatch('[+-]?[0-9]+', item) and 0 <= int(item) < len(class_names) else None
    if by_name is None and kind in ('name', 'id') and rest:
        by_name = by_id = meanings(rest, class_names)[kind == 'id']
    return by_name, by_id


def parse_labels(text, class_names):
    """Return the label ids of a text such as '0,1,2' or 'cat,dog'; of all classes if it is empty.

    Names may hold commas: 'tench, Tinca tinca,goldfish'. Raises UserError for anything that is not a class, and for a
    text that may mean several classes: 'name:2' and 'id:2' tell a class's name from its id where '2' is both.
    """
    if not text.strip():
        return list(range(len(class_names)))
    pieces = text.split(',')
    longest = 1 + max(name.count(',') for name in class_names)  # pieces of one name
    steps, reached = {}, {0}  # start -> [(label id, start of the next class)]; the starts that follow a class
    for start in range(len(pieces)):
        ends = range(start + 1, min(start + longest, len(pieces)) + 1)
        steps[start] = [(label, end) for end in ends for label in _ids(','.join(pieces[start:end]), class_names)]
        if start in reached:
            reached |= {end for _, end in steps[start]}
    if len(pieces) not in reached:
        raise _not_a_class(pieces[max(reached)].strip(), class_names)
    complete = {len(pieces)}  # the starts from which everything to the end is classes
    for start in reversed(range(len(pieces))):
        steps[start] = [(label, end) for label, end in steps[start] if end in complete]
        complete |= {start} if steps[start] else set()
    labels, start = [], 0
    while start < len(pieces):
        if len(steps[start]) > 1:
            raise _ambiguous(pieces, start, steps[start], class_names)
        ((label, start),) = steps[start]
        labels.append(label)
    return labels


def _ids(item, class_names):
    """Return the different label ids that a text may mean."""
    return sorted(set(meanings(item.strip(), class_names)) - {None})


def _not_a_class(item, class_names):
    """Return the UserError for a text that is not a class."""
    if re.fullmatch('[+-]?[0-9]+', item):
        return UserError(f'label {item} is not a class; allowed: 0 to {len(class_names) - 1} (config.sample.labels).')
    names = ', '.join(map(repr, class_names[:10])) + (', ...' if len(class_names) > 10 else '')
    return UserError(
        f'label {item!r} is not a class; allowed: 0 to {len(class_names) - 1} or a name of {names} '
        '(config.sample.labels).'
    )


def _ambiguous(pieces, start, ways, class_names):
    """Return the UserError for a text that may mean several classes."""
    texts = [','.join(pieces[start:end]).strip() for _, end in ways]
    readings = ' or '.join(f'id:{label} ({class_names[label]!r})' for label, _ in ways)
    return UserError(f'label {max(texts, key=len)!r} may mean {readings}: write that instead (config.sample.labels).')


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
