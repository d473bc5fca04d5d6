"""Time the drawing of 64 images with classifier-free guidance (w = 1) on this machine's CPUs, against PyTorch.

    python benchmarks/sampling.py --torch_python=/path/to/venv/bin/python --guided_diffusion=FOLDER [--steps=8]
    python benchmarks/sampling.py --classifier --before=../cfg_jax_before

Each step evaluates the network once, on a doubled batch of 128, and takes an ancestral step. At the default of 32 steps
a call of unet8m takes more than a minute and a half for each contestant; fewer --steps give the same ratio. With
--classifier, ours alone, the network has no doubled batch, and the gradient of a classifier of its shape guides it. All
contestants take turns; times are medians over the rounds. Leave the machine alone meanwhile.
"""

import contest
import contestants

MODELS = ('unet8m', 'digits')


def main(arguments=None):
    parser = contestants.parser(__doc__, rounds=3, models=MODELS)
    parser.add_argument('--calls', type=int, default=1, help='calls of each contestant in a round (default: 1)')
    parser.add_argument('--steps', type=int, default=32, help='steps of the sampler (default: 32)')
    parser.add_argument('--classifier', action='store_true', help='classifier guidance; the peers are left out')
    parser.add_argument('--compile', action='store_true', help='also torch.compile; it takes minutes to begin')
    options = contestants.parse(parser, arguments)
    alone, guided = (('--classifier',), ', guided by a classifier') if options.classifier else ((), '')
    contests = []
    for model in options.models:
        commands = contestants.contenders(options, model, 'sample', f'--steps={options.steps}', alone=alone)
        found = contest.hold(commands, rounds=options.rounds, calls=options.calls)
        contests.append({'model': model, 'task': f'sample{guided}', 'steps': options.steps, 'contestants': found})
        print(f'\n{contest.summary(f"{model}, 64 images in {options.steps} steps{guided}", found)}\n', flush=True)
    contest.record(options.results, 'sampling', rounds=options.rounds, contests=contests)


if __name__ == '__main__':
    main()
