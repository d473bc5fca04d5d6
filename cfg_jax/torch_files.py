"""Reader of `torch.save` files that needs no torch and runs no code from the file.

A .pt file is a pickle, and a pickle is a program. This module never unpickles: it interprets the few instructions that
describe a dictionary of tensors, refuses all others, and calls nothing that a file names. Tensors are views of the
memory-mapped file. Every fault of a file is reported as a `UserError` of one line.
"""

import io
import math
import pickletools
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from cfg_jax import files
from cfg_jax.errors import UserError

# ---------------------------------------------------------------- the pickle: instructions for a dictionary of tensors

_MAX_INSTRUCTIONS = 1_000_000  # limits the time a hostile file can take; ADM's largest checkpoint has about 40,000
_LITERALS = {
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
}  # fmt: skip
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_DTYPES = {
    'torch FloatStorage': '<f4', 'torch HalfStorage': '<f2', 'torch DoubleStorage': '<f8',
    'torch BFloat16Storage': '<u2', 'torch LongStorage': '<i8', 'torch IntStorage': '<i4', 'torch ShortStorage': '<i2',
    'torch CharStorage': 'i1', 'torch ByteStorage': 'u1', 'torch BoolStorage': '?',
}  # fmt: skip


class _Name(NamedTuple):
    """'module name' of an object that the pickle refers to; it is never looked up."""

    text: str


class _Storage(NamedTuple):
    """A run of `size` numbers; `view` is None for all of it, or (offset, size) of a part."""

    key: str
    kind: str
    size: int
    view: tuple | None


class _Tensor(NamedTuple):
    storage: _Storage
    offset: Any
    shape: Any
    strides: Any  # in numbers, not bytes


def _is_count(value):
    return type(value) is int and value >= 0


def _are_counts(values):
    return isinstance(values, tuple) and all(map(_is_count, values))


def _read_pickle(stream):
    """Return the value of one pickle: dicts, lists, tuples, literals, `_Name`s, `_Storage`s and `_Tensor`s."""
    stack, marks, memo = [], [], {}

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _MAX_INSTRUCTIONS:
            raise ValueError(f'its pickle has more than {_MAX_INSTRUCTIONS} instructions')
        match opcode.name:
            case 'PROTO' | 'FRAME':
                pass
            case 'MARK':
                marks.append(len(stack))
            case name if name in _LITERALS:
                stack.append(argument)
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE' as name:
                stack.append(_CONSTANTS[name])
            case 'EMPTY_TUPLE':
                stack.append(())
            case 'EMPTY_DICT':
                stack.append({})
            case 'EMPTY_LIST':
                stack.append([])
            case 'TUPLE':
                stack.append(tuple(since_mark()))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3' as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'GLOBAL':
                stack.append(_Name(argument))
            case 'STACK_GLOBAL':
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(f'{module} {name}' if isinstance(module, str) and isinstance(name, str) else '?'))
            case 'BINPERSID':
                stack.append(_storage(stack.pop()))
            case 'REDUCE':
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, arguments))
            case 'BUILD':  # attributes of a state dict (`_metadata`, torch's version numbers) are dropped
                stack.pop()
                _container(stack, dict)
            case 'SETITEM':
                value, key = stack.pop(), stack.pop()
                _set_items(_container(stack, dict), [key, value])
            case 'SETITEMS':
                items = since_mark()
                _set_items(_container(stack, dict), items)
            case 'APPEND':
                value = stack.pop()
                _container(stack, list).append(value)
            case 'APPENDS':
                items = since_mark()
                _container(stack, list).extend(items)
            case 'STOP':
                return stack.pop()
            case name:
                raise ValueError(f'its pickle has the instruction {name}, which a state dict never needs')
    raise ValueError('its pickle has no end')  # genops itself normally raises first


def _container(stack, kind):
    if not isinstance(stack[-1], kind):
        raise ValueError(f'its pickle adds items to something that is not a {kind.__name__}')
    return stack[-1]


def _set_items(target, items):
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, (str, int)):  # so that nothing deeply nested is hashed or compared
            raise ValueError('its pickle has a key that is neither a string nor an integer')
        target[key] = value


def _reduce(function, arguments):
    """Return the equivalent of calling `function`, a name in the file: three are imitated, none is ever called."""
    name = function.text if isinstance(function, _Name) else '?'
    if isinstance(arguments, tuple):
        if name == 'collections OrderedDict' and not arguments:
            return {}
        if name == 'torch._utils _rebuild_tensor_v2' and len(arguments) >= 6 and isinstance(arguments[0], _Storage):
            return _Tensor(*arguments[:4])
        if name == 'torch._utils _rebuild_parameter' and len(arguments) == 3 and isinstance(arguments[0], _Tensor):
            return arguments[0]
    raise ValueError(
        f'its pickle calls {ascii(name)[1:-1][:80]!r}, as a whole pickled module does; '
        'save the state dict (tensors by name) instead'
    )


