"""Devices that training may be planned for: their memory and speed, and TPU slices that need not exist here."""

import math
import os
from importlib.util import find_spec
from typing import NamedTuple

import jax

from cfg_jax.errors import UserError, first_line

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')


class Kind(NamedTuple):
    """A kind of TPU. name: JAX's. memory: GiB that XLA gives a program. peak: bfloat16 FLOP/s of a chip."""

    name: str
    memory: float
    peak: float
    slices: tuple[str, ...]


# The memory is what libtpu's compiler reports as available, a little less than the makers' 32, 16, 96 and 32 GiB.
TPUS = {
    'v4': Kind('TPU v4', 30.75, 275e12, _CUBES),
    'v5e': Kind('TPU v5 lite', 15.75, 197e12, _FLAT),
    'v5p': Kind('TPU v5', 95.74, 459e12, _CUBES),
    'v6e': Kind('TPU v6 lite', 31.25, 918e12, _FLAT),
}
# Dense bfloat16 FLOP/s by JAX's device names; other cards of the same families are slower.
_PEAKS = {tpu.name: tpu.peak for tpu in TPUS.values()} | {
    'NVIDIA H200': 989e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
}
# Without these libtpu asks the machine which TPU it has; the slice is chosen by the topology's name.
_LIBTPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_MIN_LOG_LEVEL': '3',
}
GIB = 2**30
USABLE_FRACTION = 0.9  # of the memory, for an estimate: XLA needs room for uncounted things, such as the program


class Target(NamedTuple):
    """The devices of a plan. memory: bytes that a program may use on each. peak: FLOP/s of one, None if unknown.

    devices: JAX's devices, None where nothing is compiled for them.
    """

    name: str
    count: int
    memory: float
    peak: float | None
    devices: list | None = None

    def usable_memory(self):
        """Return the bytes of each device that an estimate may fill."""
        return USABLE_FRACTION * self.memory


def target(topology, compiling):
    """Return the `Target` of config.plan.topology, with its devices if `compiling`; UserError if there is no such."""
    if topology:
        kind, _, shape = topology.partition(':')
        if kind not in TPUS or shape not in TPUS[kind].slices:
            allowed = '; '.join(f'{kind}: {" ".join(tpu.slices)}' for kind, tpu in TPUS.items())
            raise UserError(
                f"config.plan.topology is {topology!r}; allowed: '' (the devices of this machine) or kind:shape from "
                f'{allowed}.'
            )
        # This machine's devices stay unused, and JAX must not look for a real TPU because libtpu is installed.
        jax.config.update('jax_platforms', 'cpu')
        count = math.prod(map(int, shape.split('x')))
        devices = tpu_devices(kind, shape) if compiling else None
        return Target(f'TPU {topology}', count, TPUS[kind].memory * GIB, TPUS[kind].peak, devices)
    devices = jax.devices()
    kind = devices[0].device_kind
    statistics = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
    if statistics:
        memory = statistics['bytes_limit']
    else:  # the devices share the machine's memory
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / len(jax.local_devices())
    return Target(f'{kind} (this machine)', len(devices), memory, _PEAKS.get(kind), devices)


def tpu_devices(kind, shape):
    """Return the devices of a TPU slice that need not exist here; UserError if libtpu is not installed."""
    if find_spec('libtpu') is None:
        raise UserError(
            "compiling for a TPU needs libtpu: pip install -e '.[tpu]' (on any x86 Linux); or "
            'estimate without it: --config.plan.compile=False (config.plan.topology).'
        )
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {}
    if kind == 'v4':  # both cores of a chip as one device, as JAX shows them on such machines
        options['chip_config_name'] = 'megacore'
    if shape == '1x1':
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=f'{kind}:{shape}', **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error)
        raise UserError(f"config.plan.topology is '{kind}:{shape}', which libtpu refuses: {reason}") from None
