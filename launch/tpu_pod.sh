#!/usr/bin/env bash
# Run cfg_jax.main on all workers of a Cloud TPU slice: create the slice, install this project on it, start the same
# command on every worker, show its output, restart it after a preemption, and delete the slice at the end.
#
#   launch/tpu_pod.sh NAME --zone=ZONE --type=v5litepod-64 --bucket=BUCKET --delete [options] \
#       --config=configs/imagenet64.py --workdir=/mnt/cfg_jax/imagenet64 [more flags of cfg_jax.main]
#   launch/tpu_pod.sh NAME --zone=ZONE --stop      let the job save and end, and with it the script that follows it; the
#                                                  slice stays, unless that script has --delete
#   launch/tpu_pod.sh NAME --zone=ZONE --delete    delete the slice
#
# The slice:
#   --zone=ZONE  --project=PROJECT   its location
#   --type=TYPE                      such as v5litepod-64, v6e-64, v5p-128
#   --version=VERSION                its software (default: by type)
#   --spot                           cheaper, but may be preempted at any time
#   --queued                         wait in Google's queue until there is capacity; useful with --spot
#   --delete | --keep                what to do with the slice at the end; required. A slice that is kept keeps costing
# Storage that all workers share and that outlives the slice; the program reads and writes files, not gs:// paths:
#   --bucket=NAME | --nfs=HOST:/SHARE | --mounted   mounted by launch/tpu_setup.sh, or already mounted
#   --mount=DIR                      mount point (default /mnt/cfg_jax); the workdir and the data must be below it
# The job:
#   --restarts=K    restart after a preemption or a crash, at most K times in a row without a new checkpoint (default 5;
#                   0: never), and never after exit code 2, which asks for a correction
#   --all-logs      show every worker's output instead of worker 0's and the last lines of a worker that failed
#   --log=FILE      file for all output, every line with its worker's number (default NAME.log)
#   --dry-run       print the commands, one per line, and run nothing
#   --help          print this help
#
# Once the job runs it does not need this script: after Ctrl-C, or on another machine, the same command finds it and
# shows its output again. The exit code is the job's. Needs gcloud, logged in, with an SSH key that has no passphrase or
# is in ssh-agent (ssh-add ~/.ssh/google_compute_engine); if the agent has other keys, it must have this one too.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
root=$(cd "$(dirname "$0")/.." && pwd)

name='' zone='' project='' type='' version='' spot='' queued='' bucket='' nfs='' mounted='' mount=/mnt/cfg_jax
restarts=5 all_logs='' log='' at_end='' stop='' dry_run=''
flags=()
while (($#)); do
  case $1 in
    --help) help && exit ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --bucket=*) bucket=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --mounted) mounted=1 ;;
    --mount=*) mount=${1#*=} mount=${mount%/} ;;
    --restarts=*) restarts=${1#*=} && whole_number --restarts "$restarts" 0 ;;
    --all-logs) all_logs=1 ;;
    --log=*) log=${1#*=} ;;
    --delete | --keep)
      [ ! "$at_end" ] || [ "$at_end" = "$1" ] || die '--delete and --keep exclude each other; give one.'
      at_end=$1
      ;;
    --stop) stop=1 ;;
    --dry-run) dry_run=1 ;;
    -*)
      is_program_flag "$1" || die "unknown option '$1'; launch/tpu_pod.sh --help lists the options."
      flags+=("$1")
      ;;
    *)
      [ ! "$name" ] || die "unexpected word '$1' after the slice's name '$name'; flags are given as --name=value."
      name=$1
      ;;
  esac
  shift
done
[ "$name" ] || die 'no name for the slice; give it first: launch/tpu_pod.sh NAME ... (--help lists the options).'
[ "$zone" ] || die 'no --zone=ZONE, such as us-west4-a.'
: "${log:=$name.log}"
location=("--zone=$zone")
if [ "$project" ]; then location+=("--project=$project"); fi

