"""The scripts of launch/: the commands that they would run, and how they end, restart and forward signals.

Mostly without JAX: programs of the same names stand in for python, gcloud, srun and scontrol.
"""

import functools
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from tests import tiny

LAUNCH = tiny.ROOT / 'launch'
SCRIPTS = ['local.sh', 'slurm.sbatch', 'tpu_pod.sh', 'tpu_setup.sh', 'tpu_worker.sh']
CONFIG = '--config=configs/digits.py'
POD = ['slice', '--zone=us-west4-a', '--type=v5litepod-16', '--bucket=bucket', '--workdir=/mnt/cfg_jax/run', CONFIG]


def launch(script, *arguments, start=subprocess.run, path='', **environment):
    """Start launch/<script>, with `path` before $PATH and more environment, text piped."""
    environment = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    environment['PATH'] = f'{path}:{environment["PATH"]}' if path else environment['PATH']
    piped = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return start(['bash', LAUNCH / script, *map(str, arguments)], cwd=tiny.ROOT, env=environment, **piped)


def commands(script, *arguments, **environment):
    """Return what a dry run prints: a list of words for each command."""
    done = launch(script, '--dry-run', *arguments, **environment)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def program(path, code):
    """Write an executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\n{code}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('script', SCRIPTS)
def test_help(script):
    done = launch(script, '--help')
    assert done.returncode == 0 and done.stderr == ''
    itself = subprocess.run([LAUNCH / script, '--help'], capture_output=True, text=True)  # the file can be executed
    assert itself.returncode == 0 and itself.stdout == done.stdout
    assert f'launch/{script}' in done.stdout and '--dry-run' in done.stdout and '#' not in done.stdout
    # every option that the script takes
    for option in {word.split(')')[0].strip() for word in (LAUNCH / script).read_text().splitlines()}:
        for name in option.split(' | '):
            if name.startswith('--') and name != '--':
                assert name.split('=')[0] in done.stdout, name


WRONG = [
    ('local.sh', [], 'no number of processes'),
    ('local.sh', [2], 'no config'),
    ('local.sh', ['two', CONFIG], "is 'two'; it must be a whole number, at least 1"),
    ('local.sh', [2, CONFIG, '--restart=3'], "unknown option '--restart=3'"),
    ('local.sh', [2, CONFIG, '--restarts=-3'], "--restarts is '-3'"),
    ('local.sh', [2, CONFIG, '--workdir', 'runs/x'], "unknown option '--workdir'"),
    ('slurm.sbatch', [CONFIG, '--workdir=runs/x'], 'not in a SLURM job'),
    ('slurm.sbatch', [CONFIG], 'no --workdir'),
    ('slurm.sbatch', ['--nodes=2', CONFIG], "unknown option '--nodes=2'"),
    ('tpu_pod.sh', [], 'no name for the slice'),
    ('tpu_pod.sh', ['slice'], 'no --zone'),
    ('tpu_pod.sh', POD, 'no --delete or --keep'),
    ('tpu_pod.sh', [*POD, '--keep', '--delete'], '--delete and --keep exclude each other'),
    (
        'tpu_pod.sh',
        [*POD, '--keep', '--workdir=gs://bucket/run'],
        "is 'gs://bucket/run'; it must be below /mnt/cfg_jax",
    ),
    ('tpu_pod.sh', [*POD, '--keep', '--nfs=host:/share'], 'exclude each other'),
    ('tpu_pod.sh', [*POD, '--keep', '--type=h100'], 'no default software for --type=h100'),
    ('tpu_pod.sh', [*POD, '--spott'], "unknown option '--spott'"),
    ('tpu_setup.sh', ['--bucket=a', '--nfs=b:/c'], 'exclude each other'),
    ('tpu_setup.sh', ['--nfs=host'], "--nfs is 'host'; it must be HOST:/SHARE"),
    ('tpu_worker.sh', ['jump'], "unknown action 'jump'"),
    ('tpu_worker.sh', ['start'], 'no config'),
]


@pytest.mark.parametrize(('script', 'arguments', 'message'), WRONG)
def test_wrong_options(script, arguments, message, tmp_path):
    program(tmp_path / 'gcloud', 'echo called')
    done = launch(script, *arguments, path=tmp_path)
    assert done.returncode == 2 and done.stdout == ''
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ') and message in line


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck')
def test_shellcheck():
    files = [*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch'), tiny.ROOT / '.ci' / 'run']
    done = subprocess.run(['shellcheck', '-x', *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_commands_of_local_processes():
    found = commands('local.sh', 2, '--devices=4', CONFIG, '--workdir=a b', PYTHON='py', XLA_FLAGS='--x')
    assert len(found) == 2
    for index, words in enumerate(found):
        environment = dict(word.split('=', 1) for word in words[1:-5])
        assert words[0] == 'env' and words[-5:] == ['py', '-m', 'cfg_jax.main', CONFIG, '--workdir=a b']
        assert environment['JAX_PROCESS_ID'] == str(index) and environment['JAX_NUM_PROCESSES'] == '2'
        assert environment['JAX_PLATFORMS'] == 'cpu'
        assert environment['XLA_FLAGS'] == '--x --xla_force_host_platform_device_count=4'
    assert (
        len({word for words in found for word in words if word.startswith('JAX_COORDINATOR_ADDRESS=localhost:')}) == 1
    )


def test_the_commands_of_a_slurm_job():
    submit, step, requeue = commands('slurm.sbatch', CONFIG, '--workdir=/shared/run')
    assert submit == ['sbatch', 'launch/slurm.sbatch', CONFIG, '--workdir=/shared/run']
    assert step[0] == 'srun' and '--kill-on-bad-exit=1' in step and '--output=/shared/run/slurm/%j_%t.log' in step
    assert step[-4:] == ['-m', 'cfg_jax.main', CONFIG, '--workdir=/shared/run']
    assert requeue[:2] == ['scontrol', 'requeue']
    assert '--cpus-per-task=3' in commands('slurm.sbatch', CONFIG, '--workdir=x', SLURM_CPUS_PER_TASK=3)[1]
    directives = dict(
        line.split()[1].lstrip('-').partition('=')[::2]
        for line in (LAUNCH / 'slurm.sbatch').read_text().splitlines()
        if line.startswith('#SBATCH')
    )
    assert directives['signal'].startswith('TERM@') and 'requeue' in directives  # to the processes, not to B:
    # JAX gives each process the GPU of its local number
    assert directives['gres'] == f'gpu:{directives["ntasks-per-node"]}'
    assert f'--cpus-per-task={directives["cpus-per-task"]}' in step


@pytest.mark.parametrize(('workdir', 'found'), [('~', '/home/me'), ('~/a b', '/home/me/a b'), ('x/~', 'x/~')])
def test_the_home_folder_in_a_workdir(workdir, found):
    """Read as the program does; the program still gets the flag unchanged."""
    step = commands('slurm.sbatch', CONFIG, f'--workdir={workdir}', HOME='/home/me')[1]
    assert f'--output={found}/slurm/%j_%t.log' in step and f'--workdir={workdir}' in step


@pytest.mark.parametrize('script', [['local.sh', 2], ['slurm.sbatch'], ['tpu_pod.sh', *POD, '--keep']])
def test_every_script_passes_on_how_long_to_wait_for_the_others(script):
    assert any(
        '--join_seconds=600' in word
        for words in commands(*script, CONFIG, '--workdir=/mnt/cfg_jax/run', '--join_seconds=600')
        for word in words
    )


def test_the_commands_of_a_slice():
    shown = launch('tpu_pod.sh', '--dry-run', *POD, '--delete', '--spot').stdout.splitlines()
    inside = [shlex.split(line) for line in shown if line.startswith('    ')]  # what scripts run on each worker
    outside = [shlex.split(line) for line in shown if not line.startswith(' ')]
    find, create, look, pack, copy, unpack, setup, again, start, follow, request, delete = outside
    tpus = ['gcloud', 'compute', 'tpus']
    assert find[:6] == [*tpus, 'tpu-vm', 'describe', 'slice']
    assert request[:6] == [*tpus, 'queued-resources', 'describe', 'slice']
    assert look == again and f'--command=bash cfg_jax/launch/tpu_worker.sh state {" ".join(POD[-2:])}' in look
    assert ['python3.11', '-m', 'venv', '~/cfg_jax_venv'] in inside and inside[-3][-1] == '~/cfg_jax[tpu]'
    assert inside[-1] == ['~/cfg_jax_venv/bin/python', '-m', 'cfg_jax.main', *POD[-2:]]
    assert create[:6] == [*tpus, 'tpu-vm', 'create', 'slice']
    assert {'--zone=us-west4-a', '--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite', '--spot'} < {
        *create
    }
    assert pack[0] == 'tar' and copy[:5] == [*tpus, 'tpu-vm', 'scp'] and pack[2] == copy[5]
    remote = []
    for words in (copy, unpack, setup, start, follow):
        assert '--worker=all' in words
        remote += [shlex.split(word.removeprefix('--command=')) for word in words if word.startswith('--command=')]
    assert remote[1] == ['bash', 'cfg_jax/launch/tpu_setup.sh', '--mount=/mnt/cfg_jax', '--bucket=bucket']
    assert remote[2][:2] == ['env', 'JAX_COMPILATION_CACHE_DIR=/mnt/cfg_jax/compiled']
    assert remote[2][2:] == ['bash', 'cfg_jax/launch/tpu_worker.sh', 'start', '--workdir=/mnt/cfg_jax/run', CONFIG]
    assert remote[3][1:] == ['cfg_jax/launch/tpu_worker.sh', 'follow', 'all']
    assert delete[:6] == [*tpus, 'tpu-vm', 'delete', 'slice']
    queued = commands('tpu_pod.sh', *POD, '--keep', '--queued', '--spot')
    assert [words[3:6] for words in queued[1:3]] == [
        ['queued-resources', verb, 'slice'] for verb in ('describe', 'create')
    ]
    assert {'--node-id=slice', '--runtime-version=v2-alpha-tpuv5-lite', '--spot'} < {*queued[2]}
    assert not any('delete' in words for words in queued)
    _, gone = commands('tpu_pod.sh', 'slice', '--zone=z', '--project=p', '--delete')
    assert gone == [*tpus, 'tpu-vm', 'delete', 'slice', '--quiet', '--zone=z', '--project=p']


def test_the_commands_of_a_worker(tmp_path):
    share = commands('tpu_setup.sh', '--nfs=host:/share', '--mount=/mnt/x', '--venv=/v', HOME=tmp_path)
    assert any(words[0] == '/v/bin/pip' and words[-1] == f'{tiny.ROOT}[tpu]' for words in share)
    assert any(words[:2] == ['sudo', 'mount'] and words[-2:] == ['host:/share', '/mnt/x'] for words in share)
    bucket = commands('tpu_setup.sh', '--bucket=gs://name/', HOME=tmp_path)
    (mount,) = [words for words in bucket if words[0] == 'gcsfuse']
    assert mount[-2:] == ['name', '/mnt/cfg_jax']
    (key,) = [words[4] for words in bucket if words[:2] == ['sudo', 'curl']]
    (source,) = [words[3] for words in bucket if words[:2] == ['sudo', 'sh'] and 'sources.list.d' in words[3]]
    assert f'"deb [signed-by={key}] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"' in source
    # a fresh worker's commands, whatever this machine has; what can fail soon comes before pip
    (install,) = [words for words in bucket if 'install' in words and 'apt-get' in words]
    assert install[-3:] == ['python3.11', 'python3.11-venv', 'gcsfuse']
    assert bucket.index(mount) < [words[-1] for words in bucket].index(f'{tiny.ROOT}[tpu]')
    assert any(words[-1] == 'nfs-common' for words in share)
    (start,) = commands('tpu_worker.sh', 'start', CONFIG, HOME=tmp_path)
    assert start == [f'{tmp_path}/cfg_jax_venv/bin/python', '-m', 'cfg_jax.main', CONFIG]


def test_kubernetes():
    service, job = yaml.safe_load_all((LAUNCH / 'kubernetes.yaml').read_text())
    spec, pod = job['spec'], job['spec']['template']['spec']
    (container,) = pod['containers']
    environment = {variable['name']: variable for variable in container['env']}
    name, subdomain = job['metadata']['name'], pod['subdomain']
    assert environment['JAX_COORDINATOR_ADDRESS']['value'].split(':')[0] == f'{name}-0.{subdomain}'
    assert service['metadata']['name'] == subdomain and service['spec']['selector'] == {'job-name': name}
    assert spec['completionMode'] == 'Indexed' and spec['parallelism'] == spec['completions']
    assert environment['JAX_NUM_PROCESSES']['value'] == str(spec['parallelism'])
    assert 'job-completion-index' in environment['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
    rules = {rule['action']: rule['onExitCodes']['values'] for rule in spec['podFailurePolicy']['rules'][:2]}
    assert rules == {'FailJob': [2], 'Ignore': [75]} and pod['restartPolicy'] == 'Never'


# In place of python: notes that it started, and ends as $ENDS says for its number at each start: '75,75 0,0'. With
# $SAVES, the workdir, it leaves a checkpoint when it ends with 75.
PYTHON = r"""
number=${JAX_PROCESS_ID:-$WORKER}
note=$STARTS/$number
starts=$(($(cat "$note" 2> /dev/null | wc -w) + 1))
ends=($ENDS)
codes=(${ends[starts - 1]//,/ })
code=${codes[number]}
trap 'echo saved; exit 75' TERM
trap 'exit 130' INT
if [ "$code" = deaf ]; then trap '' TERM INT; fi
echo x >> "$note"
echo "here $number of $JAX_NUM_PROCESSES: $*"
echo "[$number] as the program itself puts it" >&2
if [ "$code" = 75 ] && [ "${SAVES:-}" ]; then mkdir -p "$SAVES/checkpoints/${#ends[@]}$starts"; fi
if [ "$code" = gone ]; then echo PREEMPTED > "$FAKE/state"; exit 143; fi
if [ "$code" = deleted ]; then rm -r "$FAKE/state" "$FAKE/homes"; exit 143; fi
if [ "$code" = long ]; then printf 'line %s\n' {1..30}; code=0; fi
while [ "$code" = wait ]; do
  if [ "${FAKE:-}" ] && ! grep -qs READY "$FAKE/state"; then kill -KILL $$; fi
  sleep 0.1
done
if [ "$code" = deaf ]; then exec sleep 60; fi
exit "$code"
"""


@pytest.fixture
def local(tmp_path):
    """Start local.sh with a stand-in for python, which ends as `ends` says."""
    (tmp_path / 'starts').mkdir()
    python = program(tmp_path / 'python', PYTHON)

    def start(count, *arguments, ends, **options):
        flags = [CONFIG, f'--workdir={tmp_path / "workdir"}']
        return launch(
            'local.sh', count, *arguments, *flags, PYTHON=python, ENDS=ends, STARTS=tmp_path / 'starts', **options
        )

    return start


def starts(tmp_path):
    """Return how often each process was started."""
    return {path.name: len(path.read_text().split()) for path in sorted((tmp_path / 'starts').iterdir())}


def test_local_exit_codes_are_passed_on(local, tmp_path):
    done = local(2, ends='0,0')
    shown = sorted(line.split(':')[0] for line in done.stdout.splitlines())
    assert done.returncode == 0 and shown == [
        '[0] as the program itself puts it',
        '[0] here 0 of 2',
        '[1] as the program itself puts it',
        '[1] here 1 of 2',
    ]
    shutil.rmtree(tmp_path / 'starts')
    (tmp_path / 'starts').mkdir()
    # 2 counts most, whoever ended first; it is never started again
    done = local(2, '--restarts=3', ends='7,2')
    assert done.returncode == 2 and starts(tmp_path) == {'0': 1, '1': 1}


def test_local_one_death_is_everyones(local):
    began = time.monotonic()
    done = local(2, '--grace=1', ends='deaf,7')
    assert done.returncode == 7 and time.monotonic() - began < 30  # deaf for 60
    assert 'process 1 ended with exit code 7' in done.stderr and 'processes 0 did not end within 1 s' in done.stderr


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_signals_reach_all(local, tmp_path, number, code):
    running = local(2, '--restarts=3', ends='wait,wait', start=subprocess.Popen)
    while len(starts(tmp_path)) < 2:
        time.sleep(0.05)
    running.send_signal(number)
    out, err = running.communicate(timeout=20)
    assert running.returncode == code and starts(tmp_path) == {'0': 1, '1': 1}, err
    assert out.count('saved') == (2 if code == 75 else 0)


def test_local_a_second_interrupt_kills(local, tmp_path):
    running = local(2, ends='deaf,deaf', start=subprocess.Popen)
    while len(starts(tmp_path)) < 2:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert 'SIGINT' in running.stderr.readline()
    time.sleep(0.5)  # bash loses one that comes while it deals with the first
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=20)
    assert running.returncode == 137


def test_local_restarts(local, tmp_path):
    done = local(2, '--restarts=2', ends='75,75 134,1 0,0')
    assert done.returncode == 0 and starts(tmp_path) == {'0': 3, '1': 3}, done.stderr
    # a limited number of times, unless there is a new checkpoint
    shutil.rmtree(tmp_path / 'starts')
    (tmp_path / 'starts').mkdir()
    done = local(1, '--restarts=1', f'--logs={tmp_path / "logs"}', ends='75 75 75 75')
    assert done.returncode == 75 and starts(tmp_path) == {'0': 2}
    assert 'without a new checkpoint' in done.stderr and done.stdout.count('here 0 of 1') == 2
    assert (tmp_path / 'logs' / 'process_0.log').read_text() == done.stdout
    done = local(1, '--restarts=1', ends='75 75 75 75 0', SAVES=tmp_path / 'workdir')
    assert done.returncode == 0 and starts(tmp_path) == {'0': 5}, done.stderr


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_stopped_between_two_starts(local, tmp_path, number, code):
    # basename looks at the checkpoints, before the second start
    waits = 'touch "$STARTS/../looks"; until [ -e "$STARTS/../signalled" ]; do sleep 0.05; done'
    program(
        tmp_path / 'bin' / 'basename',
        f'if [ -e "$STARTS/0" ]; then {waits}; fi\nexec {shutil.which("basename")} "$@"',
    )
    options = {'SAVES': tmp_path / 'workdir', 'path': tmp_path / 'bin', 'start': subprocess.Popen}
    running = local(1, '--restarts=3', ends='75 0', **options)
    while not (tmp_path / 'looks').exists():
        time.sleep(0.05)
    running.send_signal(number)
    (tmp_path / 'signalled').touch()
    _, err = running.communicate(timeout=20)
    assert running.returncode == code and starts(tmp_path) == {'0': 1}, err


@pytest.mark.slow
def test_local_trains_for_real(tmp_path):
    """Two processes with two devices each; one is killed, and the job resumes from the checkpoint and finishes."""
    flags = tiny.flags(train__num_steps=60, train__checkpoint_every=20, train__log_every=20)
    running = launch(
        'local.sh',
        *(2, '--devices=2', '--grace=2', '--restarts=3', *flags, f'--workdir={tmp_path}'),
        PYTHON=tiny.sys.executable,
        start=subprocess.Popen,
    )
    while not (tmp_path / 'checkpoints' / '20').exists():
        time.sleep(0.1)
        assert running.poll() is None, running.communicate()
    children = subprocess.run(['pgrep', '-P', str(running.pid), '-f', 'm cfg_jax.main'], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0 and 'restarting from checkpoint' in err, out + err
    assert '[0] resuming from' in out and '4 cpu devices' in out
    assert (tmp_path / 'checkpoints' / '60').exists()


@pytest.mark.parametrize(
    ('codes', 'code', 'requeues'),
    [((75, 75), 75, [1] * 5), ((2, 143), 2, [0]), ((0, 0), 0, [0]), ((134, 1), 134, [1, 1, 1, 0])],
)
def test_slurm(tmp_path, codes, code, requeues):
    """A job of two processes that end with these codes is requeued this often, run after run."""
    saves = 'mkdir -p run/checkpoints/$(date +%s%N)' if code == 75 else ''
    lines = '\n'.join(f'echo "srun: error: node: task {i}: Exited with exit code {c}" >&2' for i, c in enumerate(codes))
    program(tmp_path / 'bin' / 'srun', f'cd {tmp_path}; {saves}\n{lines}\nexit {max(codes)}')
    program(tmp_path / 'bin' / 'scontrol', f'echo "$*" >> {tmp_path}/requeued')
    arguments = ['slurm.sbatch', CONFIG, f'--workdir={tmp_path / "run"}']
    job = {'SLURM_JOB_ID': 12, 'SLURM_SUBMIT_DIR': tiny.ROOT}
    asked = []
    for requeue in requeues:
        (tmp_path / 'requeued').write_text('')
        done = launch(*arguments, path=tmp_path / 'bin', **job)
        asked.append((tmp_path / 'requeued').read_text().splitlines())
        assert done.returncode == (0 if requeue else code), done.stdout + done.stderr
    assert asked == [['requeue 12'] * requeue for requeue in requeues]


def test_slurm_with_a_full_disk(tmp_path):
    """The program's exit code 2 is passed on, though nothing can be written to the workdir any more."""
    program(tmp_path / 'bin' / 'srun', 'echo "srun: error: node: task 1: Exited with exit code 2" >&2; exit 143')
    program(tmp_path / 'bin' / 'tee', f'[[ $1 == {tmp_path}/run/* ]] && cat || {shutil.which("tee")} "$@"; exit 1')
    job = {'SLURM_JOB_ID': 12, 'SLURM_SUBMIT_DIR': tiny.ROOT, 'TMPDIR': tmp_path}
    done = launch('slurm.sbatch', CONFIG, f'--workdir={tmp_path / "run"}', path=tmp_path / 'bin', **job)
    assert done.returncode == 2, done.stdout + done.stderr
    program(tmp_path / 'bin' / 'srun', 'exit 2')
    done = launch('slurm.sbatch', CONFIG, f'--workdir={tmp_path / "run"}', path=tmp_path / 'bin', **job)
    assert done.returncode == 2, done.stdout + done.stderr


# In place of gcloud: one slice of two workers, whose home folders are $FAKE/homes/0 and 1; $FAKE/state is its state,
# after the lines of $FAKE/answers, and $FAKE/request that of its request. Each line of $FAKE/cuts breaks one `follow`:
# `now`, when the job has `ended`, or for good (`lost`). What $REPEATS matches runs twice, as gcloud repeats it after a
# connection broke.
GCLOUD = r"""
echo "$3 $4" >> "$FAKE/calls"
pop() { [ -s "$FAKE/$1" ] && head -n 1 "$FAKE/$1" && sed -i 1d "$FAKE/$1"; }
make_slice() {
  for home in "$FAKE"/homes/{0,1}; do mkdir -p "$home/cfg_jax_venv" && ln -s "$FAKE/bin" "$home/cfg_jax_venv/bin"; done
  echo READY > "$FAKE/state"
}
on_worker() { cd "$FAKE/homes/$1" && HOME=$PWD WORKER=$1 bash -c "$command"; }
case "$3 $4" in
  'tpu-vm describe')
    answer=$(pop answers) || answer=$(cat "$FAKE/state" 2> /dev/null) || answer=NOT_FOUND
    if [[ $answer == NOT_FOUND || $answer == NO_NETWORK ]]; then echo "ERROR: $answer" >&2; exit 1; fi
    echo "$answer"
    ;;
  'tpu-vm create') make_slice ;;
  'tpu-vm start') ;;
  'tpu-vm delete') rm -r "$FAKE/state" "$FAKE/homes" ;;
  'tpu-vm scp') for worker in 0 1; do cp "$5" "$FAKE/homes/$worker"; done ;;
  'tpu-vm ssh')
    [ ! -e "$FAKE/lost" ] || exit 255
    for word; do if [[ $word == --command=* ]]; then command=${word#*=}; fi; done
    if [[ $command == *tpu_setup.sh* ]]; then exit "${SETUP:-0}"; fi
    if [[ $command == *'tpu_worker.sh follow'* ]] && cut=$(pop cuts); then
      if [ "$cut" = lost ]; then touch "$FAKE/lost"; fi
      while [ "$cut" = ended ] && (($(ls "$FAKE"/homes/*/cfg_jax_job/code 2> /dev/null | wc -l) < 2)); do sleep 1; done
      exit 255
    fi
    again=:
    if [ "${REPEATS:-}" ] && [[ $command == *"$REPEATS"* ]]; then again=on_worker; fi
    for worker in 0 1; do (on_worker "$worker" && "$again" "$worker") & done |
      while IFS= read -r line; do if grep -qs READY "$FAKE/state"; then echo "$line"; fi; done
    grep -qs READY "$FAKE/state" || exit 255
    ;;
  'queued-resources create')
    echo "${REQUEST:-ACTIVE}" > "$FAKE/request"
    if [ ! "${REQUEST:-}" ]; then make_slice; fi
    ;;
  'queued-resources describe')
    cat "$FAKE/request" 2> /dev/null || { echo 'ERROR: NOT_FOUND' >&2; exit 1; }
    if [[ $* == *yaml* ]]; then echo 'error: no quota'; fi
    ;;
  'queued-resources delete') rm -rf "$FAKE/request" "$FAKE/state" "$FAKE/homes" ;;
  *) echo "unknown: $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Start tpu_pod.sh with a stand-in for gcloud, on whose two workers a stand-in for python ends as `ends` says."""
    program(tmp_path / 'bin' / 'gcloud', GCLOUD)
    program(tmp_path / 'bin' / 'python', PYTHON)
    program(tmp_path / 'bin' / 'curl', 'echo "$WORKER"')
    program(tmp_path / 'bin' / 'sleep', 'exec /bin/sleep 0.1')
    # the real one, without the tests' files, which take most of its time
    program(tmp_path / 'bin' / 'tar', f'exec {shutil.which("tar")} --exclude=./tests "$@"')
    program(tmp_path / 'bin' / 'ssh-add', 'echo 256 SHA256:theirs me; echo 3072 SHA256:gcloud me')
    program(tmp_path / 'bin' / 'ssh-keygen', 'echo 3072 SHA256:gcloud me')
    (tmp_path / 'starts').mkdir()
    workdir = tmp_path / 'mount' / 'run'

    def start(*arguments, ends, **options):
        slice_ = ['slice', '--zone=z', '--type=v5litepod-8', '--mounted', f'--mount={workdir.parent}']
        flags = [CONFIG, f'--workdir={workdir}', f'--log={tmp_path / "log"}']
        paths = {'FAKE': tmp_path, 'STARTS': tmp_path / 'starts', 'SAVES': workdir}
        return launch('tpu_pod.sh', *slice_, *arguments, *flags, path=tmp_path / 'bin', ENDS=ends, **paths, **options)

    yield start
    (tmp_path / 'state').unlink(missing_ok=True)  # which ends what still runs


def calls(tmp_path, verb):
    """Return how often gcloud was called with this verb."""
    return (tmp_path / 'calls').read_text().split().count(verb)


def test_a_slice_that_is_preempted(pod, tmp_path):
    """Preempted with the slice gone, then asked to save, then done: created and installed twice, started thrice."""
    done = pod('--delete', '--restarts=1', ends='wait,gone 75,75 0,0')
    assert done.returncode == 0 and starts(tmp_path) == {'0': 3, '1': 3}, done.stderr
    assert [calls(tmp_path, verb) for verb in ('create', 'scp', 'delete')] == [2, 2, 2]
    assert '[0] here 0 of' in done.stdout and '[1] here' not in done.stdout
    assert '[1] here 1 of' in (tmp_path / 'log').read_text()


def test_a_slice_whose_job_needs_a_correction(pod, tmp_path):
    done = pod('--keep', ends='1,2')
    assert done.returncode == 2 and starts(tmp_path) == {'0': 1, '1': 1}, done.stderr
    assert '[1] here 1 of' in done.stdout  # the last lines of the worker that failed
    done = pod('--keep', ends='', SETUP=2)
    assert done.returncode == 2 and starts(tmp_path) == {'0': 1, '1': 1}, done.stderr
    # the slice is there still; a job that crashes is started again so many times
    done = pod('--keep', '--restarts=1', ends='x 7,7 7,7 7,7')
    assert done.returncode == 7 and starts(tmp_path) == {'0': 3, '1': 3}, done.stderr
    assert 'without a new checkpoint' in done.stderr
    # or not at all
    done = pod('--keep', '--restarts=0', ends='x x x 75,75')
    assert done.returncode == 75 and starts(tmp_path) == {'0': 4, '1': 4}, done.stderr
    assert calls(tmp_path, 'create') == 1 and calls(tmp_path, 'delete') == 0


def test_a_job_on_a_slice_that_its_user_stops(pod, tmp_path):
    """It runs on after Ctrl-C, is found again, connections to it break, and --stop ends it for good."""
    options = {'ends': 'wait,wait 0,0', 'start': functools.partial(subprocess.Popen, start_new_session=True)}
    running = pod('--keep', **options, REPEATS='tpu_worker.sh start')
    while 'started from' not in running.stderr.readline():
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    assert 'the job keeps running' in running.communicate(timeout=60)[1] and running.returncode == 130
    (tmp_path / 'cuts').write_text('now\n' * 11)
    running = pod('--delete', **options)
    while (tmp_path / 'cuts').read_text():
        time.sleep(0.1)
        assert running.poll() is None, running.communicate()
    stop = launch('tpu_pod.sh', 'slice', '--zone=z', '--stop', path=tmp_path / 'bin', FAKE=tmp_path)
    assert stop.returncode == 0 and sorted(stop.stdout.splitlines()) == ['[0] stopped', '[1] stopped']
    _, err = running.communicate(timeout=60)
    assert running.returncode == 75 and 'stopped with --stop' in err and starts(tmp_path) == {'0': 1, '1': 1}, err
    assert calls(tmp_path, 'delete') == 1  # as the script does at the end


def test_a_slice_out_of_reach_is_not_deleted_under_its_job(pod, tmp_path):
    (tmp_path / 'cuts').write_text('lost\n')
    done = pod('--delete', ends='wait,wait')
    assert done.returncode == 1 and 'could not be reached' in done.stderr and 'may still be running' in done.stderr
    assert calls(tmp_path, 'delete') == 0


def test_exit_codes_outlast_the_connection(pod, tmp_path):
    (tmp_path / 'cuts').write_text('ended\n')
    done = pod('--keep', ends='1,2 0,0')
    assert done.returncode == 2 and starts(tmp_path) == {'0': 1, '1': 1}, done.stderr


def test_a_whole_log_is_shown_once(pod, tmp_path):
    done = pod('--keep', ends='long,0', REPEATS='tpu_worker.sh follow')
    assert done.returncode == 0 and (tmp_path / 'log').read_text().count('[0] line 1\n') == 1, done.stderr


def test_a_slice_that_somebody_deletes(pod, tmp_path):
    done = pod('--keep', ends='wait,deleted 0,0')
    assert done.returncode == 1 and 'somebody has deleted' in done.stderr and calls(tmp_path, 'create') == 1


def test_a_slice_from_the_queue(pod, tmp_path):
    """A lost connection while waiting does no harm, and a slice that is stopped is started."""
    (tmp_path / 'answers').write_text('NOT_FOUND\nNO_NETWORK\nSTOPPED\n')
    done = pod('--queued', '--delete', ends='0,0')
    assert done.returncode == 0, done.stderr
    assert [calls(tmp_path, verb) for verb in ('create', 'start', 'delete')] == [1, 1, 1]


def test_ctrl_c_in_the_queue(pod):
    session = functools.partial(subprocess.Popen, start_new_session=True)
    running = pod('--queued', '--delete', ends='', REQUEST='WAITING_FOR_RESOURCES', start=session)
    while 'WAITING' not in running.stderr.readline():
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    assert 'launch/tpu_pod.sh slice --zone=z --delete' in running.communicate(timeout=60)[1]
    assert running.returncode == 130


def test_a_request_that_fails(pod, tmp_path):
    done = pod('--queued', '--keep', ends='', REQUEST='FAILED')
    assert done.returncode == 2 and 'no quota' in done.stderr and calls(tmp_path, 'create') == 1
    assert done.stderr.splitlines()[-1].startswith('error: ')


def test_an_agent_without_the_key_of_gcloud(pod, tmp_path):
    program(tmp_path / 'bin' / 'ssh-add', 'echo 256 SHA256:theirs me')
    done = pod('--keep', ends='')
    assert done.returncode == 2 and done.stderr.startswith('error: ssh-agent') and not (tmp_path / 'calls').exists()
