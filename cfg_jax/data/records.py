"""Random access to the records in the files of TFDS's data sets, TFRecord or ArrayRecord, without TensorFlow."""

import collections
import os
import resource
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from cfg_jax.errors import UserError, first_line, system_error, unusable

_HEADER, _FOOTER = 12, 4  # bytes; a record: its length, uint64, and that number's checksum; the data; their checksum
_THREADS = 16  # opening waits for the disk: one small read per record (TFRecord) or file (ArrayRecord)
_MAX_OPEN = 4096


def damaged(path, what):
    """Return the UserError that says what is wrong with a record file."""
    return UserError(f'{path} is damaged: {what}; copy or prepare it again (config.data.data_dir).')


def cannot_read(path, error):
    """Return the UserError for a record file after an exception: the system's reason if it has one, or else damage."""
    if code := system_error(error):
        return unusable(path, f'cannot be read: {os.strerror(code)}', 'config.data.data_dir')
    return damaged(path, first_line(error).split(';')[0])


class _OpenFiles:
    """A function from a path to its open file that keeps the last used ones open. Threads share it.

    open_file: path -> file, which closes once nothing refers to it. It is kept open while no more than a quarter of the
    files that this process may open are; that limit is raised as far as the system lets us if there are more paths.
    """

    def __init__(self, open_file, num_paths):
        self._open_file, self._num_paths = open_file, num_paths
        self.__setstate__({})

    def __getstate__(self):
        return {'_open_file': self._open_file, '_num_paths': self._num_paths}  # each process opens its own

    def __setstate__(self, state):
        self.__dict__ |= state
        self._kept, self._lock, self._max_open = collections.OrderedDict(), threading.Lock(), None

    def __call__(self, path):
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
                return self._kept[path]
            if self._max_open is None:
                self._max_open = _allowed_files(self._num_paths)
        file = self._open_file(path)  # several threads may open it at once, and each then uses its own
        with self._lock:
            self._kept[path] = file
            while len(self._kept) > self._max_open:
                self._kept.popitem(last=False)
        return file


def _allowed_files(wanted):
    """Return how many of the `wanted` files may be open at once; raise this process's soft limit if that helps."""
    wanted = min(wanted, _MAX_OPEN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 4 * wanted:
        raised = 4 * wanted if hard == resource.RLIM_INFINITY else min(4 * wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):
            pass  # the system has a lower limit of its own
        return min(wanted, max(soft // 4, 1))
    return wanted


class _Descriptor:
    """A file opened for reading at any place; it closes once nothing refers to it."""

    def __init__(self, path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, 'number'):
            os.close(self.number)


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
        self._open = _OpenFiles(_Descriptor, len(self._paths))

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, index):
        number, (start, length) = int(self._file[index]), self._spans[index].tolist()
        path = self._paths[number]
        try:
            file = self._open(path)
            data = os.pread(file.number, length + _FOOTER, start)
        except OSError as error:
            raise cannot_read(path, error) from error
        if _masked_checksum(data[:length]) != data[length:]:
            raise damaged(path, f'checksum mismatch in the record at byte {start}')
        return data[:length]

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
    try:
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
    except OSError as error:
        raise cannot_read(path, error) from error
    _check_count(path, len(spans), instruction)
    end = None if instruction.take == -1 else instruction.skip + instruction.take
    return np.array(spans[instruction.skip : end], np.int64).reshape(-1, 2)


class ArrayRecordFiles:
    """A sequence of the records, bytes, of ArrayRecord files. Raises UserError, also in reading, if a file is damaged.

    instructions: as for `TfRecordFiles`.
    """

    def __init__(self, instructions):
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(_check_array_record, instructions))
        self._paths = [os.fspath(instruction.filename) for instruction in instructions]
        self._skips = [instruction.skip for instruction in instructions]
        self._ends = np.cumsum([instruction.take for instruction in instructions])
        self._open = _OpenFiles(_array_record_reader, len(self._paths))

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, index):
        number = int(np.searchsorted(self._ends, index, side='right'))
        path, start = self._paths[number], int(self._ends[number - 1]) if number else 0
        try:
            (record,) = self._open(path).read([self._skips[number] + index - start])
            return record
        except (RuntimeError, ValueError, OSError) as error:  # what the library raises for a damaged file
            raise cannot_read(path, error) from None

    def path(self, index):
        """Return the path of the file that record `index` is in."""
        return self._paths[int(np.searchsorted(self._ends, index, side='right'))]


def _array_record_reader(path):
    """Return ArrayRecord's reader of a file, with its settings for random access; raises RuntimeError."""
    reader = ArrayRecordReader(os.fsencode(path), 'readahead_buffer_size:0', file_reader_buffer_size=32768)
    if not reader.ok():
        reader.read([0])  # raises the reason why it cannot be opened
    return reader


def _check_array_record(instruction):
    """Raise UserError unless the index at the file's end is whole and has as many records as the data set says."""
    path = os.fspath(instruction.filename)
    try:
        reader = ArrayRecordReader(os.fsencode(path))
        count = reader.num_records()
        if not count:  # also if it cannot be opened, which only reading tells
            reader.read([0])
        reader.close()
    except (RuntimeError, IndexError) as error:
        raise cannot_read(path, error) from None
    _check_count(path, count, instruction)
