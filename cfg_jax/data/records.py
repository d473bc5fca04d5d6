"""The files of TFDS's data sets, TFRecord or ArrayRecord, read at random, without TensorFlow."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np

from cfg_jax.errors import UserError, first_line

_HEADER, _FOOTER = 12, 4  # a record: its length, uint64, and that number's checksum; the data; their checksum
_THREADS = 16  # opening waits for the disk: for one small read a record, or a file


def damaged(path, what):
    """The error that says in one line what is wrong with a file."""
    return UserError(f'{path} is damaged: {what}; copy or prepare it anew (config.data.data_dir).')


def _check_count(path, count, instruction):
    if count != instruction.examples_in_shard:
        expected = instruction.examples_in_shard
        raise damaged(path, f'it holds {count} records and its dataset_info.json says {expected}')


class TfRecordFiles:
    """The records of some TFRecord files, by number.

    instructions: TFDS's file instructions: `filename`, `skip`, `take` (-1: all that follow), `examples_in_shard`.
    The files are walked once, from header to header. Raises UserError where one is damaged, also as it is read.
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
        number, (start, length) = int(self._file[index]), self._spans[index].tolist()
        path = self._paths[number]
        try:
            if number not in self._descriptors:
                self._descriptors[number] = os.open(path, os.O_RDONLY)
            data = os.pread(self._descriptors[number], length + _FOOTER, start)
        except OSError as error:
            raise damaged(path, f'cannot be read: {error.strerror}') from error
        if _masked_checksum(data[:length]) != data[length:]:
            raise damaged(path, f'the checksum of the record at byte {start} does not fit')
        return data[:length]

    def __getstate__(self):
        return self.__dict__ | {'_descriptors': {}}  # each process opens its own

    def path(self, index):
        """The file that record `index` is in."""
        return self._paths[self._file[index]]


def _masked_checksum(data):
    """TFRecord's checksum of bytes, as it stands in the file: rotated CRC-32C plus a constant, little-endian."""
    checksum = google_crc32c.value(data)
    return struct.pack('<I', ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


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
            if len(header) == _HEADER and _masked_checksum(header[:8]) != header[8:]:
                raise damaged(path, f'the checksum of the length of record {len(spans)} does not fit')
            position = start + length + _FOOTER
            if position > size:
                raise damaged(path, f'record {len(spans)} ends beyond the file of {size} bytes')
            spans.append((start, length))
    _check_count(path, len(spans), instruction)
    end = None if instruction.take == -1 else instruction.skip + instruction.take
    return np.array(spans[instruction.skip : end], np.int64).reshape(-1, 2)


class ArrayRecordFiles:
    """The records of some ArrayRecord files, by number. Raises UserError where one is damaged, also as it is read.

    instructions: as for `TfRecordFiles`.
    """

    def __init__(self, instructions):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(_check_array_record, instructions))
        self._paths = [os.fspath(instruction.filename) for instruction in instructions]
        self._ends = np.cumsum([instruction.take for instruction in instructions])
        self._records = ArrayRecordDataSource(instructions)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        try:
            return self._records[index]
        except (RuntimeError, ValueError, IndexError) as error:  # the library's kinds for what it finds in a file
            raise damaged(self.path(index), first_line(error).split(';')[0]) from None

    def path(self, index):
        """The file that record `index` is in."""
        return self._paths[int(np.searchsorted(self._ends, index, side='right'))]


def _check_array_record(instruction):
    """UserError unless the file's index, at its end, is whole and has as many records as the data set should."""
    from array_record.python.array_record_module import ArrayRecordReader

    path = os.fspath(instruction.filename)
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise damaged(path, first_line(error).split(';')[0]) from None
    _check_count(path, count, instruction)
