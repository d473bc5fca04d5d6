#!/usr/bin/env bash
# Runs cfg_jax.main on all workers of a Cloud TPU slice: makes the slice, installs this project there, starts the same
# command on every worker, shows its output, starts again after a preemption, and deletes the slice at the end.
#
#   launch/tpu_pod.sh NAME --zone=ZONE --type=v5litepod-64 --bucket=BUCKET --delete [options] \
#       --config=configs/imagenet64.py --workdir=/mnt/cfg_jax/imagenet64 [more flags of cfg_jax.main]
#   launch/tpu_pod.sh NAME --zone=ZONE --stop      the job saves and ends; the slice stays
#   launch/tpu_pod.sh NAME --zone=ZONE --delete    deletes the slice
#
# The slice:
#   --zone=ZONE  --project=PROJECT   where it is
#   --type=TYPE                      such as v5litepod-64, v6e-64, v5p-128
#   --version=VERSION                its software; chosen by the type if unset
#   --spot                           cheaper, and taken away at any time
#   --queued                         waits in Google's queue until there is capacity; of use with --spot
#   --delete | --keep                at the end: one of the two has to be said. A slice that stays goes on costing
# Storage that all workers share and that outlives the slice; the program reads and writes files and no gs:// paths:
#   --bucket=NAME | --nfs=HOST:/SHARE | --mounted   mounted by launch/tpu_setup.sh, or there by other means
#   --mount=DIR                      where; /mnt/cfg_jax if unset. The workdir and the data have to lie below it
# The job:
#   --restarts=K    after a preemption or a crash, starts again up to K times in a row without a new checkpoint; 5 if
#                   unset. Never after exit code 2, which is for you to mend
#   --all-logs      shows every worker's output; otherwise worker 0's, and of a worker that failed its last lines
#   --log=FILE      all output, every line with its worker's number; NAME.log if unset
#   --dry-run       prints the commands, one a line, and runs nothing
#   --help          prints this
#
# The job does not need this script once it runs: after Ctrl-C, or on another machine, the same command finds it and
# goes on showing its output. The exit code is the job's. Needs gcloud, logged in, with an SSH key that has no
# passphrase or is in ssh-agent.
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
      [ ! "$at_end" ] || [ "$at_end" = "$1" ] || die '--delete and --keep are both set; give one.'
      at_end=$1
      ;;
    --stop) stop=1 ;;
    --dry-run) dry_run=1 ;;
    -*)
      is_program_flag "$1" || die "unknown option '$1'; launch/tpu_pod.sh --help shows what there is."
      flags+=("$1")
      ;;
    *)
      [ ! "$name" ] || die "unexpected word '$1'; the slice is '$name', and flags are given as --name=value."
      name=$1
      ;;
  esac
  shift
done
[ "$name" ] || die 'say what the slice is called: launch/tpu_pod.sh NAME ...; --help shows the rest.'
[ "$zone" ] || die 'no --zone=ZONE, such as us-west4-a.'
: "${log:=$name.log}"
location=("--zone=$zone")
if [ "$project" ]; then location+=("--project=$project"); fi

# The state of a tpu-vm or of a queued-resources request by that name, or MISSING: state_of KIND FIELD
state_of() {
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$name" "--format=value($2)" "${location[@]}" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    return 1
  fi
}

# What came out of the queue is deleted with its request.
delete_slice() {
  local request=MISSING
  if [ ! "$dry_run" ]; then request=$(state_of queued-resources state.state 2> /dev/null) || true; fi
  if [ "$dry_run" ] && [ "$queued" ]; then request=ACTIVE; fi
  if [ "$request" ] && [ "$request" != MISSING ]; then
    run gcloud compute tpus queued-resources delete "$name" --force --quiet "${location[@]}"
  else
    run gcloud compute tpus tpu-vm delete "$name" --quiet "${location[@]}"
  fi
}

# A connection that is gone is noticed within two minutes.
ssh_flags=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --ssh-flag=-oConnectTimeout=20)
# Runs a command, given as words, on all workers at once.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${location[@]}" "${ssh_flags[@]}" "--command=$(quoted "$@")"
}
worker=(bash cfg_jax/launch/tpu_worker.sh) # in the home folder there

if [ "$stop" ]; then
  ((${#flags[@]} == 0)) || die '--stop ends the job that runs; leave its flags away.'
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
[ "$at_end" ] || die 'say --delete or --keep: what becomes of the slice at the end.'
case ${bucket:+b}${nfs:+n}${mounted:+m} in
  b | n | m) ;;
  '') die "no storage that outlives the slice; give --bucket=NAME, --nfs=HOST:/SHARE or --mounted." ;;
  *) die '--bucket, --nfs and --mounted exclude each other; give one.' ;;
