"""OpenAI's checkpoints give the original's outputs; a hostile file gives one UserError, and none of its code runs."""

import io
import json
import math
import random
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import convert
from cfg_jax.errors import UserError
from cfg_jax.models.classifier import NoisyClassifier
from cfg_jax.models.unet import UNet

DATA = Path(__file__).parent / 'data'


def timestep(t):
    """Return t: the reference networks take the table's timestep where ours take λ."""
    return t


COMMON = {'channels': 32, 'time_input': timestep}
WIDE = {**COMMON, 'channel_mult': (1, 2), 'num_blocks': 1, 'attention_resolutions': (8,), 'head_channels': 32}
EVEN = {**COMMON, 'channel_mult': (1, 1), 'num_blocks': 2, 'attention_resolutions': (16, 8), 'num_heads': 4}
NETWORKS = {
    'unet_new_order': UNet(**WIDE, num_labels=10, out_channels=6),
    'unet_legacy_order': UNet(**EVEN, num_labels=10, out_channels=6),
    'classifier': NoisyClassifier(**WIDE, num_classes=10),
}
UNETS = ('unet_new_order', 'unet_legacy_order')


def new_order(name):
    return name == 'unet_new_order'


def load(name):
    """Return (state dict, params) of a reference checkpoint."""
    state = convert.load_openai_state_dict(DATA / f'{name}.pt')
    to_params = convert.openai_classifier_params if name == 'classifier' else convert.openai_unet_params
    return state, to_params(state, NETWORKS[name], 16, new_attention_order=new_order(name))


def relative_error(ours, reference):
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())


def reference(name):
    arrays = dict(np.load(DATA / f'{name}.npz'))
    return arrays['x'].transpose(0, 2, 3, 1), arrays['t'], arrays['y'].astype(np.int32), arrays


# ---------------------------------------------------------------- the same numbers as the original


@pytest.mark.parametrize('name', UNETS)
def test_the_unet_computes_what_the_original_does(name):
    z, t, y, expected = reference(name)
    out = jax.jit(NETWORKS[name].apply)({'params': load(name)[1]}, z, t, y)
    assert relative_error(out.transpose(0, 3, 1, 2), expected['out']) < 1e-5


def test_the_classifier_computes_what_the_original_does():
    z, t, y, expected = reference('classifier')

    @jax.jit
    def gradient_and_logits(params, z):
        def log_prob(z):
            logits = NETWORKS['classifier'].apply({'params': params}, z, t)
            return jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].sum(), logits

        return jax.grad(log_prob, has_aux=True)(z)

    gradient, logits = gradient_and_logits(load('classifier')[1], z)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected['logits']) < 1e-5
    assert relative_error(gradient.transpose(0, 3, 1, 2), expected['grad_log_prob']) < 1e-5


def test_the_wrong_order_of_attention_would_be_seen():
    z, t, y, expected = reference('unet_legacy_order')
    module = NETWORKS['unet_legacy_order']
    wrong = convert.openai_unet_params(load('unet_legacy_order')[0], module, 16, new_attention_order=True)
    assert (
        relative_error(jax.jit(module.apply)({'params': wrong}, z, t, y).transpose(0, 3, 1, 2), expected['out']) > 0.01
    )


@pytest.mark.parametrize('name', NETWORKS)
def test_there_and_back(name):
    """Converting there and back gives the original names, shapes, numbers and parameter count."""
    state, params = load(name)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(params))
        == json.loads((DATA / 'models.json').read_text())[name]['parameters']
    )
    back = convert.openai_state_dict(params, NETWORKS[name], 16, new_attention_order=new_order(name))
    assert back.keys() == state.keys()
    for key in state:
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)
    assert {(leaf.dtype, leaf.flags.c_contiguous) for leaf in jax.tree.leaves(params)} == {(np.dtype('float32'), True)}


