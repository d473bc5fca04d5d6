"""Time a training step and a forward pass on this machine's CPUs, against PyTorch and an earlier checkout.

    python benchmarks/train_step.py --torch_python=/path/to/venv/bin/python --guided_diffusion=FOLDER
    python benchmarks/train_step.py --before=../cfg_jax_before --models=unet8m
    python benchmarks/train_step.py --before=../cfg_jax_before --tasks=train --accumulation_steps=4

All contestants have the same shape and batch, in float32, and take turns; times are medians over the rounds. A training
step is the loss, its gradient, clipping, Adam and the moving average; --accumulation_steps sums the gradient over parts
of the batch, ours alone. The contestants' names: see contestants.py. Leave the machine alone meanwhile.
"""

import contest
import contestants

MODELS = ('unet8m', 'digits')


def main(arguments=None):
    parser = contestants.parser(__doc__, rounds=5, models=MODELS)
    parser.add_argument(
        '--calls', type=int, help='calls of each contestant in a round (default: as many as take a second)'
    )
    parser.add_argument('--tasks', default='train,forward', help='train, forward or both (the default)')
    parser.add_argument('--accumulation_steps', type=int, default=1, help='parts of the batch; the peers have one')
    parser.add_argument(
        '--compile', action='store_true', help='also torch.compile; it takes two minutes for each to begin'
    )
    options = contestants.parse(parser, arguments)
    contests = []
    for model in options.models:
        for task in options.tasks.split(','):
            name, alone, parts = task, (), options.accumulation_steps
            if task == 'train' and parts != 1:
                name, alone = f'train in {parts} parts', (f'--accumulation_steps={parts}',)
            commands = contestants.contenders(options, model, task, alone=alone)
            found = contest.hold(commands, rounds=options.rounds, calls=options.calls)
            contests.append({'model': model, 'task': name, 'contestants': found})
            print(f'\n{contest.summary(f"{model}, {name}", found)}\n', flush=True)
    contest.record(options.results, 'train_step', rounds=options.rounds, contests=contests)


if __name__ == '__main__':
    main()
