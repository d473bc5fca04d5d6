"""Measure several programs side by side, each a process of its own, and keep the figures.

`hold` starts contestants that call `serve` and times them in turn, round after round, so that a machine that changes
its speed affects all alike. `ask` runs a program that prints its figures once. `record` appends figures, with the
machine and the date, to a file of JSON lines.
"""

import contextlib
import ctypes
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results.jsonl'


# ---------------------------------------------------------------- in a contestant's process


def serve(run, began, **facts):
    """Call run() once and say that this process is ready; then time `run` whenever standard input asks for it.

    began: time.perf_counter() at which the program began to be built; 'ready' is the seconds from there to the end of
    the first call. Each line of input holds a number of calls; the answer is {'wall', 'cpu'}, seconds of a call. The
    process ends with its input. run() must wait for its own result.
    """
    run()
    ready = time.perf_counter() - began
    answer = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    print(json.dumps({'ready': ready, **facts}), file=answer, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({'wall': wall / int(line), 'cpu': cpu / int(line)}), file=answer, flush=True)


def peak_growth(run):
    """Return by how many bytes run() raises this process's resident memory at its peak (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls left with malloc would hide some of it
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
    before = _memory('VmRSS')
    run()
    return _memory('VmHWM') - before


def _memory(name):
    return 1024 * int(re.search(rf'{name}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


# ---------------------------------------------------------------- the contest


class _Contestant:
    """A process that serves; what it prints to standard error is kept for the line that says why it failed."""

    def __init__(self, name, command):
        self.name, self._errors = name, tempfile.TemporaryFile()  # noqa: SIM115
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': self._errors}
        self._process = subprocess.Popen(list(map(str, command)), text=True, **pipes)

    def answer(self):
        """Return the next answer; None, after a line that says why, if the process has failed."""
        line = self._process.stdout.readline()
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(line)
        if line:
            self._process.kill()  # it prints something else
        self.close()
        self._errors.seek(0)
        _say(f'{self.name}: {_failure(self._process.returncode, self._errors.read().decode(errors="replace"))}')
        return None

    def run(self, calls):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f'{calls}\n')
            self._process.stdin.flush()
        return self.answer()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def hold(commands, *, rounds, calls=None):
    """Time {name: command} in turn; return {name: {'wall', 'cpu', 'compile', 'rounds': [wall, ...], facts}}, seconds.

    'wall' and 'cpu' are medians of the rounds, per call; 'compile' is the time to the first result less a call. calls:
    of each contestant in a round; None: as many as take about a second. A contestant that fails, also in a later round,
    is left out, with a line that says why. Progress goes to standard error.
    """
    running, found, runs, per_round = {}, {}, {}, {}

    def ran(name, count):
        run = running[name].run(count)
        if run is None:
            del running[name], found[name]
        return run

    try:
        for name, command in commands.items():
            contestant = _Contestant(name, command)
            facts = contestant.answer()
            if facts is None:
                continue
            running[name], found[name], runs[name], per_round[name] = contestant, facts, [], calls
            _say(f'{name}: ready after {facts["ready"]:.3g} s')
            if calls is None and (run := ran(name, 1)) and (again := ran(name, 1)):
                per_round[name] = max(1, math.ceil(1 / max(min(run['wall'], again['wall']), 1e-3)))
        for number in range(rounds):
            for name in list(running):
                if run := ran(name, per_round[name]):
                    runs[name].append(run)
                    _say(f'round {number + 1}/{rounds}  {name}: {run["wall"]:.4g} s')
    finally:
        for contestant in running.values():
            contestant.close()
    for name, each in found.items():
        each |= {key: statistics.median(run[key] for run in runs[name]) for key in ('wall', 'cpu')}
        each['compile'] = max(0.0, each.pop('ready') - each['wall'])
        each |= {'rounds': [run['wall'] for run in runs[name]], 'calls': per_round[name]}
    return found


def ask(name, command):
    """Return what a program prints last, read as JSON; None, after a line that says why, if it fails."""
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode == 0:
        with contextlib.suppress(json.JSONDecodeError, IndexError):
            answer = json.loads(done.stdout.splitlines()[-1])
            _say(f'{name}: answered after {time.perf_counter() - began:.0f} s')
            return answer
    _say(f'{name}: {_failure(done.returncode, done.stderr)}')
    return None


def _failure(status, errors):
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f'left out, it ended with status {status}' + (f': {lines[-1][:200]}' if lines else '')


def _say(line):
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what is shown and kept


def ratio(found, name, other):
    """Return the median over the rounds of name's time / other's, both of the same round."""
    return statistics.median(a / b for a, b in zip(found[name]['rounds'], found[other]['rounds']))


def best_peer(found):
    """Return the fastest contestant that is neither 'ours' nor 'before'; None without one."""
    return min(
        (name for name in found if name not in ('ours', 'before')), key=lambda name: found[name]['wall'], default=None
    )


def summary(title, found):
    """Return the table of a contest in Markdown, and the ratios that it comes to below it."""
    columns = ('wall s', 'rounds', 'CPU s', 'compile s', 'ours / this', 'parameters', 'version')
    rows = []
    for name, each in found.items():
        against = f'{ratio(found, "ours", name):.2f}' if 'ours' in found else '-'
        span = f'{min(each["rounds"]):.4g} to {max(each["rounds"]):.4g}'
        row = [f'{each["wall"]:.4g}', span, f'{each["cpu"]:.4g}', f'{each["compile"]:.1f}', against]
        rows.append((name, [*row, f'{each.get("parameters", 0):,}', each.get('version', '-')]))
    lines, peer = [table(title, columns, rows)], best_peer(found)
    if 'ours' in found and peer:
        lines.append(f'ours / best peer ({peer}): {ratio(found, "ours", peer):.2f}')
    if {'ours', 'before'} <= found.keys():
        lines.append(f'ours / before: {ratio(found, "ours", "before"):.2f}')
    return '\n\n'.join(lines)


def table(title, columns, rows):
    """Return a table in Markdown. rows: [(name, [text of each column, ...]), ...]."""
    lines = [[title, *columns], ['---'] * (1 + len(columns)), *([name, *cells] for name, cells in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def record(path, benchmark, **figures):
    """Append a line of JSON to a file: the date, the machine, the commit, and the figures."""
    line = {
        'benchmark': benchmark,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'cpu': _cpu_name(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'load': os.getloadavg()[0],  # others at work spoil the times
        'python': platform.python_version(),
        'commit': _commit(),
        **figures,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as file:
        file.write(f'{json.dumps(line)}\n')


def _cpu_name():
    with contextlib.suppress(OSError):
        if found := re.search(r'^model name\s*: (.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _commit():
    """Return the commit that is checked out, with '+' behind it if files differ from it; None without git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty=+', '--abbrev=7', '--exclude=*']
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return None
