"""The benchmarks' harness, with stand-ins for the contestants: nothing is compiled, and torch is not needed."""

import json
import subprocess
import sys

import pytest

from tests import tiny

FOLDER = tiny.ROOT / 'benchmarks'
STAND_IN = f"""
import sys, time
sys.path.insert(0, {str(FOLDER)!r})
import contest
seconds, calls_before_it_fails = float(sys.argv[1]), int(sys.argv[2])
print('a library prints what it likes', file=sys.stderr)

def run():
    global calls_before_it_fails
    if not calls_before_it_fails:
        raise ValueError('out of memory')
    calls_before_it_fails -= 1
    time.sleep(seconds)

contest.serve(run, time.perf_counter(), parameters=1234, version='stand-in 1.0')
"""


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks' modules as their scripts import them, by their names."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ('contest', 'contestants', 'shapes', 'ours', 'train_step', 'memory', 'startup')
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return lambda name: __import__(name)


def stand_in(seconds, calls=1000):
    return [sys.executable, '-c', STAND_IN, seconds, calls]


def test_contestants_take_turns_and_are_compared(bench, capfd):
    contest = bench('contest')
    found = contest.hold({'ours': stand_in(0.02), 'peer': stand_in(0.04), 'slow': stand_in(0.06)}, rounds=3, calls=1)
    assert list(found) == ['ours', 'peer', 'slow']
    assert all(len(each['rounds']) == 3 and each['cpu'] < each['wall'] for each in found.values())
    assert contest.best_peer(found) == 'peer' and 0.3 < contest.ratio(found, 'ours', 'peer') < 0.8
    progress = [line.split()[2] for line in capfd.readouterr().err.splitlines() if line.startswith('round')]
    assert progress == ['ours:', 'peer:', 'slow:'] * 3
    text = contest.summary('train', found)
    assert '1,234' in text and 'stand-in 1.0' in text and 'ours / best peer (peer): 0.' in text and 'before' not in text


def test_a_round_has_as_many_calls_as_take_a_second(bench):
    found = bench('contest').hold({'ours': stand_in(0.1)}, rounds=1)
    assert 5 <= found['ours']['calls'] <= 10


@pytest.mark.parametrize('calls', [0, 1, 2], ids=['at once', 'in the first round', 'in the second'])
def test_a_contestant_that_fails_is_left_out(bench, capfd, calls):
    found = bench('contest').hold({'broken': stand_in(0, calls), 'ours': stand_in(0)}, rounds=2, calls=1)
    assert list(found) == ['ours'] and len(found['ours']['rounds']) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if 'left out' in line]
    assert line == 'broken: left out, it ended with status 1: ValueError: out of memory'


def test_a_program_is_asked_once(bench, capfd):
    contest = bench('contest')
    assert contest.ask('x', [sys.executable, '-c', 'print("noise"); print("[1]")']) == [1]
    assert contest.ask('x', [sys.executable, '-c', 'raise SystemExit("no torch")']) is None
    assert capfd.readouterr().err.splitlines()[-1] == 'x: left out, it ended with status 1: no torch'


def test_what_the_peers_do_not_know_is_asked_of_ours_alone(bench):
    contestants = bench('contestants')
    parser = contestants.parser('', rounds=1, models=('digits',))
    parser.set_defaults(compile=False)
    given = [f'--before={tiny.ROOT}', '--torch_python=python']

    def names(*more, alone=()):
        return list(contestants.contenders(contestants.parse(parser, [*given, *more]), 'digits', 'sample', alone=alone))

    assert names() == ['ours', 'before', 'diffusers', 'diffusers/channels_last']
    assert names(alone=('--classifier',)) == ['ours', 'before']
    assert names('--only=ours', alone=('--classifier',)) == ['ours']


def test_a_benchmark_prints_a_table_and_appends_json(bench, monkeypatch, tmp_path, capsys):
    contestants, train_step = bench('contestants'), bench('train_step')
    monkeypatch.setattr(contestants, 'own', lambda options, *_: {'ours': stand_in(0), 'before': stand_in(0)})
    file = tmp_path / 'new' / 'results.jsonl'
    for _ in range(2):
        train_step.main(['--models=digits', '--tasks=train', '--rounds=1', '--calls=1', f'--results={file}'])
    printed = capsys.readouterr()
    assert printed.err.count(contestants.NO_PEERS) == 2 and '| ours |' in printed.out
    first, second = map(json.loads, file.read_text().splitlines())
    assert first.keys() == second.keys() >= {'date', 'cpu', 'cores', 'load', 'python', 'commit', 'rounds'}
    assert first['benchmark'] == 'train_step'
    assert first['contests'][0]['contestants']['before']['version'] == 'stand-in 1.0'


@pytest.mark.parametrize(
    ('option', 'message'),
    [('--models=unet', 'allowed: digits'), ('--rounds=0', '1 or more'), ('--before=/', 'no folder cfg_jax'),
     ('--guided_diffusion=/', 'no folder guided_diffusion')],
)  # fmt: skip
def test_mistakes_are_one_line(bench, capsys, option, message):
    with pytest.raises(SystemExit):
        bench('train_step').main([option])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_digits_shape_is_that_of_the_config(bench):
    config, shaped = tiny.load_config('digits'), bench('ours').shaped('digits')
    shaped.sample.batch_size = config.sample.batch_size  # 64 images are drawn of every network
    assert shaped.to_dict() == config.to_dict()


def test_peers_are_both_networks_in_every_variant(bench, tmp_path):
    contestants, train_step = bench('contestants'), bench('train_step')
    (tmp_path / 'guided_diffusion').mkdir()
    parser = contestants.parser('', rounds=1, models=train_step.MODELS)
    parser.add_argument('--compile', action='store_true')
    options = contestants.parse(parser, ['--torch_python=python', f'--guided_diffusion={tmp_path}', '--compile'])
    names = list(contestants.contenders(options, 'digits', 'train'))
    assert names[:3] == ['ours', 'guided_diffusion', 'guided_diffusion/channels_last'] and len(names) == 9
    options = contestants.parse(parser, ['--torch_python=python', '--only=ours,diffusers/channels_last'])
    options.compile = False
    assert list(contestants.contenders(options, 'digits', 'train')) == ['ours', 'diffusers/channels_last']


def test_an_images_memory_is_the_difference_of_two_batches(bench):
    assert bench('memory').per_image({'4': 500, '8': 900}) == (100, 100)


def test_time_is_counted_once_where_functions_call_each_other(bench):
    covered = bench('startup').covered
    assert covered([]) == 0 and covered([(2, 3), (0, 1)]) == 2 and covered([(0, 4), (1, 2), (3, 5)]) == 5


@pytest.mark.parametrize('name', ['train_step', 'sampling', 'startup', 'memory'])
def test_help_is_printed_without_jax_or_torch(name):
    code = f'import sys; sys.modules["jax"] = sys.modules["torch"] = None; sys.path.insert(0, {str(FOLDER)!r});'
    command = f'{code} sys.argv[1:] = ["--help"]; import {name}; {name}.main()'
    done = subprocess.run([sys.executable, '-c', command], capture_output=True, text=True)
    assert done.returncode == 0 and '--results' in done.stdout, done.stderr