@pytest.mark.parametrize(
    ('size', 'mult', 'blocks', 'parameters'),
    [
        (64, (1, 2, 3, 4), 4, 65_438_568),
        (128, (1, 1, 2, 3, 4), 2, 42_568_040),
        (256, (1, 1, 2, 2, 4, 4), 2, 54_096_360),
    ],
)
def test_classifiers_have_adms_parameter_counts(size, mult, blocks, parameters):
    module = NoisyClassifier(128, mult, blocks, attention_resolutions=(32, 16, 8), head_channels=64)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_the_names_cover_adms_largest_unet():
    """At 256x256: six levels, three of them with attention."""
    size = {'channels': 256, 'channel_mult': (1, 1, 2, 2, 4, 4), 'num_blocks': 2, 'head_channels': 64}
    adm = UNet(**size, attention_resolutions=(32, 16, 8), num_labels=1000, out_channels=6)
    table = {entry.name: entry.openai_shape() for entry in convert._table(adm, 256, 3, new_attention_order=False)}
    assert sum(map(math.prod, table.values())) == 553_838_086
    assert table['input_blocks.17.1.qkv.weight'] == (3072, 1024, 1)
    assert table['output_blocks.2.2.in_layers.2.weight'] == (1024, 1024, 3, 3)
    assert table['output_blocks.17.0.skip_connection.weight'] == (256, 512, 1, 1)


def test_classifier_in_bfloat16_is_close_and_its_logits_float32():
    z, t, _, expected = reference('classifier')
    half = NETWORKS['classifier'].clone(dtype=jnp.bfloat16)
    logits = jax.jit(half.apply)({'params': load('classifier')[1]}, z, t)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected['logits']) < 0.05


def test_a_checkpoint_of_another_network_is_refused_by_name():
    state = dict(load('classifier')[0])
    state['out.2.qkv_proj.bias'] = state.pop('out.2.c_proj.bias')
    state['extra.weight'] = np.zeros(3, np.float32)
    state['time_embed.0.bias'] = np.zeros(128, np.int64)
    with pytest.raises(UserError) as caught:
        convert.openai_classifier_params(state, NETWORKS['classifier'], 16)
    for text in (
        'does not fit this network (4 tensors differ): out.2.c_proj.bias is missing',
        'extra.weight is not part of this network',
        'out.2.qkv_proj.bias has the shape (10,), not (192,)',
        'time_embed.0.bias holds int64, not floating-point numbers',
    ):
        assert text in str(caught.value)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match=r'and [0-9]+ more'):
        convert.openai_unet_params(state, NETWORKS['unet_new_order'], 16, new_attention_order=True)


@pytest.mark.parametrize(
    ('name', 'number'),
    [('unet_new_order', np.nan), ('classifier', np.inf), ('classifier', -np.inf), ('classifier', 1e300)],
)
def test_a_tensor_that_is_not_finite_is_named(name, number):
    state = dict(load(name)[0])
    state['time_embed.2.bias'] = np.float64(state['time_embed.2.bias'])
    state['time_embed.2.bias'][3] = number
    read = convert.openai_classifier_params if name == 'classifier' else convert.openai_unet_params
    size = len(state['time_embed.2.bias'])
    expected = rf'^time_embed\.2\.bias holds NaN or infinity \(1 of its {size} numbers\): these weights are damaged$'
    with pytest.raises(UserError, match=expected):
        read(state, NETWORKS[name], 16, new_attention_order=new_order(name))


# ---------------------------------------------------------------- torch's files, written by hand


class Global(str):
    """'module name', as the pickle refers to it."""


class Call(tuple):
    """A call: (function, arguments)."""


class Persistent(tuple):
    """A reference to an object that torch keeps outside the pickle."""


def pickled(value):
    return b'\x80\x02' + instructions(value) + b'.'


