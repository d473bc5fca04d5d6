"""Weights from elsewhere: OpenAI's guided-diffusion checkpoints (ADM) to flax parameters and back, and safetensors."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import files
from cfg_jax.errors import UserError
from cfg_jax.torch_files import load_openai_state_dict, unreadable

__all__ = [
    'load_openai_state_dict',
    'load_safetensors',
    'openai_classifier_params',
    'openai_state_dict',
    'openai_unet_params',
    'save_safetensors',
]

# ---------------------------------------------------------------- ADM's names: one table


class _Entry(NamedTuple):
    """One tensor: its name there, its path here, and what lies between the layouts.

    shape: here. axes: the transposition from there to here. ones: trailing axes of length one there (1x1 convolutions).
    heads: not 0 where the first axis there is (head, q/k/v, channel), the legacy order; here: (q/k/v, head, channel).
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
        return np.array(array.transpose(self.axes or range(array.ndim)), order='C')  # a copy: the file may be let go

    def to_openai(self, array):
        array = np.asarray(array, np.float32).transpose(self.inverse_axes())
        if self.heads:
            array = array.reshape(3, self.heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return np.array(array.reshape(self.openai_shape()), order='C')


# kind of layer -> {name here: (name there, axes, ones)}
_BIAS = {'bias': ('bias', None, 0)}
_KINDS = {
    'dense': {'kernel': ('weight', (1, 0), 0), **_BIAS},
    'conv': {'kernel': ('weight', (2, 3, 1, 0), 0), **_BIAS},
    'conv1d': {'kernel': ('weight', (1, 0), 1), **_BIAS},
    'qkv': {'kernel': ('weight', (1, 0), 1), **_BIAS},
    'norm': {'scale': ('weight', None, 0), **_BIAS},
    'embed': {'embedding': ('weight', None, 0)},
}
# kind of block -> (name there, name here, kind of layer)
_BLOCKS = {
    'res': (
        ('in_layers.0', 'norm_in', 'norm'), ('in_layers.2', 'conv_in', 'conv'), ('emb_layers.1', 'embedding', 'dense'),
        ('out_layers.0', 'norm_out', 'norm'), ('out_layers.3', 'conv_out', 'conv'), ('skip_connection', 'skip', 'conv'),
    ),
    'attention': (('norm', 'norm', 'norm'), ('qkv', 'qkv', 'qkv'), ('proj_out', 'out', 'conv1d')),
    'pool': (('qkv_proj', 'qkv', 'conv1d'), ('c_proj', 'out', 'conv1d')),  # always in the new order
}  # fmt: skip


def _layers(module, shapes):
    """(name there, path here, kind of layer) of every layer, for a UNet or a NoisyClassifier with these parameters."""
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
    """(name there, name here, kind of block). There, the blocks of each half are counted through all levels."""
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
    """[_Entry] for a UNet or a NoisyClassifier on images of this size; ValueError unless it covers every parameter."""
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
        raise ValueError(f'{type(module).__name__} has parameters that the table of names does not know')
    return entries


def _shapes(module, image_size, in_channels):
    def init():
        labels = [jnp.zeros(1, jnp.int32)] if getattr(module, 'num_labels', 0) else []
        images = jnp.zeros((1, image_size, image_size, in_channels))
        return module.init(jax.random.key(0), images, jnp.zeros(1), *labels)

    return jax.eval_shape(init)['params']


def openai_unet_params(state_dict, module, image_size, *, new_attention_order, in_channels=3):
    """guided-diffusion's UNetModel -> params for `module`, a `UNet`: nested dict of float32 arrays.

    state_dict: {name: array}. new_attention_order: as it was trained; of ADM's networks that at 64x64 has it.
    The orders have the same shapes: the wrong one goes unnoticed here and spoils the images.
    Raises UserError, naming what is missing, surplus or of another shape.
    """
    return _params(state_dict, _table(module, image_size, in_channels, new_attention_order))


def openai_classifier_params(state_dict, module, image_size, *, new_attention_order=False, in_channels=3):
    """guided-diffusion's EncoderUNetModel with attention pooling -> params for `module`, a `NoisyClassifier`.

    ADM's classifiers all have the legacy order (the pool itself never has). Raises as `openai_unet_params`.
    """
    return _params(state_dict, _table(module, image_size, in_channels, new_attention_order))


def openai_state_dict(params, module, image_size, *, new_attention_order, in_channels=3):
    """The inverse of both: params of a `UNet` or `NoisyClassifier` -> {guided-diffusion's name: float32 array}."""
    flat = _flatten(params)
    entries = _table(module, image_size, in_channels, new_attention_order)
    return {entry.name: entry.to_openai(flat['/'.join(entry.path)]) for entry in entries}


def _params(state_dict, entries):
    if problems := _problems(state_dict, entries):
        shown = '; '.join(problems[:4]) + (f'; and {len(problems) - 4} more' if len(problems) > 4 else '')
        raise UserError(f'the checkpoint is not of this network ({len(problems)} of its tensors do not fit): {shown}')
    return _unflatten({entry.path: entry.to_flax(state_dict[entry.name]) for entry in entries})


def _problems(state_dict, entries):
    """One text for each tensor that is missing, surplus, or of another shape or kind of number."""
    problems = [f'{entry.name} is missing' for entry in entries if entry.name not in state_dict]
    expected = {entry.name for entry in entries}
    problems += [f'{ascii(name)[1:-1][:80]} is surplus' for name in state_dict if name not in expected]
    for entry in entries:
        array = state_dict.get(entry.name)
        if array is not None and array.shape != entry.openai_shape():
            problems.append(f'{entry.name} has the shape {array.shape}, this network {entry.openai_shape()}')
        elif array is not None and array.dtype.kind != 'f':
            problems.append(f'{entry.name} holds {array.dtype}, not floating-point numbers')
    return problems


# ---------------------------------------------------------------- safetensors: our own parameters, for others

_MAX_DEPTH = 32


def save_safetensors(path, params, metadata=None):
    """Writes params (nested dict of arrays) as float32 under names joined by '/', whole or not at all.

    metadata: {str: str}. Raises UserError where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    # C order: safetensors writes the bytes as they lie
    arrays = {name: np.asarray(leaf, np.float32, order='C') for name, leaf in _flatten(params).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as temporary:
            save_file(arrays, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {" ".join(str(error).split())}') from error


def load_safetensors(path):
    """(params, metadata) of a file of `save_safetensors`: nested dict of float32 arrays, {str: str}.

    Raises UserError where the file is missing, damaged, or holds other than floating-point numbers.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework='numpy') as file:
            flat = {tuple(name.split('/')): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        if odd := [path for path, array in flat.items() if array.dtype.kind != 'f']:
            raise ValueError(f'{"/".join(odd[0])[:80]!r} holds no floating-point numbers')
        return _unflatten({path: np.asarray(array, np.float32) for path, array in flat.items()}), metadata
    except Exception as error:  # the library raises a good many kinds, and says so nowhere
        raise unreadable(path, error, 'a .safetensors file of floating-point numbers') from error


def _flatten(params):
    """Nested dict -> {'a/b/c': leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {'/'.join(str(step.key) for step in path): leaf for path, leaf in leaves}


def _unflatten(flat):
    """{(a, b, c): leaf} -> nested dict."""
    tree = {}
    for path, leaf in flat.items():
        if len(path) > _MAX_DEPTH:
            raise ValueError(f'a name has more than {_MAX_DEPTH} levels')
        node = tree
        for step in path[:-1]:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise ValueError(f'{"/".join(path)[:80]!r} lies below an array')
        if path[-1] in node:
            raise ValueError(f'{"/".join(path)[:80]!r} is there twice')
        node[path[-1]] = leaf
    return tree