def _storage(identity):
    """Parse ('storage', type, key, device, size[, None or (view key, offset, size)]) into a `_Storage`."""
    match identity:
        case ('storage', _Name(kind), str(key), _, size) | ('storage', _Name(kind), str(key), _, size, None):
            view = None
        case ('storage', _Name(kind), str(key), _, size, (_, offset, length)) if _are_counts((offset, length)):
            view = (offset, length)
        case _:
            raise ValueError('its pickle refers to an object that is not the storage of a tensor')
    if kind not in _DTYPES or not _is_count(size):
        raise ValueError(f'its pickle has a storage of the unsupported type {ascii(kind)[1:-1][:80]!r}')
    return _Storage(key, kind, size, view)


# ---------------------------------------------------------------- the file: a zip archive, or torch 1.5's format

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ('module.', '_orig_mod.')  # DataParallel and DistributedDataParallel, torch.compile


def load_openai_state_dict(path):
    """Read {name: array} from a state dict saved by `torch.save`, without torch and without running the file's code.

    The arrays are read-only views of the memory-mapped file, in the stored dtype; bfloat16 becomes float32. A prefix
    that torch's wrappers put before every name, such as DataParallel's 'module.', is left out.
    Raises UserError if the file is missing, damaged, or anything but a flat dictionary of dense tensors.
    """
    try:
        data = np.memmap(path, np.uint8, mode='r')
        return _unwrapped(_read_zip(data, path) if bytes(data[:2]) == b'PK' else _read_legacy(data))
    except Exception as error:  # a hostile file makes the standard library raise many kinds
        raise unreadable(path, error, 'a state dict saved by torch.save') from error


def _unwrapped(state_dict):
    """Return the state dict without the prefixes of DataParallel and torch.compile, if every name has them."""
    while prefix := next((each for each in _WRAPPERS if all(name.startswith(each) for name in state_dict)), ''):
        state_dict = {name.removeprefix(prefix): array for name, array in state_dict.items()}
    return state_dict


def mismatches(state_dict, shapes, unused=()):
    """List the tensors that are missing, surplus, misshapen or not floating-point, one message each.

    state_dict: {name: array}; shapes: {name: shape} of what is needed; unused: further names that may be present.
    """
    problems = [f'{name} is missing' for name in shapes if name not in state_dict]
    surplus = state_dict.keys() - shapes.keys() - set(unused)
    problems += [f'{ascii(name)[1:-1][:80]} is not part of this network' for name in state_dict if name in surplus]
    for name, shape in shapes.items():
        array = state_dict.get(name)
        if array is not None and array.shape != shape:
            problems.append(f'{name} has the shape {array.shape}, not {shape}')
        elif array is not None and array.dtype.kind != 'f':
            problems.append(f'{name} holds {array.dtype}, not floating-point numbers')
    return problems


def not_finite(arrays):
    """List the arrays that hold NaN or infinity, or would as float32, one message each. arrays: {name: array}."""
    problems = []
    for name, array in arrays.items():
        with np.errstate(over='ignore', invalid='ignore'):
            count = np.size(array) - int(np.isfinite(np.asarray(array, np.float32)).sum())
        if count:
            problems.append(
                f'{ascii(name)[1:-1][:80]} holds NaN or infinity ({count:,} of its {np.size(array):,} numbers)'
            )
    return problems


def unreadable(path, error, expected):
    """Return a UserError of one line that says why a file cannot be read, with control characters replaced."""
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    if not isinstance(error, (OSError, ValueError, zipfile.BadZipFile)):
        reason = f'damaged ({reason})'
    reason = ''.join(c if c.isprintable() else '?' for c in ' '.join(str(reason).split())[:300])
    return UserError(f'{path}: cannot be read: {reason}; expected: {expected}')