def instructions(value):
    if isinstance(value, Global):
        return b'c' + value.replace(' ', '\n').encode() + b'\n'
    if isinstance(value, Call):
        return instructions(value[0]) + instructions(value[1]) + b'R'
    if isinstance(value, Persistent):
        return instructions(tuple(value)) + b'Q'
    if value is None or isinstance(value, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
    if isinstance(value, int):
        return b'\x8a' + bytes([16]) + value.to_bytes(16, 'little', signed=True)
    if isinstance(value, str):
        return b'X' + struct.pack('<I', len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b'(' + b''.join(map(instructions, value)) + b't'
    if isinstance(value, list):
        return b'](' + b''.join(map(instructions, value)) + b'e'
    pairs = b''.join(instructions(item) for pair in value.items() for item in pair)
    return b'}(' + pairs + b'u'


EMPTY = Call((Global('collections OrderedDict'), ()))
REBUILD = Global('torch._utils _rebuild_tensor_v2')


def tensor(key, size, shape, strides, *, kind='Float', offset=0, legacy=False, view=None):
    identity = ('storage', Global(f'torch {kind}Storage'), key, 'cpu', size, *((view,) if legacy else ()))
    return Call((REBUILD, (Persistent(identity), offset, shape, strides, False, EMPTY)))


def torch_zip(tensors, storages, compression=zipfile.ZIP_STORED):
    """Return a file in the zip format. tensors: the pickle's value, or its bytes. storages: {key: bytes}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        archive.writestr('net/data.pkl', tensors if isinstance(tensors, bytes) else pickled(tensors))
        archive.writestr('net/byteorder', 'little')
        for key, content in storages.items():
            archive.writestr(f'net/data/{key}', content)
    return buffer.getvalue()


def torch_legacy(tensors, storages):
    """Return a file in the legacy format. storages: {key: (number of numbers, bytes)}."""
    head = [0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True}, tensors, list(storages)]
    tail = [struct.pack('<q', size) + content for size, content in storages.values()]
    return b''.join(map(pickled, head)) + b''.join(tail)


WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
BIAS = np.array([1.5, -2, 0.25], np.float16)
COUNT = np.array(7, np.int64)


def small(legacy):
    """Return a file with a weight, its transpose in the same storage, a bias in half precision and an integer."""
    tensors = {
        'weight': tensor('0', 12, (3, 4), (4, 1), legacy=legacy),
        'columns': tensor('0', 12, (4, 2), (1, 4), offset=4, legacy=legacy),
        'bias': tensor('1', 3, (3,), (1,), kind='Half', legacy=legacy),
        'count': tensor('2', 1, (), (), kind='Long', legacy=legacy),
    }
    arrays = {'0': WEIGHT, '1': BIAS, '2': COUNT}
    if legacy:
        return torch_legacy(tensors, {key: (array.size, array.tobytes()) for key, array in arrays.items()})
    return torch_zip(tensors, {key: array.tobytes() for key, array in arrays.items()})


FORMATS = pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])


def read(tmp_path, content):
    path = tmp_path / 'net.pt'
    path.write_bytes(content)
    return convert.load_openai_state_dict(path)


def refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, content)
    assert 'net.pt' in str(caught.value)
    assert str(caught.value).isprintable()


@FORMATS
def test_both_formats_are_read(tmp_path, legacy):
    state = read(tmp_path, small(legacy))
    expected = {'weight': WEIGHT, 'columns': WEIGHT[1:].T, 'bias': BIAS, 'count': COUNT}
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize('name', NETWORKS)
def test_a_whole_network_in_the_legacy_format(tmp_path, name):
    state = load(name)[0]
    tensors, storages = {}, {}
    for i, (key, array) in enumerate(state.items()):
        strides = tuple(stride // 4 for stride in np.ascontiguousarray(array).strides)
        tensors[key] = tensor(str(i), array.size, array.shape, strides, legacy=True)
        storages[str(i)] = array.size, array.tobytes()
    again = read(tmp_path, torch_legacy(tensors, storages))
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) for key in state)


def test_bfloat16_views_parameters_and_attributes(tmp_path):
    values = np.array([1, -2.5, 3e38], np.float32)
    halves = (values.view(np.uint32) >> 16).astype('<u2').tobytes()
    brain = tensor('0', 3, (3,), (1,), kind='BFloat16')
    parameter = Call((Global('torch._utils _rebuild_parameter'), (brain, True, EMPTY)))
    with_metadata = pickled({'a': parameter})[:-1] + instructions({'_metadata': {'': {'version': 1}}}) + b'b.'
    array = read(tmp_path, torch_zip(with_metadata, {'0': halves}))['a']
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, values, rtol=1e-2)
    part = tensor('0', 12, (2,), (1,), legacy=True, view=('1', 5, 3), offset=1)
    state = read(tmp_path, torch_legacy({'part': part}, {'0': (12, WEIGHT.tobytes())}))
    np.testing.assert_array_equal(state['part'], [6, 7])


# ---------------------------------------------------------------- hostile and damaged files


@pytest.mark.parametrize('prefixes', [['module.'], ['_orig_mod.'], ['module.', '_orig_mod.']])
def test_prefixes_of_wrappers_are_left_out(tmp_path, prefixes):
    prefix = ''.join(prefixes)
    weight = tensor('0', 2, (2,), (1,))
    content = torch_zip({f'{prefix}module_a.w': weight, f'{prefix}b': weight}, {'0': np.float32([1, 2]).tobytes()})
    assert list(read(tmp_path, content)) == ['module_a.w', 'b']
    content = torch_zip({f'{prefix}a': weight, 'b': weight}, {'0': np.float32([1, 2]).tobytes()})
    assert list(read(tmp_path, content)) == [f'{prefix}a', 'b']  # not a wrapper's: then every name has it


def test_nothing_in_a_file_is_run(tmp_path):
    witness = tmp_path / 'witness'
    for function in (
        'os system',
        'posix system',
        'builtins eval',
        'builtins exec',
        'subprocess call',
        'builtins getattr',
    ):
        call = Call((Global(function), (f'touch {witness}',)))
        assert function.split()[1] in pickled(call).decode('latin1')
        for content in (
            torch_zip({'a': call}, {}),
            torch_legacy({'a': call}, {}),
            pickled(call),
            torch_zip(pickled(call), {}),
        ):
            refused(tmp_path, content, 'calls|not a file')
    call = b'cos\nsystem\n' + instructions(f'touch {witness}')
    for trick in (
        b'(' + instructions(f'touch {witness}') + b'ios\nsystem\n',  # INST
        b'(' + call + b'o',  # OBJ
        b'cos\nsystem\n' + instructions((f'touch {witness}',)) + b'\x81',  # NEWOBJ
        b'\x8c\x02os\x8c\x06system\x93' + instructions((f'touch {witness}',)) + b'R',  # STACK_GLOBAL
        b'\x82\x01' + instructions(()) + b'R',  # EXT1
        b'ccollections\nOrderedDict\n' + instructions(([call.decode()],)) + b'R',
        b'ctorch._utils\n_rebuild_tensor_v2\n' + instructions({'__defaults__': ()}) + b'b',  # BUILD on a function
    ):
        refused(tmp_path, torch_zip(b'\x80\x02' + trick + b'.', {}), 'pickle')
    assert not witness.exists()


def test_a_whole_pickled_module_is_refused_for_what_it_is(tmp_path):
    module = Global('torch.nn.modules.linear Linear')
    built = instructions(module) + b')\x81' + instructions({'training': True}) + b'b'
    refused(tmp_path, torch_zip(b'\x80\x02' + built + b'.', {}), 'NEWOBJ')
    refused(tmp_path, torch_zip(Call((module, ())), {}), r'torch\.nn\.modules\.linear Linear.*whole pickled module')
    refused(
        tmp_path, torch_legacy(Persistent(('module', module, 'net.py', 'source')), {}), 'not the storage of a tensor'
    )


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'empty'),
        (b'no torch file\n' * 9, 'not a file of torch.save'),
        (b'\x89PNG\r\n\x1a\n' + bytes(99), 'not a file of torch.save'),
        (b'\x80\x02K\x01.', 'not a file of torch.save'),
        (b'PK\x03\x04' + bytes(99), 'zip'),
        (torch_zip([1, 2], {}), 'not a dictionary'),
        (torch_zip({}, {}), 'not a dictionary'),
        (torch_zip({'a': 1}, {}), "'a' is not a tensor"),
        (torch_zip({3: tensor('0', 1, (), ())}, {'0': bytes(4)}), '3 is not a tensor'),
        (torch_zip({'a': tensor('0', 1, (), ())}, {}), 'lacks'),
        (torch_zip({'a': tensor('0', 1, (), ())}, {'0': bytes(4)}, zipfile.ZIP_DEFLATED), 'compressed'),
        (torch_zip({'a': tensor('0', 9**9, (9**9,), (1,))}, {'0': bytes(9**6)}, zipfile.ZIP_DEFLATED), 'compressed'),
        (torch_zip({'a': tensor('0', 1, (), (), kind='Quantized')}, {'0': bytes(4)}), 'QuantizedStorage'),
        (torch_zip({'a': tensor('0', 2**60, (2**60,), (1,))}, {'0': bytes(4)}), 'not .* numbers long'),
        (torch_legacy({'a': tensor('0', 2**60, (2**60,), (1,), legacy=True)}, {'0': (2**60, bytes(4))}), 'truncated'),
        (torch_legacy({'a': tensor('0', 1, (), (), legacy=True)}, {}), 'missing'),
    ],
    ids=range(16),
)
def test_files_that_are_something_else(tmp_path, content, message):
    refused(tmp_path, content, message)


@pytest.mark.parametrize(
    ('shape', 'strides', 'offset'),
    [
        ((13,), (1,), 0), ((12,), (1,), 1), ((3, 4), (5, 1), 0), ((2**40,), (0,), 0), ((2**40, 2**40), (0, 0), 0),
        ((3, 4), (4, -1), 0), ((-1,), (1,), 0), ((3, 4), (4,), 0), ((1,), (1,), -1), ((1,), (1,), 2**70),
        ('12', (1,), 0), ((True,), (1,), 0), ((0, 2**62, 2**62), (1, 1, 1), 0), ((1,) * 99, (1,) * 99, 0),
        (None, None, 0), ((), (), 12),
    ],
)  # fmt: skip
def test_tensors_stay_within_their_storage(tmp_path, shape, strides, offset):
    content = torch_zip({'a': tensor('0', 12, shape, strides, offset=offset)}, {'0': WEIGHT.tobytes()})
    refused(tmp_path, content, 'cannot be read')


@pytest.mark.parametrize(
    'body',
    [
        b')' + b'\x85' * 400_000,  # tuples within tuples,
        b'})' + b'\x85' * 400_000 + b'Ns',  # and as a key, to be hashed
        b']' * 400_000 + b'a' * 399_999,
        b'N' * 1_100_000,
        b'Nr\xff\xff\xff\xff',  # a memo of four billion
        b'X\xff\xff\xff\xff',  # texts and numbers of gigabytes
        b'\x8d' + b'\xff' * 8,
        b'\x8b\xff\xff\xff\x7f',
        b'\x96' + b'\xff' * 5 + bytes(3),
    ],
    ids=range(9),
)
def test_deep_and_endless_pickles(tmp_path, body):
    refused(tmp_path, torch_zip(b'\x80\x02' + body + b'.', {}), 'cannot be read')


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        convert.load_openai_state_dict(tmp_path / 'none.pt')
    with pytest.raises(UserError, match='directory'):
        convert.load_openai_state_dict(tmp_path)


@FORMATS
def test_every_truncation_is_refused(tmp_path, legacy):
    content = small(legacy)
    for length in range(0, len(content), 7):
        with pytest.raises(UserError):
            read(tmp_path, content[:length])
    with pytest.raises(UserError):
        read(tmp_path, content[:-1])


def refusal(function):
    """Return the text of the UserError that the function raises, or None."""
    try:
        function()
    except UserError as error:
        return str(error)


def damaged(content, rng):
    """Return the content with a few bytes flipped, overwritten, cut out, doubled or moved."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.choice((1, 1, 2, 8, 40)))
        match rng.randrange(5):
            case 0:
                content[start] ^= 1 << rng.randrange(8)
            case 1:
                content[start:stop] = rng.randbytes(stop - start)
            case 2 if len(content) > 64:
                del content[start:stop]
            case 3:
                content[start:start] = content[start:stop]
            case _:
                other = rng.randrange(len(content))
                content[start:stop] = content[other : other + stop - start]
    return bytes(content)


@pytest.mark.filterwarnings('ignore')  # of NaN sums, and pickletools' own
def test_damage_is_a_user_error_or_harmless(tmp_path):
    """1500 damaged files, some with an intact archive around the pickle: each loads or is a UserError."""
    rng, refusals = random.Random(0), 0
    whole = [small(False), small(True)]
    with zipfile.ZipFile(io.BytesIO(whole[0])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    storages = {name.split('/')[-1]: content for name, content in members.items() if '/data/' in name}
    for i in range(1500):
        if i % 3 == 2:
            content = torch_zip(damaged(members['net/data.pkl'], rng), storages)
        else:
            content = damaged(whole[i % 3], rng)
        message = refusal(lambda content=content: [array.sum() for array in read(tmp_path, content).values()])
        refusals += message is not None
        assert '\n' not in (message or '')
    assert 1000 < refusals < 1500


# ---------------------------------------------------------------- safetensors


TREE = {'a': {'kernel': WEIGHT.T, 'bias': BIAS}, 'scale': np.float32(2)}


def test_safetensors_there_and_back(tmp_path):
    path = tmp_path / 'new' / 'net.safetensors'
    convert.save_safetensors(path, TREE, {'dataset': 'digits'})
    params, metadata = convert.load_safetensors(path)
    assert metadata == {'dataset': 'digits'}
    assert jax.tree.structure(params) == jax.tree.structure(TREE)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(TREE)):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)
    assert [file.name for file in path.parent.iterdir()] == ['net.safetensors']
    convert.save_safetensors(path, jax.tree.map(jnp.asarray, TREE))
    assert convert.load_safetensors(path)[1] == {}


def test_safetensors_of_other_floats(tmp_path):
    from safetensors.numpy import save_file

    path, values = tmp_path / 'net.safetensors', np.float32([[1.5, -2.0], [0.25, 1e30]])
    upper_half = np.uint16(values.view(np.uint32) >> 16)
    for kind, stored, array in (
        ('F16', 'F16', np.float16([[1.5, -2.0], [0.25, 6e4]])),
        ('F64', 'F64', np.float64(values)),
        ('U16', 'BF16', upper_half),
    ):
        save_file({'a/b': array, 'a/c': array[:1]}, path, {'x': 'y'})
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[:8], 'little')
        header = content[8:size].replace(f'"{kind}"'.encode(), f'"{stored}"'.encode())
        path.write_bytes(len(header).to_bytes(8, 'little') + header + content[size:])
        params, metadata = convert.load_safetensors(path)
        expected = (np.uint32(array) << 16).view(np.float32) if stored == 'BF16' else np.float32(array)
        np.testing.assert_array_equal(params['a']['b'], expected)
        np.testing.assert_array_equal(params['a']['c'], expected[:1])
        assert params['a']['b'].dtype == np.float32 and metadata == {'x': 'y'}


