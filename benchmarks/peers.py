"""A contestant: the same in PyTorch, run by the Python of an environment with torch (and diffusers, for its network).

    python benchmarks/peers.py NETWORK MODEL TASK [--compile] [--channels_last] [--path=FOLDER] [--steps=32]

NETWORK is `diffusers`, its UNet2DModel built to the same shape, or `guided_diffusion`, whose package lies in FOLDER.
The training step is that of cfg_jax's configs: the loss on eps, clipping, Adam (fused) and the moving average (in
torch's multi-tensor form). The sampler doubles the batch and takes ancestral steps, without anything read back.
"""

import argparse
import copy
import math
import sys
import time

import contest
import torch

SHAPES = {
    'digits': {'image': (1, 8, 8), 'channels': 16, 'mult': (1, 2), 'blocks': 1, 'attention': (4,), 'heads': 2, 'groups': 8, 'batch': 64, 'sampled': 100},
    'unet8m': {'image': (3, 32, 32), 'channels': 64, 'mult': (1, 2, 2), 'blocks': 2, 'attention': (16, 8), 'heads': 4, 'groups': 32, 'batch': 16, 'sampled': 64},
}
LABELS = 11


def guided_diffusion(shape, path):
    """Return OpenAI's network as a function (z, t, labels) -> eps, and the module."""
    sys.path.insert(0, path)
    from guided_diffusion import nn as their_nn
    from guided_diffusion import unet

    if shape['groups'] != 32:
        def normalization(channels):
            return their_nn.GroupNorm32(shape['groups'], channels)

        unet.normalization = normalization
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
    )
    return network, network


def diffusers(shape, path):
    """Return diffusers' UNet2DModel as a function (z, t, labels) -> eps, and the module."""
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
    return network, lambda z, t, labels: network(z, t, labels, return_dict=False)[0]


def training_step(network, call, shape, memory_format):
    """Return the function that takes one training step on random images."""
    average = copy.deepcopy(network)
    params, means = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)
    images = torch.randint(0, 256, (shape['batch'], *shape['image']), dtype=torch.uint8)
    labels = torch.arange(shape['batch']) % 10

    def run():
        x = (images.float() / 127.5 - 1.0).contiguous(memory_format=memory_format)
        logsnr = torch.empty(len(x)).uniform_(-20, 20)
        alpha, sigma = (torch.sigmoid(sign * logsnr).sqrt()[:, None, None, None] for sign in (1, -1))
        eps = torch.randn_like(x)
        given = torch.where(torch.rand(len(x)) < 0.1, 10, labels)
        loss = (call(alpha * x + sigma * eps, logsnr, given) - eps).square().mean()
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
    labels = torch.cat([torch.arange(count) % 10, torch.full((count,), 10)])

    @torch.inference_mode()
    def run():
        z = torch.randn(count, *shape['image']).contiguous(memory_format=memory_format)
        for low, high in zip(logsnrs, logsnrs[1:]):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('network', choices=('guided_diffusion', 'diffusers'))
    parser.add_argument('model', choices=SHAPES)
    parser.add_argument('task', choices=('train', 'forward', 'sample'))
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--channels_last', action='store_true')
    parser.add_argument('--path', default='')
    parser.add_argument('--steps', type=int, default=32, help='steps of the sampler')
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = SHAPES[options.model]
    network, call = {'guided_diffusion': guided_diffusion, 'diffusers': diffusers}[options.network](shape, options.path)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    network.to(memory_format=memory_format).train(options.task == 'train')
    began = time.perf_counter()
    if options.compile:
        call = torch.compile(call)
    if options.task == 'train':
        run = training_step(network, call, shape, memory_format)
    elif options.task == 'forward':
        run = forward(call, shape, memory_format)
    else:
        run = sampler(call, shape, memory_format, options.steps)
    run()
    contest.serve(
        run,
        parameters=sum(p.numel() for p in network.parameters()),
        compile=time.perf_counter() - began,
        version=f'torch {torch.__version__}',
    )


if __name__ == '__main__':
    main()
