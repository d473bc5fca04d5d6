#!/usr/bin/env bash
# Run cfg_jax.main as one job of several processes on this machine.
#
#   launch/local.sh N [options] --config=configs/digits.py [--workdir=DIR] [more flags of cfg_jax.main]
#
# Every line of output starts with the number of its process. SIGTERM and Ctrl-C are passed on to all processes, and a
# second Ctrl-C kills them. When one process fails, the others have --grace seconds to end before they are killed. The
# exit code is that of the process that failed first, or 2 if any of them ended with 2.
#
#   --devices=D    number of virtual CPU devices of each process
#   --restarts=K   restart after exit code 75 (preempted) or a crash, at most K times in a row without a new checkpoint
#                  in the workdir, never after 0, 2 or 130 or after a signal to this script (default 0: never)
#   --grace=S      seconds that the other processes have to end after one has failed (default 30)
#   --logs=DIR     write output to DIR/process_<number>.log, and process 0's, without its number, to the terminal too
#   --dry-run      print the commands, one per line, and run nothing
#   --help         print this help
#   --             pass everything after it to the program
#
# $PYTHON is the interpreter (default python). The processes meet at a free port of localhost.
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
      is_program_flag "$1" || die "unknown option '$1'; launch/local.sh --help lists the options."
      flags+=("$1")
      ;;
    *)
      [ ! "$count" ] || die "unexpected word '$1'; flags are given as --name=value."
      count=$1
      ;;
  esac
  shift
done
[ "$count" ] || die 'no number of processes; for two: launch/local.sh 2 --config=configs/digits.py.'
whole_number 'the number of processes' "$count" 1
[ "$(flag_value config "${flags[@]}")$(flag_value workdir "${flags[@]}")" ] ||
  die 'no config; give one of configs/, such as --config=configs/digits.py, or the --workdir of a trained model.'
command=("${PYTHON:-python}" -m cfg_jax.main "${flags[@]}")
workdir=$(workdir_of "${flags[@]}")

# Print a port that nothing listens on, below those that the system assigns by itself.
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

# Set `settings` to the environment of process $1 in a job that meets at port $2.
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

# Pass a signal on to every process. They save if they can and end; a second Ctrl-C does not wait for that.
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

# Copy a process's output to its destination. Signals to the whole group must not end this before the process.
print_output() {
  trap '' TERM HUP INT
  if [ ! "$logs" ]; then
    exec sed -u "s/^\(\[$1\] \)\{0,1\}/[$1] /" # some lines of stderr have the number already
  elif [ "$1" = 0 ]; then
    exec tee -a "$logs/process_$1.log"
  else
    exec cat >> "$logs/process_$1.log"
  fi
}

# Start process $1 of a job that meets at port $2.
start() {
  local pipe=$pipes/$1
  environment "$1" "$2"
  [ -p "$pipe" ] || mkfifo "$pipe"
  print_output "$1" < "$pipe" &
  printers+=($!)
  # Job control gives the process a group of its own, which Ctrl-C does not reach directly, and keeps bash from starting
  # it with SIGINT ignored, as it does with background processes.
  set -m
  env "${settings[@]}" "${command[@]}" > "$pipe" 2>&1 < /dev/null &
  pids[$1]=$!
  set +m
}

# Without a pipe into grep -q, which would now and then fail by SIGPIPE in the writer.
is_running() {
  [[ $'\n'$(jobs -rp)$'\n' == *$'\n'$1$'\n'* ]]
}

# Wait for all processes and set `code`.
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
      echo "processes ${!pids[*]} did not end within $grace s; killing them" >&2
      kill -KILL "${pids[@]}" 2> /dev/null || true
      deadline=$((SECONDS + 3600))
    fi
  done
  # Their output ends with them, unless a child process keeps it open.
  for _ in {1..25}; do
    for index in "${!printers[@]}"; do
      if ! is_running "${printers[index]}"; then unset "printers[index]"; fi
    done
    ((${#printers[@]})) || break
    sleep 0.2 || true
  done
  printers=()
}

if [ "$logs" ]; then mkdir -p "$logs" || die "cannot write to $logs (--logs)."; fi
newest=$(newest_checkpoint "$workdir") stuck=0
while true; do
  port=$(free_port)
  for ((index = 0; index < count; index++)); do
    [ "$stopped" ] || start "$index" "$port"
  done
  # a signal came before there was a process to pass it on to
  if ((${#pids[@]} == 0)); then exit "$([ "$stopped" = INT ] && echo 130 || echo 75)"; fi
  watch
  if [ "$stopped" ] || ((restarts == 0)) || ! may_restart "$code"; then exit "$code"; fi
  under_limit "$(newest_checkpoint "$workdir")" "$restarts" || break
  echo "exit code $code: restarting from checkpoint $newest (-1: none)" >&2
done
echo "exit code $code: giving up after $restarts restarts without a new checkpoint in $workdir" >&2
exit "$code"