def _read_zip(data, path):
    """Read a zip archive: <name>/data.pkl is the dictionary, <name>/data/<key> the numbers of each storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    if sum(info.file_size for info in members.values()) > data.size:
        raise ValueError('the archive lists more bytes than the file has (compressed or damaged)')
    roots = [name[: -len('data.pkl')] for name in members if name.split('/')[1:] == ['data.pkl']]
    if len(roots) != 1:
        raise ValueError('a zip archive without exactly one data.pkl, as torch.save writes')
    if f'{roots[0]}byteorder' in members and bytes(_member(data, members[f'{roots[0]}byteorder'])) != b'little':
        raise ValueError('big-endian numbers are not supported')
    tensors = _read_pickle(io.BytesIO(bytes(_member(data, members[f'{roots[0]}data.pkl']))))

    def numbers(storage):
        if (name := f'{roots[0]}data/{storage.key}') not in members:
            raise ValueError(f'the archive lacks {ascii(name)[:80]}')
        return _member(data, members[name])

    return _arrays(tensors, numbers)


def _member(data, info):
    """Return the bytes of an archive member, which must be uncompressed and match its checksum."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ValueError(f'{info.filename!r} is compressed or encrypted; torch.save does neither')
    header = bytes(data[info.header_offset :][: files.ZIP_HEADER_BYTES])
    if len(header) < files.ZIP_HEADER_BYTES or header[:4] != b'PK\x03\x04':
        raise ValueError(f'{info.filename!r} is not at the position that the archive lists')
    content = data[info.header_offset + files.zip_header_size(header) :][: info.file_size]
    # torch has an option to leave the checksum out
    if content.size != info.file_size or info.CRC not in (0, zlib.crc32(content)):
        raise ValueError(f'{info.filename!r} is damaged (checksum mismatch)')
    return content


def _read_legacy(data):
    """Read five pickles (magic number, version, system, tensors, storage keys), then size and numbers per storage."""
    stream = _Stream(data)
    if bytes(data[:1]) != b'\x80' or _read_pickle(stream) != _LEGACY_MAGIC:
        raise ValueError('not a file of torch.save')
    protocol, system = _read_pickle(stream), _read_pickle(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get('little_endian') is not True:
        raise ValueError('unsupported version or byte order of torch.save')
    tensors, keys = _read_pickle(stream), _read_pickle(stream)
    if not isinstance(tensors, dict) or not isinstance(keys, list):
        raise ValueError('not a dictionary of tensors')
    storages = {t.storage.key: t.storage for t in tensors.values() if isinstance(t, _Tensor)}
    contents = {}
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise ValueError('a storage belongs to no tensor')
        size = int.from_bytes(stream.read(8), 'little') * np.dtype(_DTYPES[storages[key].kind]).itemsize
        contents[key] = data[stream.position : stream.position + size]
        stream.position += size
        if stream.position > data.size:
            raise ValueError('the file is truncated')
    if missing := storages.keys() - contents.keys():
        raise ValueError(f'the numbers of {len(missing)} storages are missing')
    return _arrays(tensors, lambda storage: contents[storage.key])


class _Stream:
    """The part of the file interface that pickletools uses, over bytes in memory; reads never go beyond them."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def read(self, size):
        part = bytes(self.data[self.position : self.position + max(size, 0)])
        self.position += len(part)
        return part

    def readline(self):
        line = bytes(self.data[self.position : self.position + 1024])  # names are shorter
        return self.read(line.find(b'\n') + 1 or len(line))


def _arrays(tensors, numbers):
    """Convert {name: _Tensor} to {name: array}. numbers: function from a _Storage to its bytes, uint8."""
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError('not a dictionary of tensors')
    storages, flats = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f'the entry {ascii(name)[:80]} is not a tensor')
        whole = tensor.storage._replace(view=None)
        if storages.setdefault(whole.key, whole) != whole:
            raise ValueError(f'conflicting descriptions of the storage {ascii(whole.key)[:80]}')
        if whole.key not in flats:
            flats[whole.key] = _flat(whole, numbers(whole))
    return {name: _array(name, tensor, flats[tensor.storage.key]) for name, tensor in tensors.items()}


def _flat(storage, content):
    dtype = np.dtype(_DTYPES[storage.kind])
    if content.size != storage.size * dtype.itemsize:
        raise ValueError(f'the storage {ascii(storage.key)[:80]} is not {storage.size} numbers long')
    flat = np.asarray(content).view(dtype)
    if storage.kind == 'torch BFloat16Storage':  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
        flat.flags.writeable = False
    return flat


def _array(name, tensor, flat):
    """Return a tensor as a view of its storage, after checking that it stays within bounds."""
    start, size = tensor.storage.view or (0, flat.size)
    flat = flat[start : start + size]
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if not (_are_counts(shape) and _are_counts(strides) and len(shape) == len(strides) and _is_count(offset)):
        raise ValueError(f'{ascii(name)[:80]} has an invalid shape')
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    empty = 0 in shape
    if flat.size != size or math.prod(shape) > size or (not empty and last >= size):
        raise ValueError(f'{ascii(name)[:80]} reaches beyond its storage')
    if empty:
        return np.zeros(shape, flat.dtype)
    steps = [stride * flat.itemsize if n > 1 else flat.itemsize for n, stride in zip(shape, strides)]
    return np.ndarray(shape, flat.dtype, flat, offset * flat.itemsize, steps)
