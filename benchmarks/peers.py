"""A contestant: the same in PyTorch, run by the Python of an environment with torch (and diffusers, for its network).

    python benchmarks/peers.py NETWORK MODEL TASK [--compile] [--channels_last] [--checkpoint] [--path=FOLDER]

NETWORK is `diffusers`, its UNet2DModel built to the same shape, or `guided_diffusion`, whose package lies in FOLDER.
The training step is that of cfg_jax's configs: the loss on eps, clipping, Adam (fused) and the moving average (in
torch's multi-tensor form). The sampler doubles the batch and takes ancestral steps, without anything read back.
"""

import argparse
import copy
import itertools
import json
import math
import sys
import time

import contest
import torch
from shapes import NULL_LABEL, NUM_CLASSES, SHAPES, TASKS

LABELS = NUM_CLASSES + 1


def guided_diffusion(shape, path, checkpoint):
    """Return OpenAI's network: the module, and the function (z, t, labels) -> eps. checkpoint: recompute each block."""
    sys.path.insert(0, path)
    from guided_diffusion import nn as their_nn
    from guided_diffusion import unet

    unet.normalization = lambda channels: their_nn.GroupNorm32(shape['groups'], channels)  # theirs are always 32
    network = unet.UNetModel(
        image_size=shape['image'][1],
        in_channels=shape['image'][0],
        model_channels=shape['channels'],
        out_channels=shape['image'][0],
        num_res_blocks=shape['blocks'],
        attention_resolutions=tuple(shape['image'][1] // size for size in shape['attention']),
        channel_mult=shape['mult'],
        num_classes=LABELS,
        num_heads=shape['heads'],
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
        use_checkpoint=checkpoint,
    )
    return network, network


def diffusers(shape, path, checkpoint):
    """Return diffusers' UNet2DModel, likewise."""
    del path
    from diffusers import UNet2DModel

    size, levels = shape['image'][1], len(shape['mult'])
    attention = [size // 2**level in shape['attention'] for level in range(levels)]
    widths = tuple(shape['channels'] * mult for mult in shape['mult'])
    network = UNet2DModel(
        sample_size=size,
        in_channels=shape['image'][0],
        out_channels=shape['image'][0],
        block_out_channels=widths,
        layers_per_block=shape['blocks'],
        down_block_types=tuple('AttnDownBlock2D' if here else 'DownBlock2D' for here in attention),
        up_block_types=tuple('AttnUpBlock2D' if here else 'UpBlock2D' for here in reversed(attention)),
        attention_head_dim=widths[-1] // shape['heads'],
        norm_num_groups=shape['groups'],
        resnet_time_scale_shift='scale_shift',
        downsample_type='resnet',
        upsample_type='resnet',
        num_class_embeds=LABELS,
    )
    if checkpoint:
        network.enable_gradient_checkpointing()
    return network, lambda z, t, labels: network(z, t, labels, return_dict=False)[0]


def eps_loss(call, images, labels, null, memory_format):
    """Return the mean loss on eps, at λ uniform from -20 to 20 and with a tenth of the labels dropped."""
    x = (images.float() / 127.5 - 1.0).contiguous(memory_format=memory_format)
    logsnr = torch.empty(len(x), device=x.device).uniform_(-20, 20)
    alpha, sigma = (torch.sigmoid(sign * logsnr).sqrt()[:, None, None, None] for sign in (1, -1))
    eps = torch.randn_like(x)
    given = torch.where(torch.rand(len(x), device=x.device) < 0.1, null, labels)
    return (call(alpha * x + sigma * eps, logsnr, given) - eps).square().mean()


def training_step(network, call, shape, memory_format):
    """Return the function that takes one training step on random images."""
    average = copy.deepcopy(network)
    params, means = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)
    images = torch.randint(0, 256, (shape['batch'], *shape['image']), dtype=torch.uint8)
    labels = torch.arange(shape['batch']) % NUM_CLASSES

    def run():
        loss = eps_loss(call, images, labels, NULL_LABEL, memory_format)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(means, params, 1 - 0.9999)
        loss.item()

    return run


def forward(call, shape, memory_format):
    """Return the function that evaluates the network once."""
    z = torch.ones(shape['batch'], *shape['image']).contiguous(memory_format=memory_format)
    t, labels = torch.zeros(len(z)), torch.zeros(len(z), dtype=torch.long)

    @torch.inference_mode()
    def run():
        call(z, t, labels)

    return run


def sampler(call, shape, memory_format, steps):
    """Return the function that draws images with classifier-free guidance, w = 1, in ancestral steps."""
    logsnrs = torch.linspace(-20, 20, steps + 1).tolist()
    count = shape['sampled']
    labels = torch.cat([torch.arange(count) % NUM_CLASSES, torch.full((count,), NULL_LABEL)])

    @torch.inference_mode()
    def run():
        z = torch.randn(count, *shape['image']).contiguous(memory_format=memory_format)
        for low, high in itertools.pairwise(logsnrs):
            twice = torch.cat([z, z]).contiguous(memory_format=memory_format)
            with_label, without = call(twice, torch.full((2 * count,), low), labels).chunk(2)
            eps = 2.0 * with_label - without
            alpha, sigma = (math.sqrt(1 / (1 + math.exp(-sign * low))) for sign in (1, -1))
            next_alpha, next_sigma = (math.sqrt(1 / (1 + math.exp(-sign * high))) for sign in (1, -1))
            x = ((z - sigma * eps) / alpha).clamp(-1, 1)
            share = math.exp(low - high)
            z = share * next_alpha / alpha * z + (1 - share) * next_alpha * x
            z = z + math.sqrt(1 - share) * next_sigma * torch.randn_like(z)

    return run


def memory(network, call, shape, memory_format):
    """Return {images: bytes} by which a training step raises the resident memory at its peak, as 'measured'."""
    measured = {}
    for images in (shape['batch'], 2 * shape['batch']):
        run = training_step(network, call, {**shape, 'batch': images}, memory_format)
        run()  # makes the optimizer's state
        network.zero_grad(set_to_none=True)
        measured[images] = contest.peak_growth(run)
        network.zero_grad(set_to_none=True)
    return {'measured': measured}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('network', choices=('guided_diffusion', 'diffusers'))
    parser.add_argument('model', choices=SHAPES)
    parser.add_argument('task', choices=TASKS)
    parser.add_argument('--compile', action='store_true', help='torch.compile')
    parser.add_argument('--channels_last', action='store_true')
    parser.add_argument('--checkpoint', action='store_true', help='recompute the blocks in the backward pass')
    parser.add_argument('--path', default='', help="OpenAI's repository, for guided_diffusion")
    parser.add_argument('--steps', type=int, default=32, help='steps of the sampler')
    options = parser.parse_args()
    torch.manual_seed(0)
    shape, make = SHAPES[options.model], {'guided_diffusion': guided_diffusion, 'diffusers': diffusers}[options.network]
    network, call = make(shape, options.path, options.checkpoint)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    network.to(memory_format=memory_format).train(options.task in ('train', 'memory'))
    facts = {'parameters': sum(p.numel() for p in network.parameters()), 'version': f'torch {torch.__version__}'}
    began = time.perf_counter()
    if options.compile:
        call = torch.compile(call)
    if options.task == 'memory':
        print(json.dumps({**facts, **memory(network, call, shape, memory_format)}))
    elif options.task == 'train':
        contest.serve(training_step(network, call, shape, memory_format), began, **facts)
    elif options.task == 'forward':
        contest.serve(forward(call, shape, memory_format), began, **facts)
    else:
        contest.serve(sampler(call, shape, memory_format, options.steps), began, **facts)


if __name__ == '__main__':
    main()
