#!/usr/bin/env bash
# Runs cfg_jax.main in several processes of this machine, as one job.
#
#   launch/local.sh N [options] --config=configs/digits.py [--workdir=DIR] [more flags of cfg_jax.main]
#
# Every line of output starts with the number of its process. A SIGTERM or Ctrl-C reaches all processes, a second Ctrl-C
# kills them. When one of them fails, the others have --grace seconds to end and are killed then. The exit code is that
# of the process that failed first, or 2 if one of them ended with 2.
#
#   --devices=D    each process computes on D virtual CPU devices
#   --restarts=K   starts again after exit code 75 (preempted) or a crash, up to K times in a row without a new
#                  checkpoint in the workdir; never after 0, 2 or 130, or when this script itself was told to stop;
#                  0, not at all, if unset
#   --grace=S      seconds, 30 if unset
#   --logs=DIR     output goes to DIR/process_<number>.log, and process 0's also to the terminal, as it is
#   --dry-run      prints the commands, one a line, and runs nothing
#   --help         prints this
#   --             what follows goes to the program, whatever it is
#
# $PYTHON is the interpreter, python if unset. The processes meet at a free port of localhost.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

count='' devices='' restarts=0 grace=30 logs='' dry_run=''
flags=()
while (($#)); do
  case $1 in
    --help) help && exit ;;
    --dry-run) dry_run=1 ;;
    --devices=*) devices=${1#*=} && whole_number --devices "$devices" 1 ;;
    --restarts=*) restarts=${1#*=} && whole_number --restarts "$restarts" 0 ;;
    --grace=*) grace=${1#*=} && whole_number --grace "$grace" 0 ;;
    --logs=*) logs=${1#*=} ;;
    --) flags+=("${@:2}") && break ;;
    -*)
      is_program_flag "$1" || die "unknown option '$1'; launch/local.sh --help shows what there is."
      flags+=("$1")
      ;;
    *)
      [ ! "$count" ] || die "unexpected word '$1'; flags are given as --name=value."
      count=$1
      ;;
  esac
  shift
done
[ "$count" ] || die 'say how many processes: launch/local.sh 2 --config=configs/digits.py.'
whole_number 'the number of processes' "$count" 1
[ "$(flag_value config "${flags[@]}")" ] || die 'no config; give one of configs/, such as --config=configs/digits.py.'
command=("${PYTHON:-python}" -m cfg_jax.main "${flags[@]}")
workdir=$(workdir_of "${flags[@]}")

# A port that nobody listens on, below those that the system hands out by itself.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    if ! (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
      echo "$port"
      return
    fi
  done
  die 'found no free port of localhost.'
}

# Sets `settings`, the environment of process $1 of a job that meets at port $2.
environment() {
  settings=("JAX_COORDINATOR_ADDRESS=localhost:$2" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1" PYTHONUNBUFFERED=1)
  if [ "$devices" ]; then
    local virtual="--xla_force_host_platform_device_count=$devices"
    settings+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$virtual")
  fi
}

if [ "$dry_run" ]; then
  port=$(free_port)
  for ((index = 0; index < count; index++)); do
    environment "$index" "$port"
    quoted env "${settings[@]}" "${command[@]}"
  done
  exit
fi

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
pids=() printers=() stopped=''

# To every process; they end by themselves, with a checkpoint where they can. A second Ctrl-C does not wait for that.
# shellcheck disable=SC2317 # traps call it
forward() {
  local signal=$1
  if [ "$1$stopped" = INTINT ]; then signal=KILL; fi
  stopped=$1
  echo "SIG$signal to all processes" >&2
  if ((${#pids[@]})); then kill "-$signal" "${pids[@]}" 2> /dev/null || true; fi
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

# Reads a process's output to where it goes. Signals to the whole group must not end it before the process.
print_output() {
  trap '' TERM HUP INT
  if [ ! "$logs" ]; then
    exec sed -u "s/^\(\[$1\] \)\{0,1\}/[$1] /" # the program's own stderr has it already
  elif [ "$1" = 0 ]; then
    exec tee -a "$logs/process_$1.log"
  else
    exec cat >> "$logs/process_$1.log"
  fi
}

# Starts process $1 of a job that meets at port $2.
start() {
  local pipe=$pipes/$1
  environment "$1" "$2"
  [ -p "$pipe" ] || mkfifo "$pipe"
  print_output "$1" < "$pipe" &
  printers+=($!)
  # Under job control a process is a group of its own, which Ctrl-C does not reach directly, and does not start with
  # SIGINT ignored as background processes otherwise do.
  set -m
  env "${settings[@]}" "${command[@]}" > "$pipe" 2>&1 < /dev/null &
  pids[$1]=$!
  set +m
}

# No pipe into grep -q: the writer's SIGPIPE would make it fail now and then.
is_running() {
  [[ $'\n'$(jobs -rp)$'\n' == *$'\n'$1$'\n'* ]]
}

# Waits for all processes and sets `code`.
watch() {
  local deadline='' index status
  code=0
  while ((${#pids[@]})); do
    sleep 0.2 || true
    for index in "${!pids[@]}"; do
      if is_running "${pids[index]}"; then continue; fi
      status=0
      wait "${pids[index]}" 2> /dev/null || status=$?
      unset "pids[index]"
      if [ "$status" = 0 ]; then continue; fi
      echo "process $index ended with exit code $status" >&2
      if [ ! "$deadline" ]; then code=$status deadline=$((SECONDS + grace)); fi
      if [ "$status" = 2 ]; then code=2; fi
    done
    if [ "$deadline" ] && ((${#pids[@]} && SECONDS >= deadline)); then
      echo "processes ${!pids[*]} have not ended within $grace s; killed" >&2
      kill -KILL "${pids[@]}" 2> /dev/null || true
      deadline=$((SECONDS + 3600))
    fi
  done
  # Their output ends with them, unless a child of theirs holds it open.
  for _ in {1..25}; do
    for index in "${!printers[@]}"; do
      if ! is_running "${printers[index]}"; then unset "printers[index]"; fi
    done
    ((${#printers[@]})) || break
    sleep 0.2 || true
  done
  printers=()
}

if [ "$logs" ]; then mkdir -p "$logs" || die "$logs cannot be written (--logs)."; fi
newest=$(newest_checkpoint "$workdir") stuck=0
while true; do
  port=$(free_port)
  for ((index = 0; index < count; index++)); do
    [ "$stopped" ] || start "$index" "$port"
  done
  # told to stop before there was a process to tell
  if ((${#pids[@]} == 0)); then exit "$([ "$stopped" = INT ] && echo 130 || echo 75)"; fi
  watch
  if [ "$stopped" ] || ((restarts == 0)) || ! may_restart "$code"; then exit "$code"; fi
  goes_on "$(newest_checkpoint "$workdir")" "$restarts" || break
  echo "exit code $code: starting again (newest checkpoint: $newest)" >&2
done
echo "exit code $code: no new checkpoint in $workdir after $restarts restarts" >&2
exit "$code"
