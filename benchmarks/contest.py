"""Time several programs in turn: each is a process that gets ready, then runs when it is told to.

A contestant calls `serve` with a function to time. `hold` starts all of them and lets them run one after another, round
after round, so that a machine that changes its speed affects all alike.
"""

import json
import os
import statistics
import subprocess
import sys
import time


def serve(run, **facts):
    """Say that this process is ready, with some facts; then time `run` whenever a line of standard input asks for it.

    A line holds the number of calls; the answer is {'wall': seconds of a call, 'cpu': CPU seconds of a call}. The
    process ends with its input. run() must wait for its own result.
    """
    run()
    answer = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    print(json.dumps(facts), file=answer, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({'wall': wall / int(line), 'cpu': cpu / int(line)}), file=answer, flush=True)


def hold(commands, *, rounds, calls=1):
    """Return {name: {'wall', 'cpu', 'rounds': [wall, ...], facts}} of {name: command}; times are medians of the rounds.

    A command that fails is left out, with a line that says why. Progress goes to standard error.
    """
    processes, found = {}, {}
    try:
        for name, command in commands.items():
            began = time.perf_counter()
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ready = process.stdout.readline()
            if not ready:
                print(f'{name}: failed with status {process.wait()}, left out', file=sys.stderr, flush=True)
                continue
            processes[name], found[name] = process, {**json.loads(ready), 'runs': []}
            print(f'{name}: ready after {time.perf_counter() - began:.0f} s', file=sys.stderr, flush=True)
        for number in range(rounds):
            for name, process in processes.items():
                process.stdin.write(f'{calls}\n')
                process.stdin.flush()
                run = json.loads(process.stdout.readline())
                found[name]['runs'].append(run)
                print(f'round {number + 1}/{rounds}  {name}: {run["wall"]:.4g} s', file=sys.stderr, flush=True)
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    for each in found.values():
        runs = each.pop('runs')
        each |= {key: statistics.median(run[key] for run in runs) for key in ('wall', 'cpu')}
        each['rounds'] = [run['wall'] for run in runs]
    return found
