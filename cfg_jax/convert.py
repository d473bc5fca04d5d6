"""Conversion of weights: OpenAI's guided-diffusion checkpoints (ADM) to flax parameters and back, and safetensors."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cfg_jax import files
from cfg_jax.errors import UserError
from cfg_jax.torch_files import load_openai_state_dict, mismatches, not_finite, unreadable

__all__ = [
    'load_openai_state_dict',
    'load_safetensors',
    'openai_classifier_params',
    'openai_state_dict',
    'openai_unet_params',
    'save_safetensors',
]

# ---------------------------------------------------------------- one table of OpenAI's names and ours


class _Entry(NamedTuple):
    """One tensor: OpenAI's name for it, its path in the flax parameters, and how the two layouts differ.

    shape: in flax. axes: the transposition from OpenAI's layout to flax's. ones: trailing axes of length one in
    OpenAI's layout (1x1 convolutions). heads: number of heads where OpenAI's first axis is (head, q/k/v, channel), the
    legacy order, else 0; flax's is always (q/k/v, head, channel).
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    ones: int = 0
    heads: int = 0

    def inverse_axes(self):
        return np.argsort(self.axes or range(len(self.shape)))

    def openai_shape(self):
        return (*(self.shape[axis] for axis in self.inverse_axes()), *(1,) * self.ones)

    def to_flax(self, array):
        array = np.asarray(array, np.float32).reshape(array.shape[: array.ndim - self.ones])
        if self.heads:
            array = array.reshape(self.heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return np.array(array.transpose(self.axes or range(array.ndim)), order='C')  # a copy: the file can be closed

    def to_openai(self, array):
        array = np.asarray(array, np.float32).transpose(self.inverse_axes())
        if self.heads:
            array = array.reshape(3, self.heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return np.array(array.reshape(self.openai_shape()), order='C')


# kind of layer -> {flax's name: (OpenAI's name, axes, ones)}
_BIAS = {'bias': ('bias', None, 0)}
_KINDS = {
    'dense': {'kernel': ('weight', (1, 0), 0), **_BIAS},
    'conv': {'kernel': ('weight', (2, 3, 1, 0), 0), **_BIAS},
    'conv1d': {'kernel': ('weight', (1, 0), 1), **_BIAS},
    'qkv': {'kernel': ('weight', (1, 0), 1), **_BIAS},
    'norm': {'scale': ('weight', None, 0), **_BIAS},
    'embed': {'embedding': ('weight', None, 0)},
}
# kind of block -> (OpenAI's name, flax's name, kind of layer)
_BLOCKS = {
    'res': (
        ('in_layers.0', 'norm_in', 'norm'), ('in_layers.2', 'conv_in', 'conv'), ('emb_layers.1', 'embedding', 'dense'),
        ('out_layers.0', 'norm_out', 'norm'), ('out_layers.3', 'conv_out', 'conv'), ('skip_connection', 'skip', 'conv'),
    ),
    'attention': (('norm', 'norm', 'norm'), ('qkv', 'qkv', 'qkv'), ('proj_out', 'out', 'conv1d')),
    'pool': (('qkv_proj', 'qkv', 'conv1d'), ('c_proj', 'out', 'conv1d')),  # always in the new order
}  # fmt: skip


def _layers(module, shapes):
    """Yield (OpenAI's name, flax path, kind) of every layer of a UNet or NoisyClassifier with these parameters."""
    yield from (('time_embed.0', ('time_in',), 'dense'), ('time_embed.2', ('time_out',), 'dense'))
    if 'label' in shapes:
        yield 'label_emb', ('label',), 'embed'
    yield 'input_blocks.0.0', ('conv_in',), 'conv'
    for openai, name, kind in _blocks(module, shapes):
        for inner, layer, layer_kind in _BLOCKS[kind]:
            if layer in shapes[name]:  # not every residual block has a convolution in its skip connection
                yield f'{openai}.{inner}', (name, layer), layer_kind
    yield 'out.0', ('norm_out',), 'norm'
    if 'conv_out' in shapes:
        yield 'out.2', ('conv_out',), 'conv'


def _blocks(module, shapes):
    """Yield (OpenAI's name, flax name, kind) of every block. OpenAI numbers each half's blocks across all levels."""
    levels = range(len(module.channel_mult))
    number = 1
    for level in levels:
        names = [[f'down_{level}_block_{i}', f'down_{level}_attention_{i}'] for i in range(module.num_blocks)]
        for group in (*names, [f'down_{level}_resample']):
            yield from _numbered(f'input_blocks.{number}', group, shapes)
            number += any(name in shapes for name in group)
    yield from _numbered('middle_block', ['middle_block_0', 'middle_attention', 'middle_block_1'], shapes)
    number = 0
    for level in reversed(levels):
        for i in range(module.num_blocks + 1):
            group = [f'up_{level}_block_{i}', f'up_{level}_attention_{i}']
            if i == module.num_blocks:
                group.append(f'up_{level}_resample')
            yield from _numbered(f'output_blocks.{number}', group, shapes)
            number += 1
    if 'pool' in shapes:
        yield 'out.2', 'pool', 'pool'


def _numbered(prefix, names, shapes):
    present = [name for name in names if name in shapes]
    return [(f'{prefix}.{i}', name, 'attention' if 'attention' in name else 'res') for i, name in enumerate(present)]


def _table(module, image_size, in_channels, new_attention_order):
    """Return [_Entry] for a UNet or NoisyClassifier on images of this size; ValueError if it misses a parameter."""
    shapes = _shapes(module, image_size, in_channels)
    entries = []
    for openai, path, kind in _layers(module, shapes):
        parameters = shapes
        for name in path:
            parameters = parameters[name]
        for leaf, (suffix, axes, ones) in _KINDS[kind].items():
            shape = parameters[leaf].shape
            heads = module.num_heads_at(shape[-1] // 3) if kind == 'qkv' and not new_attention_order else 0
            entries.append(_Entry(f'{openai}.{suffix}', (*path, leaf), shape, axes, ones, heads))
    if 'pool' in shapes:
        shape = shapes['pool']['position'].shape
        entries.append(_Entry('out.2.positional_embedding', ('pool', 'position'), shape, (1, 0)))
    if len(entries) != len(jax.tree.leaves(shapes)):
        raise ValueError(f'{type(module).__name__} has parameters that are not in the table of names')
    return entries


def _shapes(module, image_size, in_channels):
    def init():
        labels = [jnp.zeros(1, jnp.int32)] if getattr(module, 'num_labels', 0) else []
        images = jnp.zeros((1, image_size, image_size, in_channels))
        return module.init(jax.random.key(0), images, jnp.zeros(1), *labels)

    return jax.eval_shape(init)['params']


def openai_unet_params(state_dict, module, image_size, *, new_attention_order, in_channels=3):
    """Convert the state dict of a guided-diffusion UNetModel to parameters of `module`, a `UNet`.

    state_dict: {name: array}. new_attention_order: the order it was trained with; of ADM's networks only the 64x64 UNet
    has the new one. Both orders have the same shapes: the wrong one is not detected here, and spoils the images.
    Returns a nested dict of float32 arrays. Raises UserError naming tensors that are missing, surplus, misshapen or not
    finite.
    """
    return _params(state_dict, _table(module, image_size, in_channels, new_attention_order))


def openai_classifier_params(state_dict, module, image_size, *, new_attention_order=False, in_channels=3):
    """Convert the state dict of a guided-diffusion EncoderUNetModel to parameters of `module`, a `NoisyClassifier`.

    Its pool must be an attention pool. ADM's classifiers all have the legacy order (the pool itself always has the
    new one). Returns and raises as `openai_unet_params`.
    """
    return _params(state_dict, _table(module, image_size, in_channels, new_attention_order))


def openai_state_dict(params, module, image_size, *, new_attention_order, in_channels=3):
    """Convert parameters of a `UNet` or `NoisyClassifier` back to {guided-diffusion's name: float32 array}."""
    flat = flatten_dict(params)
    entries = _table(module, image_size, in_channels, new_attention_order)
    return {entry.name: entry.to_openai(flat[entry.path]) for entry in entries}


def check_finite(arrays):
    """Raise UserError, which names the first array, if any of {name: array} holds NaN or infinity as float32."""
    if problems := not_finite(arrays):
        raise UserError(f'{problems[0]}: these weights are damaged')


def check_fits(arrays, shapes):
    """Raise UserError, which names the first few, if some of {name: array} differ from {name: shape} or are missing."""
    if problems := mismatches(arrays, shapes):
        shown = '; '.join(problems[:4]) + (f'; and {len(problems) - 4} more' if len(problems) > 4 else '')
        count = '1 tensor differs' if len(problems) == 1 else f'{len(problems)} tensors differ'
        raise UserError(f'the checkpoint does not fit this network ({count}): {shown}')


def _params(state_dict, entries):
    check_fits(state_dict, {entry.name: entry.openai_shape() for entry in entries})
    check_finite({entry.name: state_dict[entry.name] for entry in entries})
    return unflatten_dict({entry.path: entry.to_flax(state_dict[entry.name]) for entry in entries})


# ---------------------------------------------------------------- safetensors: our own parameters, for other programs

_MAX_DEPTH = 32
_FLOATS = ('F16', 'BF16', 'F32', 'F64')  # safetensors' names of the types that are read


def save_safetensors(path, params, metadata=None):
    """Write params (nested dict of arrays) as float32 under names joined by '/'; an error leaves no partial file.

    metadata: {str: str}. Raises UserError if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    # C order: safetensors writes the buffer without regard to strides
    arrays = {name: np.asarray(leaf, np.float32, order='C') for name, leaf in flatten_dict(params, sep='/').items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as temporary:
            temporary.touch()  # with the user's permissions; the library's are the owner's alone
            mode = temporary.stat().st_mode
            save_file(arrays, temporary, metadata)
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {" ".join(str(error).split())}') from error


def load_safetensors(path):
    """Read a file of `save_safetensors`: (params, a nested dict of float32 arrays; metadata, {str: str}).

    Raises UserError if the file is missing or damaged, or holds anything but finite floating-point numbers of 16
    (float16, bfloat16), 32 or 64 bits.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework='numpy') as file:
            kinds = _kinds(path, file.keys())
            _check_names({tuple(name.split('/')) for name in kinds})
            if odd := [name for name, (kind, _) in kinds.items() if kind not in _FLOATS]:
                raise ValueError(
                    f'{odd[0][:80]!r} does not hold floating-point numbers of 16, 32 or 64 bits but {kinds[odd[0]][0]}'
                )
            arrays = {
                name: _bfloat16(path, *where) if kind == 'BF16' else file.get_tensor(name)
                for name, (kind, where) in kinds.items()
            }
            metadata = dict(file.metadata() or {})
        if problems := not_finite(arrays):
            raise ValueError(f'{problems[0]}: these weights are damaged')
        flat = {tuple(name.split('/')): np.asarray(array, np.float32) for name, array in arrays.items()}
        return unflatten_dict(flat), metadata
    except Exception as error:  # the library raises many kinds of exception, none of them documented
        raise unreadable(path, error, 'a .safetensors file of floating-point numbers') from error


def _kinds(path, names):
    """Return {name: (type, (first byte, byte after the last, shape))} of a file that safetensors could open."""
    with open(path, 'rb') as raw:
        size = int.from_bytes(raw.read(8), 'little')
        entries, start = json.loads(raw.read(size)), 8 + size
    places = {name: [start + offset for offset in entries[name]['data_offsets']] for name in names}
    return {name: (entries[name]['dtype'], (*places[name], entries[name]['shape'])) for name in names}


def _bfloat16(path, start, stop, shape):
    """Return numbers that NumPy does not have as float32: bfloat16 is the upper half."""
    with open(path, 'rb') as raw:
        raw.seek(start)
        upper_half = np.frombuffer(raw.read(stop - start), '<u2').reshape(shape)
    return (upper_half.astype(np.uint32) << 16).view(np.float32)


def _check_names(flat):
    """Raise ValueError if a path is too deep, or continues below an array: flax's unflatten_dict checks neither."""
    for path in flat:
        if len(path) > _MAX_DEPTH:
            raise ValueError(f'a name has more than {_MAX_DEPTH} levels')
        if any(path[:depth] in flat for depth in range(1, len(path))):
            raise ValueError(f'the name {"/".join(path)[:80]!r} continues that of another array')
