import json
import re
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from cfg_jax import build
from cfg_jax.config import changed
from cfg_jax.errors import UserError
from cfg_jax.jobs import plan
from cfg_jax.planning import compiling, devices, estimate, hlo
from cfg_jax.planning.devices import GIB, Target
from cfg_jax.training import sharding
from tests import tiny


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
    """The plan of the tiny config for the devices at hand, compiled, and the config."""
    config, workdir = tiny.config(), tmp_path_factory.mktemp('plan')
    plan.run(config, workdir)
    return json.loads((workdir / 'plan.json').read_text()), config


def test_the_bytes_are_those_of_the_real_arrays(planned):
    """The state's by its arrays; what the compiled step is given, by those, a batch, its key and the step's number."""
    found, config = planned
    state = jax.eval_shape(build.sharded_training(config, sharding.make_mesh())[0])

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    ours = found['estimates'][0]['bytes']
    assert found['parameters'] == size(state.params) // 4
    assert [ours[use] for use in ('parameters', 'EMA', 'optimizer')] == [
        size(state.params), size(state.ema_params), size(state.opt_state),
    ]  # fmt: skip
    batch = 16 * (8 * 8 + 4)
    assert 0 <= found['compiled']['bytes']['arguments'] - size(state) - batch <= 64
    assert found['compiled']['sent'] == {} and found['fits_with'] == {}


def test_remat_keeps_less_and_computes_more(planned):
    plain, remat, *_ = planned[0]['estimates']
    assert remat['bytes']['activations'] < plain['bytes']['activations']
    assert 1.1 < remat['flops'] / plain['flops'] < 1.5


def test_flops_are_those_of_the_convolutions(planned):
    """Of the tiny network by hand: twice the multiplications of a forward pass, and twice that for the gradients."""
    found, config = planned
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    forward = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.ndim == 4:  # 3x3 kernels see 22 of 24 positions on each axis of 8 pixels
            forward += 2 * leaf.size / 9 * 22**2 if leaf.shape[0] == 3 else 2 * leaf.size * 64
        elif leaf.ndim == 2 and 'label' not in str(path):
            forward += 2 * leaf.size * (64 if 'attention' in str(path) else 1)
    forward += 4 * 64 * 64 * 8  # attention
    assert 3 * forward < 1.02 * found['estimates'][0]['flops'] / 16 < 1.5 * 3 * forward


