#!/usr/bin/env bash
# Manage the job on one worker of a Cloud TPU slice. launch/tpu_pod.sh calls this on all workers at once. Every line of
# output starts with the worker's number. The job outlives the connection that started it.
#
#   launch/tpu_worker.sh state FLAGS...    print the flags of the running job, or else the checkpoint that a job with
#                                          these flags would resume from
#   launch/tpu_worker.sh start FLAGS...    start cfg_jax.main with these flags in the background
#   launch/tpu_worker.sh follow [all]      print the job's output until it ends, and its exit code; begins at the last
#                                          20 lines, or, with `all` and for the first time, at the first
#   launch/tpu_worker.sh stop [restart]    send SIGTERM, so that the job saves, and SIGKILL five minutes later; a script
#                                          that follows the job restarts it only after `stop restart`
#   --dry-run, before these                print the command that start runs, and run nothing
#   --help                                 print this help
#
# ~/cfg_jax_job holds the log, exit code and process numbers. The interpreter is $PYTHON, or that of
# launch/tpu_setup.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
root=$(cd "$(dirname "$0")/.." && pwd)
state=$HOME/cfg_jax_job
python=${PYTHON:-$HOME/cfg_jax_venv/bin/python}

dry_run=''
if [ "${1:-}" = --dry-run ]; then dry_run=1 && shift; fi
action=${1:-}
[ "$action" ] || die 'no action; launch/tpu_worker.sh --help lists them.'
shift
case $action in
  --help) help && exit ;;
  start | state)
    for word in "$@"; do is_program_flag "$word" || die "unknown option '$word'; flags are given as --name=value."; done
    [ "$(flag_value config "$@")" ] || die 'no config; give one of configs/.'
    ;;
  follow) [ "$*" = all ] || (($# == 0)) || die "unexpected '$1' after $action." ;;
  stop) [ "$*" = restart ] || (($# == 0)) || die "unexpected '$1' after $action." ;;
  *) die "unknown action '$action'; launch/tpu_worker.sh --help lists them." ;;
esac
command=("$python" -m cfg_jax.main "$@")
if [ "$dry_run" ]; then
  [ "$action" != start ] || quoted "${command[@]}"
  exit
fi

# From the same source as JAX.
worker=$(curl -sf --max-time 10 -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) || worker=$(hostname)
say() {
  echo "[$worker] $*"
}
is_running() {
  # checks the command too, because after a reboot another program may have its number
  [ -s "$state/keeper" ] && grep -qs cfg_jax.main "/proc/$(cat "$state/keeper")/cmdline"
}
# A script that follows the job does not restart it once its user has stopped it.
stopped() {
  if [ -e "$state/stopped" ]; then echo ', stopped'; fi
}

mkdir -p "$state"
case $action in
  state)
    if is_running; then say "running: $(cat "$state/flags")"; exit; fi
    workdir=$(cd "$root" && realpath -m "$(workdir_of "$@")")
    say "not running$(stopped), newest checkpoint $(newest_checkpoint "$workdir")"
    ;;
  start)
    if is_running; then
      say 'already running'
      exit
    fi
    rm -f "$state"/{code,process,shown,stopped}
    quoted "$@" > "$state/flags"
    : > "$state/log"
    # A keeper in a session of its own outlives this connection and records the exit code.
    # shellcheck disable=SC2016 # the inner bash expands them
    keep='cd "$1"; "${@:3}" & echo $! > "$2/process"; code=0; wait $! || code=$?; echo $code > "$2/code"'
    PYTHONUNBUFFERED=1 setsid bash -c "$keep" bash "$root" "$state" "${command[@]}" \
      > "$state/log" 2>&1 < /dev/null &
    echo $! > "$state/keeper"
    say started
    ;;
  follow)
    [ -s "$state/keeper" ] || die 'no job was started on this worker.'
    lines=20
    # Only once, because gcloud reruns a command whose connection broke.
    if [ "${1:-}" = all ] && [ ! -e "$state/shown" ]; then lines=+1; fi
    : > "$state/shown"
    tail -n "$lines" -F "$state/log" 2> /dev/null > >(exec sed -u "s/^\(\[$worker\] \)\{0,1\}/[$worker] /") &
    while is_running; do sleep 1; done
    sleep 1 # for the last lines
    kill $! 2> /dev/null || true
    # Without a recorded code the keeper itself was killed, or the machine rebooted.
    say "ended with exit code $(cat "$state/code" 2> /dev/null || echo 137)$(stopped)"
    ;;
  stop)
    [ "${1:-}" = restart ] || : > "$state/stopped"
    if ! is_running; then say 'not running' && exit; fi
    kill -TERM "$(cat "$state/process")" 2> /dev/null || true
    for _ in {1..300}; do
      is_running || break
      sleep 1
    done
    if is_running; then kill -KILL "$(cat "$state/process")" 2> /dev/null || true; fi
    say 'stopped'
    ;;
esac