# Describe the tpu-vm or the queued-resources request of this name: describe KIND FORMAT
describe() {
  run gcloud compute tpus "$1" describe "$name" "--format=$2" "${location[@]}"
}
# Print its state, or MISSING: state_of KIND FIELD
state_of() {
  local answer
  if answer=$(describe "$1" "value($2)" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    return 1
  fi
}

# Delete the slice; one from the queue is deleted with its request.
delete_slice() {
  local request
  if [ "$dry_run" ]; then
    describe queued-resources 'value(state.state)'
    request=${queued:-MISSING}
  else
    request=$(state_of queued-resources state.state 2> /dev/null) || request=MISSING
  fi
  if [ "$request" != MISSING ]; then
    run gcloud compute tpus queued-resources delete "$name" --force --quiet "${location[@]}"
  else
    run gcloud compute tpus tpu-vm delete "$name" --quiet "${location[@]}"
  fi
}

# A lost connection is noticed within two minutes.
ssh_flags=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --ssh-flag=-oConnectTimeout=20)
# Run a command, given as words, on all workers at once.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${location[@]}" "${ssh_flags[@]}" "--command=$(quoted "$@")"
}
worker=(bash cfg_jax/launch/tpu_worker.sh) # in the home folder there

if [ "$stop" ]; then
  ((${#flags[@]} == 0)) || die '--stop ends the running job; leave out the flags of cfg_jax.main.'
  on_workers "${worker[@]}" stop
  exit
fi
if ((${#flags[@]} == 0)) && [ "$at_end" = --delete ]; then
  delete_slice
  exit
fi

config=$(flag_value config "${flags[@]}")
workdir=$(flag_value workdir "${flags[@]}")
[ "$config" ] || die 'no config; give one of configs/, such as --config=configs/imagenet64.py.'
[ "$type" ] || die 'no --type=TYPE, such as v5litepod-64.'
[ "$at_end" ] || die 'no --delete or --keep; say what to do with the slice at the end.'
case ${bucket:+b}${nfs:+n}${mounted:+m} in
  b | n | m) ;;
  '') die 'no storage that outlives the slice; give --bucket=NAME, --nfs=HOST:/SHARE or --mounted.' ;;
  *) die '--bucket, --nfs and --mounted exclude each other; give one.' ;;
esac
[[ $mount == /* ]] || die "--mount is '$mount'; it must start with /."
[[ $workdir == "$mount"/* ]] || die "--workdir is '$workdir'; it must be below $mount, which outlives the slice."
if [ ! "$version" ]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    *) die "no default software for --type=$type; give --version=VERSION." ;;
  esac
fi
setup=(bash cfg_jax/launch/tpu_setup.sh "--mount=$mount")
# So a new slice finds the programs that the old one compiled.
start=(env "JAX_COMPILATION_CACHE_DIR=$mount/compiled" "${worker[@]}" start "${flags[@]}")
if [ "$bucket" ]; then setup+=("--bucket=$bucket"); fi
if [ "$nfs" ]; then setup+=("--nfs=$nfs"); fi
if [ "$mounted" ]; then setup+=(--mounted); fi

note() {
  echo "$(date +%H:%M:%S) $name: $*" >&2
}

create_slice() {
  local spot_flag=()
  if [ "$spot" ]; then spot_flag=(--spot); fi
  if [ "$queued" ]; then
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" "${spot_flag[@]}" "${location[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" \
      "${spot_flag[@]}" "${location[@]}"
  fi
}

# Wait before another attempt to create the slice. Fail at once if there was none yet, because the caller should know;
# after a preemption keep trying for a day.
try_later() {
  tries=$((tries + 1))
  [ "$found" ] && ((tries <= 288)) && sleep 300
}

# Return once the slice is READY: wait for it, create it if it is missing, and again if it was lost.
ensure_slice() {
  local state tries=0 was=''
  while true; do
    state=$(state_of tpu-vm state) || state=UNKNOWN
    if [ "$state" = MISSING ] && [ "$queued" ]; then
      state=$(state_of queued-resources state.state) || state=UNKNOWN
    fi
    if [ "$state" != "$was" ]; then note "the slice is $state"; fi
    was=$state
    if [ "$state" != UNKNOWN ]; then answered=1; fi
    case $state in
      READY)
        found=1 deleted=''
        return
        ;;
      MISSING)
        # Google does not delete a slice that it preempts: it stays, PREEMPTED or SUSPENDED.
        if [ "$found" ] && [ ! "$deleted" ]; then
          note 'somebody has deleted the slice'
          exit 1
        fi
        installed=''
        create_slice || try_later || {
          note 'the slice could not be created; --queued waits until there is capacity'
          exit 1
        }
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        running='' deleted=1
        delete_slice || sleep 60
        ;;
      FAILED) # the request; its state gives the reason
        describe queued-resources 'yaml(state)' >&2 || true
        deleted=1
        delete_slice || true
        try_later || die 'the request for the slice failed, see above.'
        ;;
      STOPPED) gcloud compute tpus tpu-vm start "$name" "${location[@]}" || sleep 60 ;;
      UNKNOWN)
        [ "$answered" ] || die 'gcloud failed, see above; check its login, the zone and the project.'
        sleep 60
        ;;
      *) sleep 30 ;; # being created, or in the queue
    esac
  done
}

# Copy the project as it is here to all workers, and set them up.
install_project() {
  local archive=cfg_jax.tar.gz packed=/tmp status=0
  local left_out=(--exclude=./.git --exclude=./runs '--exclude=./.venv*' --exclude=__pycache__)
  if [ ! "$dry_run" ]; then packed=$(mktemp -d); fi
  run tar -czf "$packed/$archive" "${left_out[@]}" -C "$root" . &&
    run gcloud compute tpus tpu-vm scp "$packed/$archive" "$name:$archive" --worker=all "${location[@]}" &&
    on_workers tar -xzf "$archive" --one-top-level=cfg_jax &&
    on_workers "${setup[@]}" || status=$?
  if [ ! "$dry_run" ]; then rm -r "$packed"; fi
  return "$status"
}

# Count the workers that these lines come from. Lines may repeat: gcloud reruns a command whose connection broke.
count_workers() {
  awk '/^\[/ && !seen[$1]++ { count++ } END { print count + 0 }'
}

# Show the output until all workers have ended. Set `code`, or leave it empty if the connection was lost, and set `over`
# if the job was stopped with --stop.
follow() {
  local codes part failed
  followed=1
  part=$(mktemp)
  on_workers "${worker[@]}" follow "$@" 2>&1 | tee -a "$log" "$part" | {
    if [ "$all_logs" ]; then cat; else grep --line-buffered '^\[0\]' || true; fi
  } || true
  # lines of "[worker] code"
  codes=$(awk '/^\[[^]]*\] ended with exit code / && !seen[$1]++ { print $1, $6 + 0 }' "$part")
  code=''
  if [ "$codes" ] && (($(count_workers <<< "$codes") >= workers)); then
    running=''
    if grep -q '^\[[^]]*\] ended with exit code .*, stopped$' "$part"; then over=$stopped; fi
    # A code 2, which asks for a correction, counts most, then the first failure.
    read -r failed code < <(grep ' 2$' <<< "$codes" || grep -v ' 0$' <<< "$codes" || echo "$codes")
    if [ ! "$all_logs" ] && ! grep -qxF "[0] $code" <<< "$codes"; then
      awk -v worker="$failed" '$1 == worker' "$part" | tail -n 20
    fi
  fi
  rm -f "$part"
}

# Print, indented, the commands that a script of this folder runs on each worker.
show_inside() {
  local commands home='~'
  mapfile -t commands < <(bash "$root/launch/$1" --dry-run "${@:2}")
  commands=("${commands[@]//"$root"/$home/cfg_jax}")
  printf '    %s\n' "${commands[@]//"$HOME"/$home}"
}

if [ "$dry_run" ]; then
  describe tpu-vm 'value(state)'
  [ ! "$queued" ] || describe queued-resources 'value(state.state)'
  create_slice
  on_workers "${worker[@]}" state "${flags[@]}"
  install_project
  show_inside tpu_setup.sh "${setup[@]:2}"
  on_workers "${worker[@]}" state "${flags[@]}"
  on_workers "${start[@]}"
  show_inside tpu_worker.sh start "${flags[@]}"
  on_workers "${worker[@]}" follow all
  [ "$at_end" != --delete ] || delete_slice
  exit
fi
command -v gcloud > /dev/null || die 'gcloud is not installed.'
# Without its key in the agent gcloud refuses to copy to several workers. Find out before the slice costs anything.
key=$HOME/.ssh/google_compute_engine
if agent_keys=$(ssh-add -l 2> /dev/null) &&
  ! { print=$(ssh-keygen -lf "$key" 2> /dev/null) && [[ $agent_keys == *"$(cut -d ' ' -f 2 <<< "$print")"* ]]; }; then
  die "ssh-agent has keys, but not gcloud's; add it with ssh-add $key (gcloud compute config-ssh creates it)."
fi

# Start the job, or find it running, and follow it. Set `code`, or leave it empty if that failed.
attempt() {
  local state started prepare checkpoint
  code=''
  ensure_slice
  # Without an answer a job that ran is assumed to be running. 127: the project is not installed.
  state=$(on_workers "${worker[@]}" state "${flags[@]}" 2> /dev/null) || if [ $? != 127 ] && [ "$running" ]; then
    return 0
  fi
  if [[ $state == *'] running: '* && $state != *'] not running'* ]]; then
    note "a job is running: $(sed -n '/\] running: / { s/.*\] running: //p; q; }' <<< "$state")"
    workers=$(count_workers <<< "$state") running=1 failures=0
    follow
    return
  fi
  # The workers keep the exit codes of a job that ended while there was no connection.
  if [ "$running" ]; then
    running=''
    follow
    [ ! "$code" ] || return 0
  fi
  if [[ $state == *'] running: '* ]]; then on_workers "${worker[@]}" stop restart > /dev/null 2>&1 || return 0; fi
  # A restart of the machines unmounts the storage, and setting up mounts it again.
  note 'setting up'
  if [ "$installed" ]; then prepare=(on_workers "${setup[@]}"); else prepare=(install_project); fi
  "${prepare[@]}" >> "$log" 2>&1 || {
    if [ $? = 2 ]; then code=2; fi
    installed=''
    tail -n 5 "$log" >&2
    return 0
  }
  installed=1
  state=$(on_workers "${worker[@]}" state "${flags[@]}" 2> /dev/null) || return 0
  checkpoint=$(sed -n 's/^\[0\] not running.*, newest checkpoint //p' <<< "$state")
  : "${checkpoint:=$newest}"
  if [ ! "$followed" ]; then
    newest=$checkpoint
  elif [[ $state == *'] not running, stopped, '* ]]; then
    over=$stopped
  elif ! under_limit "$checkpoint" "$restarts"; then
    over="giving up after $restarts restarts without a new checkpoint in $workdir"
  fi
  [ ! "$over" ] || return 0
  started=$(on_workers "${start[@]}") || return 0
  workers=$(count_workers <<< "$started") running=1 failures=0
  note "started from checkpoint $newest (-1: none)"
  follow all
}

# shellcheck disable=SC2317 # the trap calls it
interrupted() {
  if [ "$running" ]; then
    note 'the job keeps running; the same command shows its output again, --stop ends it'
  else
    note "a slice or request that was made keeps costing; to delete it: launch/tpu_pod.sh $name ${location[*]} --delete"
  fi
  exit 130
}
trap interrupted INT

stopped='stopped with --stop'
# The slice: gcloud has `answered` with a state, it was `found` ready once, this script has `deleted` it.
# The job: it was `followed` once, it is `running` as far as is known, it is `over` for this reason.
answered='' found='' deleted='' installed='' followed='' running='' over=''
code='' last=1 newest=-1 workers=0 stuck=0 failures=0
while true; do
  attempt
  if [ "$code" ]; then
    note "ended with exit code $code"
    last=$code
    if ((restarts == 0)) || ! may_restart "$code"; then break; fi
  fi
  if [ "$over" ]; then
    note "$over"
    break
  fi
  if [ ! "$code" ]; then
    # The connection or the slice was lost, or a command on the workers failed.
    failures=$((failures + 1))
    if ((failures > 10)); then
      note 'the workers could not be reached or set up ten times in a row'
      break
    fi
    sleep 30
  fi
done
if [ "$running" ]; then
  note 'the job may still be running, so the slice stays and keeps costing; the same command finds it again'
elif [ "$at_end" = --delete ]; then
  delete_slice
else
  note 'the slice stays and keeps costing'
fi
exit "$last"
