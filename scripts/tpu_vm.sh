#!/usr/bin/env bash
# Trains on a TPU VM, of one host or many: makes it, installs, starts on all workers, follows the
# log, and goes on after a preemption. It uses the documented commands of the cloud's CLI (gcloud,
# set up for your project); it was checked by shellcheck and never run against the cloud.
#
# Usage: bash scripts/tpu_vm.sh COMMAND, where COMMAND is one of
#   create             ask for the TPU as a queued resource and wait until it is there
#   install            copy this checkout to all workers and install it there
#   start CONFIG ...   python -m jaxpeft.train CONFIG ... on all workers, in the background
#   logs               follow the first worker's log
#   status             the state of the request
#   run CONFIG ...     all of these; after a preemption anew, and training goes on from its
#                      newest checkpoint: output_dir must outlive the TPU, such as gs://...
#   delete             give the TPU back
#
# Settings are variables: NAME, ZONE and ACCELERATOR_TYPE (such as v5litepod-8); RUNTIME_VERSION
# follows from the type unless given; PROJECT; SPOT=1 for a TPU that may be preempted.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'tpu_vm: %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

settings() {
  [[ -n ${NAME:-} ]] || die 'set NAME: what to call the TPU'
  [[ -n ${ZONE:-} ]] || die 'set ZONE, such as europe-west4-b'
  [[ -n ${ACCELERATOR_TYPE:-} ]] || die 'set ACCELERATOR_TYPE, such as v5litepod-8'
  [[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || die "NAME: small letters, digits and - only, got '$NAME'"
  case $ACCELERATOR_TYPE in
    v6e-*) default=v2-alpha-tpuv6e ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v4-*) default=tpu-ubuntu2204-base ;;
    *) default='' ;;
  esac
  RUNTIME_VERSION=${RUNTIME_VERSION:-$default}
  [[ -n $RUNTIME_VERSION ]] || die "set RUNTIME_VERSION; none is known for '$ACCELERATOR_TYPE'"
  where=(--zone="$ZONE")
  [[ -z ${PROJECT:-} ]] || where+=(--project="$PROJECT")
  log=jaxpeft/runs/$NAME.log
  command -v gcloud >/dev/null || die 'gcloud: no such program; install the Google Cloud CLI'
}

# Runs a command on all workers, or on those that WORKER names.
on_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="${WORKER:-all}" --command="$1"
}

# Of the request: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED, ...; NONE if there
# is no such request; UNKNOWN if nobody can say for now.
state() {
  local said
  if said=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state)' 2>&1); then
    printf '%s\n' "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "asking for the state of $NAME failed: ${said##*$'\n'}"
    echo UNKNOWN
  fi
}

create() {
  while true; do
    case $(state) in
      ACTIVE) break ;;
      SUSPENDED | FAILED) delete || say 'deleting the old request failed; trying again' ;;
      NONE)
        local options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE")
        [[ -z ${SPOT:-} ]] || options+=(--spot)
        gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${options[@]}" \
          --runtime-version="$RUNTIME_VERSION" || die "the request for $NAME was refused"
        ;;
      *) say "waiting for $NAME" ;;
    esac
    sleep "${WAIT:-30}"
  done
  say "$NAME is there"
}

install() {
  local folder
  [[ -z $(git status --porcelain) ]] ||
    say 'only what is committed is installed; there are changes that are not'
  folder=$(mktemp -d)
  git archive --format=tar.gz --output="$folder/jaxpeft.tar.gz" HEAD
  if ! gcloud compute tpus tpu-vm scp "$folder/jaxpeft.tar.gz" "$NAME:jaxpeft.tar.gz" \
    "${where[@]}" --worker=all; then
    rm -rf "$folder"
    return 1
  fi
  rm -rf "$folder"
  # shellcheck disable=SC2016  # the workers expand it
  on_workers 'set -e
    mkdir -p jaxpeft && tar -xzf jaxpeft.tar.gz -C jaxpeft && cd jaxpeft
    python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" && python=python3 || {
      sudo apt-get -q update && sudo apt-get -q -y install software-properties-common
      sudo add-apt-repository -y ppa:deadsnakes/ppa
      sudo apt-get -q -y install python3.12-venv && python=python3.12
    }
    [ -e .venv/bin/python ] || $python -m venv .venv
    .venv/bin/python -m pip install --quiet --editable ".[tpu,gcs]"'
}

start() {
  [[ $# -gt 0 ]] || die 'start: give a config, as for python -m jaxpeft.train'
  local arguments
  printf -v arguments '%q ' "$@"
  # The lock: a run that is still there is left alone.
  on_workers "cd jaxpeft && mkdir -p runs && { nohup flock -n runs/$NAME.lock sh -c '
    exec >runs/$NAME.log 2>&1; rm -f runs/$NAME.exit
    .venv/bin/python -m jaxpeft.train \"\$@\"; echo \$? >runs/$NAME.exit' train $arguments \
    </dev/null >/dev/null 2>&1 & }"
}

logs() {
  WORKER=0 on_workers "tail -n 100 -F $log"
}

# How training ended on the first worker: a number, or nothing while it goes on.
ended() {
  WORKER=0 on_workers "cat jaxpeft/runs/$NAME.exit 2>/dev/null || true" 2>/dev/null || true
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

run() {
  local code
  while true; do
    create
    if ! install || ! start "$@"; then
      say 'installing or starting failed; trying again'
      sleep "${WAIT:-30}"
      continue
    fi
    while true; do
      sleep "${WAIT:-60}"
      case $(state) in
        UNKNOWN) continue ;;
        ACTIVE) ;;
        *)
          say "$NAME is gone; beginning anew, from the newest checkpoint"
          break
          ;;
      esac
      code=$(ended)
      case $code in
        6 | 7) # stopped by a signal, or without one of its peers: a preemption, most likely
          say "training stopped with exit code $code; going on from the newest checkpoint"
          break
          ;;
        [0-9]*)
          WORKER=0 on_workers "tail -n 40 $log" || true
          say "training ended with exit code $code; bash scripts/tpu_vm.sh delete gives $NAME back"
          exit "$code"
          ;;
      esac
    done
    # A request whose TPU was taken is SUSPENDING for a while, and can be deleted after that.
    while [[ $(state) == SUSPENDING ]]; do sleep "${WAIT:-15}"; done
  done
}

verb=${1:-}
case $verb in
  create | install | start | logs | run | delete)
    shift
    settings
    "$verb" "$@"
    ;;
  status)
    settings
    state
    ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