COSTS = estimate.Costs(
    parameters=GIB // 4,
    state={False: {'parameters': GIB, 'EMA': GIB, 'optimizer': 2 * GIB},
           True: {'parameters': GIB // 8, 'EMA': GIB // 8, 'optimizer': GIB // 4}},
    activations={False: GIB, True: GIB // 4},
    flops={False: 3e12, True: 4e12},
    update_flops=8e9,
)  # fmt: skip


def target(memory):
    """Eight devices with so many GiB to fill, nine tenths of what they have."""
    return Target('hand-made', 8, memory * GIB / 0.9, 100e12)


def hand_made(**changes):
    """Eight devices, sixteen images on each; 1000 updates."""
    changes = {'train__batch_size': 128, 'train__num_steps': 1000, 'plan__utilisation': 0.5, **changes}
    return tiny.config(**changes)


def test_the_largest_batch():
    assert estimate.largest_batch(10 * GIB, 4 * GIB, GIB) == 6
    assert estimate.largest_batch(10 * GIB - 1, 4 * GIB, GIB) == 5
    assert estimate.largest_batch(3 * GIB, 4 * GIB, GIB) == 0


def test_a_plan_by_hand():
    given = {'num_steps': 1000, 'utilisation': 0.5}
    rows = estimate.variants(plan.step_of(hand_made()), COSTS, target(11), **given)
    images = 2 * 16 * 64 / GIB
    # state, gradients, with fsdp the whole parameters in float32, 16 images
    expected = [4 + 1 + 16, 4 + 1 + 4, 0.5 + 1 / 8 + 1 + 16, 0.5 + 1 / 8 + 1 + 4]
    np.testing.assert_allclose([row['total'] / GIB for row in rows], np.add(expected, images), rtol=1e-9)
    # what is left of 11 GiB, less a little for the images, in activations of 1 and 1/4 GiB
    assert [row['largest_batch'] for row in rows] == [5, 23, 9, 37]
    flops = [16 * 3e12 + 8e9, 16 * 4e12 + 8e9, 16 * 3e12 + 1e9, 16 * 4e12 + 1e9]
    np.testing.assert_allclose([row['flops'] for row in rows], flops)
    np.testing.assert_allclose([row['days'] for row in rows], np.array(flops) * 1000 / 50e12 / 86400)
    hours = 8 * np.array(flops) * 1000 / 50e12 / 3600
    np.testing.assert_allclose([row['hours'] for row in rows], hours)
    assert [row['cost'] for row in rows] == [None] * 4
    rows = estimate.variants(plan.step_of(hand_made()), COSTS, target(11), price=1.5, **given)
    np.testing.assert_allclose([row['cost'] for row in rows], 1.5 * hours)


@pytest.mark.parametrize(
    ('memory', 'changes'),
    [
        (22, {}),
        (15, {'train.accumulation_steps': 2}),  # a second part needs the gradients twice
        (7.5, {'train.accumulation_steps': 16}),
        (6, {'train.accumulation_steps': 4, 'train.fsdp': True}),
        (2.3, {'train.accumulation_steps': 8, 'train.fsdp': True, 'model.remat': True}),
        (1.9, None),
    ],
)
def test_what_makes_it_fit(memory, changes):
    assert next(estimate.what_fits(plan.step_of(hand_made()), COSTS, target(memory)), None) == changes
    if changes:
        with_them = changed(hand_made(), changes)
        assert sum(estimate.memory(plan.step_of(with_them), COSTS, 8).values()) <= memory * GIB


@pytest.mark.parametrize('topology', ['v5e', 'v5e:3x3', 'v5e:2x2x2', 'v4:4x4', 'v9:2x2', 'tpu', ':', 'V5E:2x2'])
def test_a_wrong_topology(topology, tmp_path):
    config = tiny.config(plan__topology=topology)
    with pytest.raises(UserError, match=rf"config\.plan\.topology is '{re.escape(topology)}'; allowed: .*v5e: 1x1 2x2"):
        plan.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_slice_is_estimated_without_libtpu(tmp_path, monkeypatch, capsys):
    """A batch that 16 devices do not divide is refused; compiling says what is missing."""
    monkeypatch.setattr(devices, 'find_spec', lambda name: None)
    monkeypatch.setattr(plan, 'costs', lambda config, count: COSTS)
    config = tiny.config(plan__topology='v5e:4x4', plan__compile=False)  # an image a device
    plan.run(config, tmp_path)
    found = json.loads((tmp_path / 'plan.json').read_text())
    assert found['devices'] == {
        'name': 'TPU v5e:4x4', 'count': 16, 'memory': 15.75 * GIB, 'peak_flops': 197e12,
    }  # fmt: skip
    assert found['compiled'] is None and 'it fits' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'a batch of 24 images does not divide over 16 devices'):
        plan.run(changed(config, {'train.batch_size': 24}), tmp_path)
    with pytest.raises(UserError, match=r"needs libtpu: pip install -e '\.\[tpu\]'.*--config.plan.compile=False"):
        plan.run(changed(config, {'plan.compile': True}), tmp_path)


def test_what_xla_refuses_is_not_said_to_fit(tmp_path, monkeypatch, capsys):
    """The next change that the estimate lets fit is compiled, until one does; or none is."""
    monkeypatch.setattr(plan, 'costs', lambda config, count: COSTS)
    monkeypatch.setattr(devices, 'target', lambda topology, compiling: target(7.5))
    parts_that_fit = 16

    def compiled_for(config, target):
        if config.train.accumulation_steps < parts_that_fit or config.model.remat:
            return {'seconds': 1.0, 'refused': 'RESOURCE_EXHAUSTED: too much'}
        return {'seconds': 1.0, 'bytes': {}, 'total': GIB, 'sent': {}}

    monkeypatch.setattr(plan, 'compiled_for', compiled_for)
    plan.run(hand_made(train__accumulation_steps=1, train__fsdp=True), tmp_path)
    found = json.loads((tmp_path / 'plan.json').read_text())
    assert found['fits_with'] == {'train.accumulation_steps': 16} and found['compiled']['total'] == GIB
    assert 'too much' in capsys.readouterr().out
    parts_that_fit = 100
    plan.run(hand_made(), tmp_path)
    found = json.loads((tmp_path / 'plan.json').read_text())
    assert found['fits_with'] is None and found['compiled']['refused']
    assert 'use more devices' in capsys.readouterr().out


def test_the_peaks_of_other_cards_and_number_types_are_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, 'costs', lambda config, count: COSTS)
    for name, dtype, days in (
        ('NVIDIA H100 80GB HBM3', 'bfloat16', True),
        ('NVIDIA H100 80GB HBM3', 'float32', False),
        ('NVIDIA H100 PCIe', 'bfloat16', False),
        ('TPU v5 lite', 'float32', True),
    ):
        here = target(30)._replace(name=f'{name} (this machine)', peak=devices._PEAKS.get(name))
        monkeypatch.setattr(devices, 'target', lambda topology, compiling, here=here: here)
        plan.run(hand_made(model__dtype=dtype, plan__compile=False), tmp_path)
        found = json.loads((tmp_path / 'plan.json').read_text())
        assert (found['estimates'][0]['days'] is not None) is days, (name, dtype)


def test_a_program_that_does_not_fit_is_said_to():
    class Lowered:
        def __init__(self, reason):
            self.reason = reason

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.reason)

    refused = compiling.compiled(Lowered('RESOURCE_EXHAUSTED: used 20G\nof 16G'), 8)['refused']
    assert refused == 'RESOURCE_EXHAUSTED: used 20G'
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
        compiling.compiled(Lowered('INTERNAL: something else'), 8)


