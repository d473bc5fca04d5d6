"""Class names and labels of images: from class folders, from a labels.json, or from the lists that TFDS comes with."""

import contextlib
import json
import os
import re

from cfg_jax.data.preparing.raw_images import SUFFIXES, is_image_name
from cfg_jax.errors import first_line, printable, unusable
from cfg_jax.files import composed

SPLIT_NAMES = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
MAX_CLASSES = 1_000_000  # a larger id is taken for a mistake


def tfds_lines(path):
    """Return the lines of a list that TFDS comes with."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(path).read_text().split()


def natural(text):
    """Return a sort key that puts 'class 2' before 'class 10'; names without digits stay in the order of their text."""
    parts = re.split(r'(\d+)', text)
    parts[1::2] = map(int, parts[1::2])
    return parts, text


def find_labels(files, read):
    """Return which of the files gives images their labels, or None. A dataset.json may hold something else."""
    if 'labels.json' in files:
        return 'labels.json'
    if 'dataset.json' in files:
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, IndexError):
            name, _ = json.loads(read('dataset.json'))['labels'][0]
            if isinstance(name, str):
                return 'dataset.json'  # StyleGAN's, which also exists without labels
    return None


def organise(files, read, path, field, unfit=()):
    """Return (class names, names of images, their labels, ignored) of files by their names.

    read: a function from a name to the file's bytes. unfit: (name, reason) of entries that are no files.
    """
    names = sorted(filter(is_image_name, files))
    labels_file = find_labels(files, read)
    others = [(name, 'not an image by its name') for name in files if not is_image_name(name) and name != labels_file]
    ignored = sorted([*others, *unfit])
    if not names:
        beside = f'; it holds {len(ignored)} other files, the first {printable(ignored[0][0])}' if ignored else ''
        raise unusable(path, f'holds no images ({", ".join(suffix[1:] for suffix in SUFFIXES)}){beside}', field)
    origin = path if labels_file is None else os.path.join(path, labels_file)
    if labels_file is None:
        class_names, labels = _from_folders(names, path, field)
    else:
        class_names, labels = _from_json(read(labels_file), names, origin, field)
    for name in class_names:
        if not name.strip() or name.splitlines() != [name]:
            raise unusable(origin, f'has a class called {name!r}: class names must be one line and not blank', field)
    return class_names, names, labels, ignored


def _from_folders(names, path, field):
    """Return (class names, labels) from each image's top folder."""
    loose = [name for name in names if '/' not in name]
    folders = [composed(name.partition('/')[0]) for name in names]
    class_names = sorted({folder for folder, name in zip(folders, names) if '/' in name}, key=natural)
    if loose and class_names:
        raise unusable(
            path,
            f'holds {len(loose)} loose images, the first {loose[0]}, beside {len(class_names)} class folders, the '
            f'first {class_names[0]}: put every image into a class folder, or none and add labels.json',
            field,
        )
    if loose:
        return ['images'], [0] * len(names)
    if {name.lower() for name in class_names} <= SPLIT_NAMES and all(name.count('/') > 1 for name in names):
        raise unusable(path, f'holds splits ({", ".join(class_names)}), not classes: give the folder of one', field)
    ids = {name: index for index, name in enumerate(class_names)}
    return class_names, [ids[folder] for folder in folders]


def _from_json(text, names, path, field):
    """Return (class names, labels) of the images `names` from a labels.json, which must name exactly these images.

    The two Unicode spellings of a name, composed and decomposed, are one name.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unusable(path, f'is not JSON: {first_line(error)}', field) from error
    if not isinstance(content, dict):
        raise unusable(path, 'must map file names to labels, or hold {"labels": [[file name, id], ...]}', field)
    class_names = content.pop('class_names', None)
    by_name = _labels_by_name(content, path, field)

    found = {name: composed(name) for name in names}
    absent = sorted(by_name.keys() - set(found.values()))
    if absent:
        raise unusable(path, f'names {len(absent)} images that do not exist, the first {absent[0]}', field)
    unnamed = [name for name in names if found[name] not in by_name]
    if unnamed:
        raise unusable(path, f'leaves {len(unnamed)} images without a label, the first {unnamed[0]}', field)
    if class_names is not None and not _are_names(class_names):
        raise unusable(path, 'has "class_names" that are not a list of different names', field)
    class_names = class_names and [composed(name) for name in class_names]
    labels = [by_name[found[name]] for name in names]
    if isinstance(labels[0], int):
        return _check_ids(labels, class_names, path, field)
    class_names = sorted(set(labels), key=natural) if class_names is None else class_names
    ids = {name: index for index, name in enumerate(class_names)}
    unknown = sorted(set(labels) - ids.keys())
    if unknown:
        raise unusable(path, f'has labels that "class_names" lacks, the first {unknown[0]!r}', field)
    return class_names, [ids[label] for label in labels]


def _are_names(class_names):
    """Return True for a list of different strings."""
    return (
        isinstance(class_names, list)
        and all(isinstance(name, str) for name in class_names)
        and len(set(map(composed, class_names))) == len(class_names)
    )


def _labels_by_name(content, path, field):
    """Return {file name: label} of either form of labels.json; labels are all class names or all ids."""
    if isinstance(content.get('labels'), list):
        pairs = content['labels']
    else:
        pairs = [[name, label] for name, label in content.items()]
    by_name = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, str)):
            raise unusable(path, f'must give each file a class name or an id, but has {json.dumps(pair)[:80]}', field)
        name, label = composed(pair[0]), composed(pair[1]) if isinstance(pair[1], str) else pair[1]
        if by_name.setdefault(name, label) != label:
            raise unusable(path, f'gives {pair[0]} two labels', field)
    if len({type(label) for label in by_name.values()}) > 1:
        raise unusable(path, 'mixes class names and ids: use one or the other', field)
    return by_name


def _check_ids(labels, class_names, path, field):
    """Return (class names, labels) of labels that are ids; the ids are the names unless names are given."""
    end = MAX_CLASSES if class_names is None else len(class_names)
    wrong = [label for label in labels if not 0 <= label < end]
    if wrong:
        raise unusable(path, f'has the label {wrong[0]}; ids are 0 to {end - 1}', field)
    return ([str(index) for index in range(max(labels) + 1)] if class_names is None else class_names), labels