@pytest.mark.parametrize('number', [np.nan, np.inf, 1e300])
def test_a_safetensor_that_is_not_finite_is_named(tmp_path, number):
    from safetensors.numpy import save_file

    path = tmp_path / 'net.safetensors'
    save_file({'a/kernel': np.ones(4), 'a/bias': np.array([0.0, number, number])}, path)
    with pytest.raises(UserError, match=r'net\.safetensors: cannot be read: a/bias holds NaN or infinity \(2 of its 3'):
        convert.load_safetensors(path)


def test_safetensors_have_the_permissions_of_any_other_file(tmp_path):
    (tmp_path / 'other').touch()
    convert.save_safetensors(tmp_path / 'net.safetensors', TREE)
    assert (tmp_path / 'net.safetensors').stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_safetensors_damage(tmp_path):
    path, rng, refusals = tmp_path / 'net.safetensors', random.Random(0), 0
    convert.save_safetensors(path, TREE, {'dataset': 'digits'})
    content = path.read_bytes()
    for i in range(300):
        path.write_bytes(content[: rng.randrange(len(content))] if i % 3 == 0 else damaged(content, rng))
        message = refusal(lambda: convert.load_safetensors(path))
        refusals += message is not None
        assert message is None or ('net.safetensors' in message and '\n' not in message)
    assert refusals > 150


def test_safetensors_refusals(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / 'net.safetensors'
    for arrays, message in (
        ({'a': np.arange(3)}, "'a' does not hold floating-point numbers of 16, 32 or 64 bits but I64"),
        ({'a': WEIGHT, 'a/b': WEIGHT}, "'a/b' continues that of another array"),
        ({'a/b': WEIGHT, 'a': WEIGHT}, "'a/b' continues that of another array"),
        ({'b/c': WEIGHT, 'b/c/d/e': WEIGHT}, "'b/c/d/e' continues that of another array"),
        ({'a/' * 99: WEIGHT}, 'a name has more than 32 levels'),
    ):
        save_file(arrays, path)
        with pytest.raises(UserError, match=rf'net\.safetensors: cannot be read: .*{message}') as caught:
            convert.load_safetensors(path)
        assert str(caught.value).isprintable()
    for missing in (tmp_path / 'none', tmp_path):
        with pytest.raises(UserError):
            convert.load_safetensors(missing)
    (tmp_path / 'file').write_text('')
    for unwritable in (tmp_path / 'file' / 'net.safetensors', tmp_path):
        with pytest.raises(UserError, match='cannot be written'):
            convert.save_safetensors(unwritable, TREE)
