# shellcheck shell=bash
# Functions for the scripts of this folder, which source it. Needs bash 4.4 or newer.

# End the script because of a mistake that its caller can correct, as the program does: one line, exit code 2.
die() {
  echo "error: $*" >&2
  exit 2
}

# Print the help text, which is the script's own first comment.
help() {
  awk 'NR == 1 || /^#SBATCH/ || /^#$/ && !text { next } !/^#/ { exit } { text = 1; sub(/^# ?/, ""); print }' "$0"
}

# Print a command so that a shell can read it back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Run a command; with --dry-run, print it instead.
run() {
  if [ "${dry_run:-}" ]; then quoted "$@"; else "$@"; fi
}

# Succeed if the word is a flag of cfg_jax.main. Scripts refuse words that are neither such a flag nor their own option.
is_program_flag() {
  case $1 in
    --config=* | --config.* | --noconfig.* | --workdir=* | --mode=* | --join_seconds=*) true ;;
    *) false ;;
  esac
}

# Print the last value of --NAME=value: flag_value NAME words...
flag_value() {
  local name=$1 value='' word
  shift
  for word in "$@"; do
    if [[ $word == "--$name="* ]]; then value=${word#*=}; fi
  done
  echo "$value"
}

# Print the workdir that the program's flags mean: --workdir, or runs/<name of the config>. A leading ~ is the home
# folder, which bash does not expand in --workdir=~/x.
workdir_of() {
  local workdir config
  workdir=$(flag_value workdir "$@")
  config=$(flag_value config "$@")
  case $workdir in \~ | \~/*) workdir=$HOME${workdir#\~} ;; esac
  echo "${workdir:-runs/$(basename "${config%%:*}" .py)}"
}

# Die unless the value of an option is a whole number: whole_number OPTION VALUE LEAST
whole_number() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then die "$1 is '$2'; it must be a whole number, at least $3."; fi
}

# Print the step of the newest complete checkpoint in a workdir, or -1.
newest_checkpoint() {
  local newest=-1 path step
  for path in "$1"/checkpoints/*/; do
    step=$(basename "$path")
    if [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

# Succeed if a restart can help after this exit code of the program: after a preemption (75) or a crash (the rest), but
# not when it is done (0), needs a correction by its user (2) or was stopped with Ctrl-C (130).
may_restart() {
  case $1 in
    0 | 2 | 130) false ;;
    *) true ;;
  esac
}

# Succeed if the job may restart with NEWEST as its newest checkpoint: at most MOST times in a row without a new one,
# never if MOST is 0. The script initialises `newest` and `stuck`, the restarts without a new checkpoint so far:
# under_limit NEWEST MOST
under_limit() {
  stuck=$(($1 > newest ? 0 : stuck + 1)) newest=$1
  (($2 && stuck <= $2))
}
