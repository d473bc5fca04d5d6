# shellcheck shell=bash
# What the scripts of this folder share; they source it. Needs bash 4.4 or newer.

# Ends the script for what its caller can mend, as the program itself does: one line, exit code 2.
die() {
  echo "error: $*" >&2
  exit 2
}

# The help text: the script's own first comment.
help() {
  awk 'NR == 1 || /^#SBATCH/ || /^#$/ && !text { next } !/^#/ { exit } { text = 1; sub(/^# ?/, ""); print }' "$0"
}

# A command as words that a shell reads back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Runs a command; under --dry-run prints it instead.
run() {
  if [ "${dry_run:-}" ]; then quoted "$@"; else "$@"; fi
}

# Is the word a flag of cfg_jax.main? Scripts refuse what is neither one of these nor an option of their own.
is_program_flag() {
  case $1 in
    --config=* | --config.* | --noconfig.* | --workdir=* | --mode=* | --join_seconds=*) true ;;
    *) false ;;
  esac
}

# The last value of --NAME=value: flag_value NAME words...
flag_value() {
  local name=$1 value='' word
  shift
  for word in "$@"; do
    if [[ $word == "--$name="* ]]; then value=${word#*=}; fi
  done
  echo "$value"
}

# Where the program's flags put everything: --workdir, or runs/<name of the config>. A leading ~ is the home folder;
# bash leaves as it is in --workdir=~/x.
workdir_of() {
  local workdir config
  workdir=$(flag_value workdir "$@")
  config=$(flag_value config "$@")
  case $workdir in \~ | \~/*) workdir=$HOME${workdir#\~} ;; esac
  echo "${workdir:-runs/$(basename "${config%%:*}" .py)}"
}

# Dies unless the value of an option is a whole number: whole_number OPTION VALUE LEAST
whole_number() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then die "$1 is '$2'; it must be a whole number, at least $3."; fi
}

# The newest step that a workdir has a whole checkpoint of, or -1.
newest_checkpoint() {
  local newest=-1 path step
  for path in "$1"/checkpoints/*/; do
    step=$(basename "$path")
    if [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

# Is starting again of use after this exit code of the program? Not when it is done (0), when its user has to mend
# something (2) or has stopped it (130); 75 says so itself, and anything else is a crash.
may_restart() {
  case $1 in
    0 | 2 | 130) false ;;
    *) true ;;
  esac
}

# May the job start again, now that NEWEST is its newest checkpoint? Up to MOST times in a row without a new one, never
# if MOST is 0. `newest` and `stuck`, which the script sets at first, hold what was before: goes_on NEWEST MOST
goes_on() {
  stuck=$(($1 > newest ? 0 : stuck + 1)) newest=$1
  (($2 && stuck <= $2))
}
