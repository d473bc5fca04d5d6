"""The traffic between the devices of a compiled program, read from the text of its optimised HLO."""

import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 'bf16': 16}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$')
_CALLS = re.compile(r'(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.-]+))')


class Collective(NamedTuple):
    """One collective of a program: its kind, the bytes of the whole arrays it works on, its executions per run."""

    kind: str
    size: int
    times: int

    def sent(self, devices):
        """Return the bytes that each of `devices` sends per run, by the ring algorithms, which send the fewest."""
        rounds = {
            'all-reduce': 2 * (devices - 1) / devices,
            'collective-permute': 1.0,
            'all-to-all': (devices - 1) / devices**2,
        }
        return self.times * self.size * rounds.get(self.kind, (devices - 1) / devices)


def type_bytes(text):
    """Return the bytes of an HLO type, tuples summed: 'f32[2,3]{1,0}' -> 24."""
    total = 0
    for name, dims in re.findall(r'\b([a-z]\w*)\[([\d,]*)\]', text):
        bits = _BITS.get(name) or int(re.match(r'[a-z]+(\d+)', name)[1])
        for length in filter(None, dims.split(',')):
            bits *= int(length)
        total += (bits + 7) // 8
    return total


def _computations(text):
    """Return {name: [(instruction, type, opcode, rest of the line)]} of the computations, and the entry's name."""
    found, entry, current = {}, None, None
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = found.setdefault(opening[2], [])
            entry = opening[2] if opening[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(instruction.groups())
    return found, entry


def _executions(computations, entry):
    """Return {name: executions per run}; a loop of a length that XLA does not know counts once."""
    times = defaultdict(int)

    def execute(name, more):
        times[name] += more
        for _, _, opcode, rest in computations.get(name, ()):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest) if opcode == 'while' else None
            for several, one in _CALLS.findall(rest):
                for callee in re.findall(r'[\w.-]+', several or one):
                    execute(callee, more * int(trips[1]) if trips else more)

    execute(entry, 1)
    return times


def collectives(text, devices):
    """Return every `Collective` of an optimised program that spans all of `devices`, as a list.

    XLA for TPUs writes a reduce-scatter as an all-reduce within a computation named all-reduce-scatter, and a
    collective that runs beside other work as several fusions of one channel; both are recognised. Where an all-reduce
    converts its operands, the narrower type is counted as sent.
    """
    computations, entry = _computations(text)
    times, found = _executions(computations, entry), {}
    for computation, instructions in computations.items():
        types = {name: kind for name, kind, _, _ in instructions}
        for name, result, opcode, rest in instructions:
            kind = opcode.removesuffix('-start')
            if kind not in KINDS or not times[computation]:
                continue
            operands = rest[: rest.index(')')]
            named = [types[operand] for operand in re.findall(r'[\w.-]+', operands) if operand in types]
            size = sum(map(type_bytes, named)) or type_bytes(operands) or type_bytes(result)
            if kind == 'all-reduce':
                size = min(size, type_bytes(result))
            elif kind in ('all-gather', 'all-to-all'):
                size *= devices
            if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
                kind = 'reduce-scatter'
            channel = re.search(r'channel_id=(\d+)', rest)
            key = (kind, channel[1], re.sub(r'\{[^}]*\}', '', result)) if channel else (computation, name)
            found[key] = Collective(kind, size, times[computation])
    return list(found.values())


def sent_bytes(text, devices):
    """Return {kind: bytes that each device sends per run} for the kinds that occur."""
    total = defaultdict(float)
    for collective in collectives(text, devices):
        total[collective.kind] += collective.sent(devices)
    return {kind: round(size) for kind, size in total.items()}
