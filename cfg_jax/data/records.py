"""Random access to the records in the files of TFDS's data sets, TFRecord or ArrayRecord, without TensorFlow."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np

from cfg_jax.errors import UserError, first_line

_HEADER, _FOOTER = 12, 4  # bytes; a record: its length, uint64, and that number's checksum; the data; their checksum
_THREADS = 16  # opening waits for the disk: one small read per record (TFRecord) or file (ArrayRecord)


def damaged(path, what):
    """Return the UserError that says what is wrong with a record file."""
    return UserError(f'{path} is damaged: {what}; copy or prepare it again (config.data.data_dir).')


def _check_count(path, count, instruction):
    """Raise UserError unless the file holds as many records as the data set says."""
    expected = instruction.examples_in_shard
    if count != expected:
        raise damaged(path, f'it holds {count} records, but dataset_info.json says {expected}')


class TfRecordFiles:
    """A sequence of the records, bytes, of TFRecord files.

    instructions: TFDS's file instructions: `filename`, `skip`, `take` (-1: all that follow), `examples_in_shard`.
    Opening walks through each file once, from header to header. Raises UserError, also later, if a file is damaged.
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
            raise damaged(path, f'checksum mismatch in the record at byte {start}')
        return data[:length]

    def __getstate__(self):
        return self.__dict__ | {'_descriptors': {}}  # each process opens its own

    def path(self, index):
        """Return the path of the file that record `index` is in."""
        return self._paths[self._file[index]]


def _masked_checksum(data):
    """Return TFRecord's checksum of bytes as the file holds it: rotated CRC-32C plus a constant, little-endian."""
    checksum = google_crc32c.value(data)
    return struct.pack('<I', ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _spans(instruction):
    """Return int64 [n, 2]: the start and the length in bytes of the data of each record that the instruction takes."""
    path = os.fspath(instruction.filename)
    spans, position = [], 0
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            header = os.pread(file.fileno(), _HEADER, position)
            length = struct.unpack('<Q', header[:8])[0] if len(header) == _HEADER else size
            start = position + _HEADER
            if len(header) == _HEADER and _masked_checksum(header[:8]) != header[8:]:
                raise damaged(path, f'checksum mismatch in the length of record {len(spans)}')
            position = start + length + _FOOTER
            if position > size:
                raise damaged(path, f'record {len(spans)} ends beyond the file of {size} bytes')
            spans.append((start, length))
    _check_count(path, len(spans), instruction)
    end = None if instruction.take == -1 else instruction.skip + instruction.take
    return np.array(spans[instruction.skip : end], np.int64).reshape(-1, 2)


class ArrayRecordFiles:
    """A sequence of the records, bytes, of ArrayRecord files. Raises UserError, also in reading, if a file is damaged.

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
        except (RuntimeError, ValueError, IndexError) as error:  # what the library raises for a damaged file
            raise damaged(self.path(index), first_line(error).split(';')[0]) from None

    def path(self, index):
        """Return the path of the file that record `index` is in."""
        return self._paths[int(np.searchsorted(self._ends, index, side='right'))]


def _check_array_record(instruction):
    """Raise UserError unless the index at the file's end is whole and has as many records as the data set says."""
    from array_record.python.array_record_module import ArrayRecordReader

    path = os.fspath(instruction.filename)
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise damaged(path, first_line(error).split(';')[0]) from None
    _check_count(path, count, instruction)
