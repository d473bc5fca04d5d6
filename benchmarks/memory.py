"""Measure the memory that a training step needs for each image at 64x64 and 128x128, without and with recomputation.

    python benchmarks/memory.py --torch_python=/path/to/venv/bin/python --guided_diffusion=FOLDER

The network has ADM's shape with 64 channels (unet64 and unet128 of shapes.py), in float32. `planned` is the temporary
memory of the compiled program, by its memory_analysis(). `measured` is by how much a step raises the resident memory of
the process at its peak (Linux), the same for ours and the peers. Both are what is needed besides parameters, moving
average and optimizer state. They are taken at a batch and at its double: the difference is what an image adds. What is
left, extrapolated, is what a step needs at any batch. Recomputation: config.model.remat, guided-diffusion's
use_checkpoint, diffusers' gradient checkpointing. guided-diffusion recomputes attention in any case.
"""

import contest
import contestants

MIB = 2**20


def per_image(images_to_bytes):
    """Return (bytes that an image adds, bytes at any batch) of {images: bytes} at two batches."""
    (few, less), (many, more) = ((int(images), size) for images, size in images_to_bytes.items())
    added = (more - less) / (many - few)
    return added, less - few * added


def row(facts, ours):
    """Return the cells of a contestant, and its figures in bytes. ours: the figures to compare with, or None."""
    figures = {}
    for kind in ('planned', 'measured'):
        if kind in facts:
            figures[kind], figures[f'{kind} at any batch'] = per_image(facts[kind])
    shown = [f'{figures[key] / MIB:.1f}' if key in figures else '-' for key in ('planned', 'measured')]
    shown.append(f'{figures["measured at any batch"] / MIB:.0f}')
    shown.append(f'{ours["measured"] / figures["measured"]:.2f}' if ours else '-')
    return [*shown, f'{facts["parameters"]:,}', facts['version']], figures


def commands(options, model):
    """Return the commands: all without recomputation, then all with it."""
    found = {}
    for flag, peer_flag in ((), ()), (('--remat',), ('checkpoint',)):
        ours = contestants.own(options, model, 'memory', *flag)
        found |= {'/'.join([name, *(word[2:] for word in flag)]): command for name, command in ours.items()}
        found |= contestants.peers(options, model, 'memory', variants=[peer_flag])
    return contestants.chosen(options, found)


def main(arguments=None):
    parser = contestants.parser(__doc__, rounds=1, models=('unet64', 'unet128'))
    options = contestants.parse(parser, arguments)
    columns = ('planned MiB an image', 'measured MiB an image', 'at any batch', 'ours / this', 'parameters', 'version')
    results = []
    for model in options.models:
        rows, found = [], {}
        for name, command in commands(options, model).items():
            if facts := contest.ask(name, command):
                ours = found.get('ours/remat' if name.endswith(('/remat', '/checkpoint')) else 'ours')
                cells, figures = row(facts, ours)
                found[name] = {**facts, **figures}
                rows.append((name, cells))
        results.append({'model': model, 'contestants': found})
        print(f'\n{contest.table(model, columns, rows)}\n', flush=True)
    contest.record(options.results, 'memory', results=results)


if __name__ == '__main__':
    main()
