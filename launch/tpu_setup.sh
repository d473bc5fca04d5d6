#!/usr/bin/env bash
# Set up a worker of a Cloud TPU slice: Python 3.11 or newer, a virtual environment with this project and jax[tpu], and
# the storage that all workers share. Running it again changes nothing. launch/tpu_pod.sh runs it on every worker.
#
#   launch/tpu_setup.sh [--bucket=NAME | --nfs=HOST:/SHARE | --mounted] [--mount=DIR] [--venv=DIR]
#       [--dry-run] [--help]
#
#   --bucket=NAME       mount this Cloud Storage bucket with gcsfuse, installed from Google's apt repository if missing.
#                       Use a bucket with a hierarchical namespace: a checkpoint is finished by renaming its folder,
#                       which other buckets do file by file
#   --nfs=HOST:/SHARE   mount an NFS share, such as that of a Filestore instance
#   --mounted           mount nothing, and fail if nothing is mounted
#   --mount=DIR         mount point (default /mnt/cfg_jax)
#   --venv=DIR          the virtual environment (default ~/cfg_jax_venv)
#   --dry-run           print the commands for a fresh worker, one per line, and run nothing
#   --help              print this help
#
# The project reads and writes files, not gs:// paths. A mounted bucket is slow with small files and at appending, NFS
# is not.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
root=$(cd "$(dirname "$0")/.." && pwd)

bucket='' nfs='' mounted='' mount=/mnt/cfg_jax venv=$HOME/cfg_jax_venv dry_run=''
while (($#)); do
  case $1 in
    --help) help && exit ;;
    --dry-run) dry_run=1 ;;
    --bucket=*) bucket=${1#*=} bucket=${bucket#gs://} bucket=${bucket%/} ;;
    --nfs=*) nfs=${1#*=} ;;
    --mounted) mounted=1 ;;
    --mount=*) mount=${1#*=} ;;
    --venv=*) venv=${1#*=} ;;
    *) die "unknown option '$1'; launch/tpu_setup.sh --help lists the options." ;;
  esac
  shift
done
case ${bucket:+b}${nfs:+n}${mounted:+m} in
  '' | b | n | m) ;;
  *) die '--bucket, --nfs and --mounted exclude each other; give one.' ;;
esac
[[ $bucket != */* ]] || die "--bucket is '$bucket'; it must be only the bucket's name."
[[ ! $nfs || $nfs == *:/* ]] || die "--nfs is '$nfs'; it must be HOST:/SHARE."
[[ $mount == /* ]] || die "--mount is '$mount'; it must start with /."

# Succeed if a check of this worker does. Never in a dry run, which describes a fresh worker.
is_so() {
  [ ! "$dry_run" ] && "$@" > /dev/null 2>&1
}

# Print the first Python that is new enough.
find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3.14; do
    # Debian and Ubuntu package ensurepip separately.
    if is_so "$name" -c 'import ensurepip'; then
      echo "$name"
      return
    fi
  done
}

# Packages and storage come first, so that they fail before the minutes that pip takes.
packages=()
python=$(find_python)
if [ ! "$python" ]; then
  packages+=(python3.11 python3.11-venv)
  python=python3.11
fi
if [ "$nfs" ] && ! is_so command -v mount.nfs; then packages+=(nfs-common); fi
if [ "$bucket" ] && ! is_so command -v gcsfuse; then
  packages+=(gcsfuse)
  key=/usr/share/keyrings/cloud.google.asc
  run sudo curl -fsSL -o "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
  source="deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main"
  run sudo sh -c "echo \"$source\" > /etc/apt/sources.list.d/gcsfuse.list"
fi
if ((${#packages[@]})); then
  # Other programs hold apt's lock on a machine that has just started.
  run sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  run sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y "${packages[@]}"
fi

if { [ "$bucket" ] || [ "$nfs" ]; } && ! is_so mountpoint -q "$mount"; then
  run sudo mkdir -p "$mount"
  if [ "$nfs" ]; then
    # Workers wait for each other's files, which may appear a second late but not a minute.
    run sudo mount -t nfs -o hard,actimeo=1 "$nfs" "$mount"
    run sudo chmod a+rwx "$mount"
  else
    run sudo chown "$(id -u):$(id -g)" "$mount"
    run gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$bucket" "$mount"
  fi
fi
if [ "$mounted" ] && [ ! "$dry_run" ]; then
  mountpoint -q "$mount" || die "nothing is mounted at $mount (--mounted)."
fi

is_so test -x "$venv/bin/python" || run "$python" -m venv "$venv"
# Constraints, so that new workers after a preemption compute exactly as the old ones did.
run "$venv/bin/pip" install --quiet --constraint "$root/constraints/py311.txt" "${root}[tpu]"

# JAX starts faster with huge pages on v5e and newer, and warns without them.
pages=/sys/kernel/mm/transparent_hugepage/enabled
if [ "$dry_run" ] || [ -w "$pages" ] || sudo -n true 2> /dev/null; then
  run sudo sh -c "echo always > $pages"
fi

[ "$dry_run" ] || echo "ready: $("$venv/bin/python" --version)$(mountpoint -q "$mount" && echo ", $mount is mounted")"
