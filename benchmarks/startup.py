"""Time the start of training: from `python -m cfg_jax.main --config=configs/digits.py` to the first training step.

    python benchmarks/startup.py [--before=FOLDER] [--rounds=3]

Each round starts it twice with a compilation cache of its own: `first` finds it empty, `second` finds what the first
has compiled. What the seconds consist of: Python and its imports; tracing functions and lowering them to HLO;
compiling, or reading what was compiled; and the rest: reading the data, the first step, and what has no name.
"""

import argparse
import builtins
import json
import os
import runpy
import statistics
import sys
import tempfile
import threading
import time

import contest
import contestants

STARTS = ('first', 'second')
PARTS = ('imports', 'tracing and lowering', 'compiling')
_EVENTS = {
    '/jax/core/compile/jaxpr_trace_duration': 'tracing and lowering',
    '/jax/core/compile/jaxpr_to_mlir_module_duration': 'tracing and lowering',
    '/jax/core/compile/backend_compile_duration': 'compiling',
}


# ---------------------------------------------------------------- in the process that starts


class _FirstStep:
    """A standard output that prints the figures and ends the process where the line of the first step would come."""

    def __init__(self, stream, began, spans):
        self._stream, self._began, self._spans = stream, began, spans

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        if not text.startswith('step 1/'):
            return self._stream.write(text)
        total = time.monotonic() - self._began
        parts = {part: covered(spans) for part, spans in self._spans.items()}
        self._stream.write(json.dumps({'total': total, **parts, 'rest': total - sum(parts.values())}) + '\n')
        self._stream.flush()
        os._exit(0)


def covered(spans):
    """Return the seconds that a list of (begin, end) covers. One may lie within another."""
    seconds, last = 0.0, float('-inf')
    for begin, end in sorted(spans):
        seconds += max(0.0, end - max(begin, last))
        last = max(last, end)
    return seconds


def start(began, arguments):
    """Run the program with these arguments up to its first step. began: time.monotonic() when this was asked for."""
    spans = {part: [] for part in PARTS}
    spans['imports'].append((began, time.monotonic()))  # Python's own start
    builtins.__import__ = _timed(builtins.__import__, spans['imports'])
    from cfg_jax import runtime

    configure = runtime.configure

    def configured(**settings):
        configure(**settings)
        from jax import monitoring  # behind the flags

        def add(event, duration, **_):
            if event in _EVENTS:
                now = time.monotonic()
                spans[_EVENTS[event]].append((now - duration, now))

        monitoring.register_event_duration_secs_listener(add)

    runtime.configure = configured
    sys.stdout, sys.argv[1:] = _FirstStep(sys.stdout, began, spans), arguments
    runpy.run_module('cfg_jax.main', run_name='__main__', alter_sys=True)


def _timed(import_, spans):
    """Return a builtins.__import__ that adds (begin, end) of the main thread's outermost imports to spans."""
    inside = False

    def timed(*arguments, **keywords):
        nonlocal inside
        if inside or threading.current_thread() is not threading.main_thread():
            return import_(*arguments, **keywords)
        begin, inside = time.monotonic(), True
        try:
            return import_(*arguments, **keywords)
        finally:
            inside = False
            spans.append((begin, time.monotonic()))

    return timed


# ---------------------------------------------------------------- the contest


def timed_start(name, folder, cache, config):
    """Return the figures of one start, with this compilation cache; None, after a line that says why, if it fails."""
    with tempfile.TemporaryDirectory() as workdir:
        flags = [f'--config={config}', f'--workdir={workdir}/run', '--config.train.log_every=1']
        program = contestants.checkout(folder)
        command = [program[0], f'JAX_COMPILATION_CACHE_DIR={cache}', *program[1:]]
        return contest.ask(name, [*command, __file__, '--began', time.monotonic(), '--start', *flags])


def contest_of_starts(options):
    """Return {(name, 'first' or 'second'): [figures of a round, ...]}."""
    folders = contestants.checkouts(options)
    runs = {(name, which): [] for name in folders for which in STARTS}
    for _ in range(options.rounds):
        for name, folder in folders.items():
            config = folder / 'configs' / f'{options.config}.py'
            with tempfile.TemporaryDirectory() as cache:
                for which in STARTS:
                    if run := timed_start(f'{name}, {which} start', folder, cache, config):
                        runs[name, which].append(run)
    return runs


def main(arguments=None):
    parser = contestants.parser(__doc__, rounds=3)
    parser.add_argument('--config', default='digits', help='the file of configs/ to start (default: digits)')
    parser.add_argument('--began', type=float, help=argparse.SUPPRESS)
    parser.add_argument('--start', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = contestants.parse(parser, arguments)
    if options.start:
        start(options.began, options.start)
        return
    runs = contest_of_starts(options)
    medians = {
        f'{name}, {which} start': {part: statistics.median(run[part] for run in starts) for part in starts[0]}
        for (name, which), starts in runs.items()
        if starts
    }
    columns = ('total', *PARTS, 'rest')
    rows = [(name, [f'{each[part]:.1f}' for part in columns]) for name, each in medians.items()]
    print(f'\n{contest.table(f"{options.config}, seconds", columns, rows)}\n', flush=True)
    for which in STARTS:
        pairs = zip(runs['ours', which], runs.get(('before', which), ()))
        if ratios := [ours['total'] / before['total'] for ours, before in pairs]:
            print(f'ours / before, {which} start: {statistics.median(ratios):.2f}', flush=True)
    contest.record(options.results, 'startup', config=options.config, rounds=options.rounds, starts=medians)


if __name__ == '__main__':
    main()