esac
[[ $mount == /* ]] || die "--mount is '$mount'; it must start with /."
[[ $workdir == "$mount"/* ]] || die "--workdir is '$workdir'; it must lie below $mount, which outlives the slice."
if [ ! "$version" ]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    *) die "no software is known here for --type=$type; give --version=VERSION." ;;
  esac
fi
setup=(bash cfg_jax/launch/tpu_setup.sh "--mount=$mount")
# A new slice finds there what the old one compiled.
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

# Returns once the slice is READY: waits for it, makes it where there is none, and anew where it is lost.
ensure_slice() {
  local state failures=0 was=''
  while true; do
    state=$(state_of tpu-vm state) || state=UNKNOWN
    if [ "$state" = MISSING ] && [ "$queued" ]; then
      state=$(state_of queued-resources state.state) || state=UNKNOWN
    fi
    if [ "$state" != "$was" ]; then note "the slice is $state"; fi
    was=$state
    case $state in
      READY)
        found=1
        return
        ;;
      MISSING)
        installed=''
        if create_slice; then continue; fi
        failures=$((failures + 1))
        # At the first try its caller had better know at once; later there is a run to go on with, for a day.
        if [ ! "$found" ] || ((failures > 288)); then
          note 'the slice could not be made; with --queued it waits until there is capacity'
          exit 1
        fi
        sleep 300
        ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED) delete_slice || sleep 60 ;;
      UNKNOWN)
        [ "$found" ] || die 'gcloud failed, see above; is it logged in, and are the zone and project right?'
        sleep 60
        ;;
      *) sleep 30 ;; # on its way, or in the queue
    esac
  done
}

# Copies the project as it is here to all workers and makes them ready.
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

# Shows the output until all workers have ended; sets `code`, or leaves it empty if the connection was lost.
follow() {
  local codes part failed
  part=$(mktemp)
  on_workers "${worker[@]}" follow "$@" 2>&1 | tee -a "$log" "$part" | {
    if [ "$all_logs" ]; then cat; else grep --line-buffered '^\[0\]' || true; fi
  } || true
  codes=$(sed -n 's/^\[[^]]*\] ended with exit code //p' "$part")
  code=''
  if (($(wc -w <<< "$codes") >= workers)); then
    # One that the user has to mend counts most, then the first that failed.
    code=$(grep -x 2 <<< "$codes" | head -n 1 || true)
    : "${code:=$(grep -vx 0 <<< "$codes" | head -n 1 || true)}"
    : "${code:=0}"
    if [ ! "$all_logs" ] && ! grep -qx "\[0\] ended with exit code $code" "$part"; then
      failed=$(sed -n "/^\[[^]]*\] ended with exit code $code\$/ { s/^\[\([^]]*\)\].*/\1/p; q; }" "$part")
      grep "^\[$failed\]" "$part" | tail -n 20
    fi
  fi
  rm -f "$part"
}

if [ "$dry_run" ]; then
  create_slice
  install_project
  on_workers "${start[@]}"
  on_workers "${worker[@]}" follow all
  [ "$at_end" != --delete ] || delete_slice
  exit
fi
command -v gcloud > /dev/null || die 'gcloud is not installed.'

# Starts the job, or finds it running, and follows it; sets `code`, or leaves it empty where that went wrong.
attempt() {
  local state='' started before=$newest prepare
  code=''
  ensure_slice
  state=$(on_workers "${worker[@]}" state "${flags[@]}" 2> /dev/null) || true
  if [[ $state == *'] running: '* && $state != *'] not running'* ]]; then
    note "a job is running there: $(sed -n '/\] running: / { s/.*\] running: //p; q; }' <<< "$state")"
    workers=$(grep -c '^\[' <<< "$state")
    follow
    return
  fi
  if [[ $state == *'] running: '* ]]; then on_workers "${worker[@]}" stop > /dev/null 2>&1 || return 0; fi
  # Setting up again mounts the storage that a restart of the machines has taken away.
  note 'setting up'
  if [ "$installed" ]; then prepare=(on_workers "${setup[@]}"); else prepare=(install_project); fi
  "${prepare[@]}" >> "$log" 2>&1 || {
    if [ $? = 2 ]; then code=2; fi
    tail -n 5 "$log" >&2
    return 0
  }
  installed=1
  state=$(on_workers "${worker[@]}" state "${flags[@]}" 2> /dev/null) || return 0
  newest=$(sed -n 's/^\[0\] not running, newest checkpoint //p' <<< "$state")
  : "${newest:=$before}"
  if ((starts)); then stuck=$((newest > before ? 0 : stuck + 1)); fi
  ((stuck <= restarts)) || return 0
  started=$(on_workers "${start[@]}") || return 0
  note "started from checkpoint $newest (-1: none)"
  workers=$(grep -c '^\[' <<< "$started") starts=$((starts + 1)) failures=0
  follow all
}

trap 'note "the job goes on; the same command shows its output again, --stop ends it"; exit 130' INT
found='' installed='' code='' last=1 newest=-1 workers=0 starts=0 stuck=0 failures=0
while true; do
  attempt
  if [ "$code" ]; then
    note "ended with exit code $code"
    last=$code
    may_restart "$code" || break
  fi
  if ((stuck > restarts)); then
    note "no new checkpoint in $workdir after $restarts restarts"
    break
  fi
  if [ ! "$code" ]; then
    # The connection or the slice was lost, or a command on the workers failed.
    failures=$((failures + 1))
    if ((failures > 10)); then
      note 'the workers could not be reached, or not be made ready, ten times in a row'
      break
    fi
    sleep 30
  fi
done
if [ "$at_end" = --delete ]; then delete_slice; else note 'the slice stays, and goes on costing'; fi
exit "$last"
