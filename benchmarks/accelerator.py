"""Measure cfg_jax on one GPU or TPU in ten minutes: ADM's 64x64 network (296M parameters) in bfloat16.

    python benchmarks/accelerator.py --out=FOLDER [--minutes=9] [--guided_diffusion=FOLDER] [--torch_python=PATH]
    JAX_PLATFORMS=cpu python benchmarks/accelerator.py --out=FOLDER --tiny          # try it anywhere, in seconds

In this order, the most valuable first: the rate of large matrix products; the training step at batch 64; the sampler at
w = 1 and w = 0 (8 steps, scaled to 256); OpenAI's guided-diffusion in PyTorch, if its folder is given and torch is at
hand; attention and group norms in several implementations; training at batch 128 and 32; guided-diffusion compiled.
--only='train,peer' measures the parts that begin so. Of several devices the first is measured.

What no longer fits into --minutes is skipped with a line that says so. FOLDER/accelerator.json and accelerator.md are
written after every figure, so that a kill loses nothing. It needs jax, flax, optax and numpy, and no data set.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import contest

HERE = Path(__file__).parent
# Each is a process of its own, so that PyTorch finds the memory free that JAX has reserved.
PARTS = (
    ('jax', ('rate', 'train 64', 'sample w=1', 'sample w=0')),
    ('torch', ('peer bfloat16 eager', 'peer float16 eager')),
    ('jax', ('attention', 'norm', 'train 128', 'train 32')),
    ('torch', ('peer bfloat16 compiled',)),
)
TINY = (('jax', ('rate', 'train 4', 'sample w=1', 'sample w=0', 'attention', 'norm')), PARTS[1], PARTS[3])
FULL_STEPS = 256
AIMS = (
    "Anchors: the times in EDM's README imply 14% of an A100's peak for training this network. Our aim is 45% of the "
    'matrix rate measured here, and 1.3 times the images per second of guided-diffusion on the same card.'
)
COUNTING = (
    'FLOPs are those of the products and convolutions of the program, counted from their shapes before it is compiled '
    "(2 for a multiplication and an addition, none for padding); XLA's own count can miss what a library computes. "
    'Share: of the fastest matrix product in the first table. Compile: from the traced program, with choosing '
    'algorithms, nothing cached. Peak memory is that of the process so far, temporary memory that of the one program.'
)
PROGRAM_COLUMNS = (
    *('part', 'batch', 'images/s', 'TFLOP per call', 'TFLOP/s', 'share'),
    *('compile, s', 'temporary, GiB', 'peak, GiB'),
)
PEER_COLUMNS = ('part', 'batch', 'seconds', 'images/s', 'first call, s', 'peak, GiB', 'cfg_jax / it')


# ---------------------------------------------------------------- running the parts


class Record:
    """What has been measured, written to `folder` whenever a message of a process adds to it."""

    def __init__(self, folder, minutes):
        self.folder = folder
        self.found = {'date': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()), 'minutes': minutes, 'rows': []}
        self.needs, self.running = {}, None
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def take(self, message):
        """Add a message."""
        kind = message.pop('message')
        if kind == 'row':
            self.row(**message)
        elif kind == 'begin':
            self.running = message['part']
        elif kind == 'end':
            self.running = None
            if 'needs' in message:
                self.needs[message['part'].split()[0]] = message['needs']
        else:
            self.found[kind] = message
            self.write()

    def row(self, **row):
        self.found['rows'].append(row)
        self.write()
        print(f'  {line_of(row)}', flush=True)

    def missing(self, parts):
        """Return the parts that have neither begun nor been skipped."""
        seen = [row['part'] for row in self.found['rows']]
        return [part for part in parts if part not in seen and part != self.running]

    def write(self):
        for name, text in (('json', json.dumps(self.found, indent=1)), ('md', markdown(self.found))):
            path = self.folder / f'accelerator.{name}'
            path.with_suffix('.part').write_text(text)
            path.with_suffix('.part').replace(path)


def line_of(row):
    """Return a row as a line of progress."""
    if 'note' in row:
        return f'{row["part"]}: {row["note"]}'
    shown = [f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}' for key, value in row.items()]
    return ', '.join(shown[1:7]).join([f'{row["part"]}: ', ''])


def follow(command, record, deadline):
    """Run a process until it ends or the deadline is reached; return its exit status, None if it was stopped.

    Its lines of JSON go to the record, all others to the output.
    """
    environment = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92', 'TF_CPP_MIN_LOG_LEVEL': '2', **os.environ}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            line = lines.get(timeout=max(deadline - time.time(), 0.01))
            if line is None:
                return process.wait()
            if line.startswith('{"message"'):
                record.take(json.loads(line))
            else:
                print(f'{deadline - time.time():4.0f} s left  {line}', end='', flush=True)
    except queue.Empty:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it may have started
        process.wait()


def run_parts(library, parts, record, options, deadline):
    """Measure parts with 'jax' or 'torch'; where a process dies, the next one takes what is left."""
    while parts := record.missing(parts):
        record.running = None
        command = [sys.executable, HERE / 'accelerator_parts.py', f'--needs={json.dumps(record.needs)}']
        if library == 'torch':
            reason = without_peer(options)
            if reason:
                for part in parts:
                    record.row(part=part, note=f'left out: {reason}')
                return
            command = [
                options.torch_python,
                HERE / 'accelerator_peer.py',
                f'--guided_diffusion={options.guided_diffusion}',
            ]
        command += [f'--parts={",".join(parts)}', f'--deadline={deadline}', *['--tiny'] * options.tiny]
        before = len(record.found['rows'])
        status = follow([str(word) for word in command], record, deadline)
        if status is None:
            for part in [*[record.running] * bool(record.running), *record.missing(parts)]:
                record.row(part=part, note='cut off: the time is up')
            return
        if status:
            record.row(part=record.running or parts[0], note=f'the process ended with status {status}')
        elif len(record.found['rows']) == before:
            return


def without_peer(options):
    """Return why guided-diffusion cannot be measured; '' if it can."""
    if not options.guided_diffusion:
        return '--guided_diffusion is not given'
    if not (Path(options.guided_diffusion) / 'guided_diffusion' / 'unet.py').exists():
        return f'{options.guided_diffusion} has no guided_diffusion/unet.py'
    return '' if options.torch_python else 'this Python has no torch, and --torch_python is not given'


# ---------------------------------------------------------------- the page


def markdown(found):
    """Return the page of what has been measured."""
    rows = [row for row in found['rows'] if 'note' not in row]
    kinds = {kind: [row for row in rows if row['part'].split()[0] == kind] for kind in
             ('rate', 'train', 'sample', 'peer', 'attention', 'norm')}  # fmt: skip
    rate = max((row['flops_per_second'] for row in kinds['rate']), default=None)
    machine, peer = found.get('machine', {}), found.get('peer', {})
    versions = {**machine.get('versions', {}), **peer.get('versions', {})}
    lines = [
        f'# ADM-64 on {machine.get("device", "a device that is not known yet")}',
        '',
        f'{found["date"]}; ' + ', '.join(f'{name} {version}' for name, version in versions.items()),
        '',
        AIMS,
        '',
        COUNTING,
    ]
    lines += table('Matrix products, bfloat16', ['side', 'TFLOP/s'], [
        [str(row['side']), f'{row["flops_per_second"] / 1e12:.4g}'] for row in kinds['rate']
    ])  # fmt: skip
    for title, kind in (('Training', 'train'), (f'Sampling, scaled to {FULL_STEPS} steps', 'sample')):
        lines += table(title, PROGRAM_COLUMNS, [program_cells(row, rate) for row in kinds[kind]])
    cells = [peer_cells(row, kinds['train']) for row in kinds['peer']]
    lines += table("guided-diffusion's class in PyTorch", PEER_COLUMNS, cells)
    for title, kind in (('Attention', 'attention'), ('Group norm and SiLU', 'norm')):
        lines += table(title, ['shape', 'variant', 'forward, ms', 'with gradients, ms'], [
            [row['shape'], row['variant'], f'{row["forward_ms"]:.3g}', f'{row["both_ms"]:.3g}'] for row in kinds[kind]
        ])  # fmt: skip
    notes = [
        f'- {", ".join(row[key] for key in ("part", "shape", "variant") if key in row)}: {row["note"]}'
        for row in found['rows']
        if 'note' in row
    ]
    return '\n'.join([*lines, *(['', '## Not measured', '', *notes] if notes else []), ''])


def table(title, columns, rows):
    """Return the lines of a table under its title; none without rows."""
    if not rows:
        return []
    return ['', f'## {title}', '', contest.table(columns[0], columns[1:], [(row[0], row[1:]) for row in rows])]


def program_cells(row, rate):
    """Return the cells of a training step or a sampler. rate: FLOP/s of matrix products, None if not measured."""
    speed = row['flops'] / row['seconds']
    return [
        row['part'],
        str(row['batch']),
        f'{row["images_per_second"]:.4g}',
        f'{row["flops"] / 1e12:.4g}',
        f'{speed / 1e12:.4g}',
        f'{speed / rate:.1%}' if rate else '',
        f'{row["compile_seconds"]:.3g}',
        gib(row.get('temporary_bytes')),
        gib(row.get('peak_bytes')),
    ]


def peer_cells(row, trained):
    """Return the cells of a figure of guided-diffusion. trained: rows of our training step."""
    ours = [each['images_per_second'] for each in trained if each['batch'] == row['batch']]
    theirs = row.get('images_per_second')
    return [
        row['part'].removeprefix('peer '),
        str(row['batch']),
        f'{row["seconds"]:.4g}',
        f'{theirs:.4g}' if theirs else '',
        f'{row["compile_seconds"]:.3g}' if theirs else '',
        gib(row.get('peak_bytes')),
        f'{ours[0] / theirs:.2f}' if ours and theirs else '',
    ]


def gib(size):
    return '' if size is None else f'{size / 2**30:.3g}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--minutes', type=float, default=9.0, help='when to end (default: 9)')
    parser.add_argument('--only', default='', help='beginnings of the parts to measure, such as train,peer')
    parser.add_argument('--guided_diffusion', default='', metavar='FOLDER', help='a checkout of guided-diffusion')
    parser.add_argument('--torch_python', default='', help='Python of an environment with torch (default: this one)')
    parser.add_argument('--tiny', action='store_true', help='a tiny network and few calls, to try the program itself')
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    if not options.torch_python and importlib.util.find_spec('torch'):
        options.torch_python = sys.executable
    print(f'measuring until {time.strftime("%H:%M:%S", time.localtime(deadline))}, to {options.out}', flush=True)
    record = Record(options.out, options.minutes)
    for library, parts in TINY if options.tiny else PARTS:
        wanted = [part for part in parts if part.startswith(tuple(options.only.split(',')))]
        run_parts(library, wanted, record, options, deadline)
    print(f'wrote {options.out}/accelerator.json and {options.out}/accelerator.md', flush=True)


if __name__ == '__main__':
    main()
