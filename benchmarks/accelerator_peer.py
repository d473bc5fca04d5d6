"""The parts of `accelerator.py` that PyTorch measures: OpenAI's guided-diffusion, the same network and training step.

    python benchmarks/accelerator_peer.py --guided_diffusion=FOLDER --parts='peer bfloat16 eager' --deadline=SECONDS

A part is 'peer TYPE eager' or 'peer TYPE compiled', TYPE float16 or bfloat16. Convolutions and attention compute in
that type, as the network's own convert_to_fp16 arranges it; Adam (fused), clipping and the average of the parameters
work on float32 copies of them, in torch's multi-tensor form. compiled: by torch.compile, in channels_last, and without
the recomputation of attention, which the network does in the backward pass and torch.compile cannot follow.
"""

import argparse
import copy
import sys
import time

import torch
from accelerator_parts import seconds_per_call, stage, tell
from peers import eps_loss

SHAPES = {
    False: {
        **{'size': 64, 'channels': 192, 'mult': (1, 2, 3, 4), 'blocks': 3, 'attention': (32, 16, 8), 'head': 64},
        **{'classes': 1001, 'batch': 64, 'seconds': 4.0},
    },
    True: {
        **{'size': 8, 'channels': 32, 'mult': (1,), 'blocks': 1, 'attention': (8,), 'head': 16},
        **{'classes': 11, 'batch': 4, 'seconds': 0.02},
    },
}
NEEDS = {'eager': 40, 'compiled': 150}  # seconds that a part is likely to need
LOSS_SCALE = {torch.float16: 2.0**12, torch.bfloat16: 1.0}


def network_of(shape, dtype, folder, *, compiled):
    """Return OpenAI's network, with its convolutions in this type."""
    sys.path.insert(0, folder)
    from guided_diffusion import unet

    if compiled:
        unet.checkpoint = lambda function, inputs, params, flag: function(*inputs)
    network = unet.UNetModel(
        image_size=shape['size'],
        in_channels=3,
        model_channels=shape['channels'],
        out_channels=3,
        num_res_blocks=shape['blocks'],
        attention_resolutions=tuple(shape['size'] // size for size in shape['attention']),
        dropout=0.1,
        channel_mult=shape['mult'],
        num_classes=shape['classes'],
        num_head_channels=shape['head'],
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    )
    network.dtype = dtype
    for part in (network.input_blocks, network.middle_block, network.output_blocks):
        for module in part.modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
                module.to(dtype)
    with torch.no_grad():  # those that start at zero would let a GPU run faster than it does
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


def training_step(network, call, shape, dtype, device, memory_format):
    """Return the function that takes one training step on random images, and waits for nothing."""
    params = list(network.parameters())
    masters = [parameter.detach().float().clone() for parameter in params]
    means = [copy.deepcopy(master) for master in masters]
    optimizer = torch.optim.Adam(masters, lr=1e-4, fused=True)
    batch, size, scale = shape['batch'], shape['size'], LOSS_SCALE[dtype]
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels, null = torch.arange(batch, device=device) % (shape['classes'] - 1), shape['classes'] - 1

    def run():
        loss = eps_loss(call, images, labels, null, memory_format)
        network.zero_grad(set_to_none=True)
        (scale * loss).backward()
        for master, parameter in zip(masters, params):
            master.grad = parameter.grad.float()
        if scale != 1.0:
            torch._foreach_mul_([master.grad for master in masters], 1.0 / scale)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
            torch._foreach_lerp_(means, masters, 1 - 0.9999)
        return loss

    return run


def evaluation(call, shape, device, memory_format):
    """Return the function that evaluates the network once, without gradients."""
    batch, size = shape['batch'], shape['size']
    z = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=memory_format)
    t, labels = torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    @torch.no_grad()
    def run():
        return call(z, t, labels)

    return run


def measure(part, shape, folder, device):
    """Return the row of a part, a dict."""
    _, name, how = part.split()
    dtype, compiled = getattr(torch, name), how == 'compiled'
    memory_format = torch.channels_last if compiled else torch.contiguous_format

    def wait(result):
        del result
        if device == 'cuda':
            torch.cuda.synchronize()

    torch.backends.cudnn.benchmark = True
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    network = network_of(shape, dtype, folder, compiled=compiled).to(device, memory_format=memory_format).train()
    call = torch.compile(network) if compiled else network
    run = training_step(network, call, shape, dtype, device, memory_format)
    began = time.perf_counter()
    with stage(f'{part}: the first training step, batch {shape["batch"]}, with compiling'):
        loss = run()
        wait(loss)
    row = {'batch': shape['batch'], 'compile_seconds': time.perf_counter() - began, 'loss': loss.item()}
    with stage(f'{part}: timing the training step'):
        row['seconds'] = seconds_per_call(run, shape['seconds'], wait)
    row['images_per_second'] = shape['batch'] / row['seconds']
    row['parameters'] = sum(parameter.numel() for parameter in network.parameters())
    if device == 'cuda':
        row['peak_bytes'] = torch.cuda.max_memory_allocated()
    tell('row', part=part, **row)
    with stage(f'{part}: timing an evaluation of the network'):
        evaluate = evaluation(call if compiled else network.eval(), shape, device, memory_format)
        seconds = seconds_per_call(evaluate, shape['seconds'], wait)
    tell('row', part=f'{part} evaluation', batch=shape['batch'], seconds=seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--guided_diffusion', required=True, metavar='FOLDER')
    parser.add_argument('--parts', required=True)
    parser.add_argument('--deadline', type=float, required=True)
    parser.add_argument('--tiny', action='store_true')
    options = parser.parse_args()
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    tell('peer', versions={'torch': torch.__version__, 'cuda': torch.version.cuda})
    for part in options.parts.split(','):
        left, need = options.deadline - time.time(), 1 if options.tiny else NEEDS[part.split()[-1]]
        if device == 'cpu' and not options.tiny:
            tell('row', part=part, note='left out: this torch finds no GPU')
        elif left < need:
            tell('row', part=part, note=f'skipped: it needs some {need:.0f} s, {max(left, 0):.0f} s are left')
        else:
            tell('begin', part=part)
            try:
                measure(part, SHAPES[options.tiny], options.guided_diffusion, device)
            except Exception as error:
                text = f'{type(error).__name__}: {error}'
                small = 'out of memory' in text.lower()
                tell('row', part=part, note='out of memory' if small else text.splitlines()[0][:200])
            if device == 'cuda':
                torch.cuda.empty_cache()
            tell('end', part=part)


if __name__ == '__main__':
    main()
