"""TFRecord files read at random, without TensorFlow."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cfg_jax.errors import UserError

_HEADER, _FOOTER = 12, 4  # a record: its length, uint64, and that number's checksum; the data; their checksum
_THREADS = 16  # the walk waits for the disk, one small read a record


class TfRecordFiles:
    """The records of some TFRecord files, by number.

    instructions: TFDS's file instructions: `filename`, `skip`, `take` (-1: all that follow), `examples_in_shard`.
    The files are walked once, from header to header. Raises UserError where one is cut short or is no TFRecord file.
    """

    def __init__(self, instructions):
        self._paths = [os.fspath(instruction.filename) for instruction in instructions]
        with ThreadPoolExecutor(_THREADS) as pool:
            spans = list(pool.map(_spans, instructions))
        self._file = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        self._spans = np.concatenate(spans)
        self._descriptors = {}

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, index):
        number, (start, length) = int(self._file[index]), self._spans[index]
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self._paths[number], os.O_RDONLY)
        return os.pread(self._descriptors[number], int(length), int(start))

    def __getstate__(self):
        return self.__dict__ | {'_descriptors': {}}  # each process opens its own


def _spans(instruction):
    """int64 [n, 2]: where the data of each record that the instruction takes starts, and how long it is."""
    path = os.fspath(instruction.filename)
    spans, position = [], 0
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            header = os.pread(file.fileno(), _HEADER, position)
            length = struct.unpack('<Q', header[:8])[0] if len(header) == _HEADER else size
            start = position + _HEADER
            position = start + length + _FOOTER
            if position > size:
                raise UserError(
                    f'{path} is damaged: record {len(spans)} ends beyond the file of {size} bytes; copy or prepare it '
                    'anew (config.data.data_dir).'
                )
            spans.append((start, length))
    if len(spans) != instruction.examples_in_shard:
        raise UserError(
            f'{path} holds {len(spans)} records and its dataset_info.json says {instruction.examples_in_shard}; copy '
            'or prepare it anew (config.data.data_dir).'
        )
    end = None if instruction.take == -1 else instruction.skip + instruction.take
    return np.array(spans[instruction.skip : end], np.int64).reshape(-1, 2)