# As libtpu writes them: a gather beside other work, in two fusions of one channel; a reduce-scatter; a loop.
HLO = """
HloModule jit_train_step

%fused.1 (param_0.1: bf16[16,64]) -> bf16[128,64] {
  %param_0.1 = bf16[16,64]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = bf16[128,64]{1,0:T(8,128)S(1)} all-gather(%param_0.1), channel_id=3, dimensions={0}
}

%fused.2 (param_0.2: bf16[16,64]) -> bf16[128,64] {
  %param_0.2 = bf16[16,64]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = bf16[128,64]{1,0:T(8,128)} all-gather(%param_0.2), channel_id=3, dimensions={0}
}

%all-reduce-scatter.9 (input_0: f32[80], input_1: bf16[8,8]) -> f32[10] {
  %input_0 = f32[80]{0} parameter(0)
  %input_1 = bf16[8,8]{1,0} parameter(1)
  %all-reduce.5 = (f32[80]{0}, bf16[8,8]{1,0}) all-reduce(%input_0, %input_1), channel_id=3, to_apply=%add
  ROOT %slice = f32[10]{0} slice(%all-reduce.5)
}

%body.1 (arg: (s32[], f32[6])) -> (s32[], f32[6]) {
  %arg = (s32[], f32[6]{0}) parameter(0)
  %values = f32[6]{0} get-tuple-element(%arg), index=1
  %all-reduce-start.1 = f32[6]{0} all-reduce-start(%values), channel_id=7, to_apply=%add
  %all-reduce-done.1 = f32[6]{0} all-reduce-done(%all-reduce-start.1)
  ROOT %next = (s32[], f32[6]{0}) tuple(%one, %all-reduce-done.1)
}

ENTRY %main.1 (p0: bf16[16,64], p1: f32[80]) -> f32[10] {
  %p0 = bf16[16,64]{1,0} parameter(0)
  %p1 = f32[80]{0} parameter(1)
  %narrowed = bf16[80]{0} all-reduce(%p1), channel_id=9, to_apply=%add
  %first = bf16[128,64]{1,0} fusion(%p0), kind=kLoop, calls=%fused.1
  %second = bf16[128,64]{1,0} fusion(%p0), kind=kLoop, calls=%fused.2
  %loop = (s32[], f32[6]{0}) while(%p0), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %out = f32[10]{0} fusion(%p1, %second), kind=kCustom, calls=%all-reduce-scatter.9
}
"""


def test_collectives_as_libtpu_writes_them():
    assert sorted(hlo.collectives(HLO, 8)) == [
        ('all-gather', 128 * 64 * 2, 1),
        ('all-reduce', 6 * 4, 4),
        ('all-reduce', 80 * 2, 1),
        ('reduce-scatter', 80 * 4 + 8 * 8 * 2, 1),
    ]
    # around the ring of eight: seven eighths, twice for a reduction whose result everyone gets
    assert hlo.sent_bytes(HLO, 8) == {'all-gather': 14336, 'all-reduce': 168 + 280, 'reduce-scatter': 392}


def test_the_table_of_slices():
    """docs/slices.md: each ImageNet config is there, and its numbers follow from each other at 40% of the peak."""
    rows = [line for line in (tiny.ROOT / 'docs' / 'slices.md').read_text().splitlines() if line.startswith('|')][2:]
    seen, names = set(), []
    for row in rows:
        cells = [cell.strip() for cell in row.strip('|').split('|')]
        if cells[0]:
            names, flops = re.findall(r'`(\w+)\.py`', cells[0]), float(cells[1])
        kind, *sizes = re.search(r'`(\w+)-(\d+)` \((\d+)x(\d+)\)', cells[3]).groups()
        chips, width, height = map(int, sizes)
        assert width * height == chips
        tpu = devices.TPUS[{'v5litepod': 'v5e'}.get(kind, kind)]
        need, there = map(float, re.match(r'([\d.]+) of ([\d.]+)', cells[5]).groups())
        assert need <= 0.9 * there and abs(there - tpu.memory) <= 0.051
        seconds, days = float(cells[6].removesuffix(' s')), float(cells[7])
        hours = float(cells[8].replace(',', ''))
        assert abs(hours / 24 / chips - days) <= 0.051
        np.testing.assert_allclose(hours * 3600 * 0.4 * tpu.peak, flops, rtol=0.05, atol=5 * 3600 * 0.4 * tpu.peak)
        for name in names:
            training = tiny.load_config(name).train
            assert chips * int(cells[4]) == training.batch_size, name
            assert abs(seconds - hours / chips * 3600 / training.num_steps) <= 0.006 + 18e3 / chips / training.num_steps
        seen |= set(names)
    configs = {path.stem for pattern in ('imagenet*', 'adm*') for path in (tiny.ROOT / 'configs').glob(f'{pattern}.py')}
    students = {'imagenet64_distilled'}  # they train on fewer images, with a teacher beside them
    assert seen == configs - students


@pytest.mark.slow
@pytest.mark.skipif(find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_tpu_slice_that_is_not_there(tmp_path):
    """The tiny network compiled for four chips, both ways; in processes of their own, for libtpu stays loaded."""
    sent = {}
    for fsdp in (False, True):
        changes = {'plan__topology': 'v5e:2x2', 'train__fsdp': fsdp, 'model__channels': 32}
        done = tiny.main(*tiny.flags(**changes), '--mode=plan', f'--workdir={tmp_path}')
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / 'plan.json').read_text())
        assert found['devices']['count'] == 4 and found['compiled']['total'] < GIB
        sent[fsdp] = found['compiled']['sent']
    assert set(sent[False]) == {'all-reduce'} and sent[True]['all-gather'] > 0
