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

# Of the request: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED, ...; or nothing.
state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

create() {
  local now
  now=$(state)
  case $now in
    SUSPENDED | FAILED) delete ;;
    '') ;;
    *) say "$NAME is asked for already" ;;
  esac
  if [[ -z $(state) ]]; then
    local options=()
    [[ -z ${SPOT:-} ]] || options+=(--spot)
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
      --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "${options[@]}"
  fi
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now != FAILED && $now != SUSPENDED ]] || die "$NAME: the request is $now; see its description"
    say "waiting for $NAME: ${now:-unknown}"
    sleep 30
  done
  say "$NAME is there"
}

install() {
  local packed
  packed=$(mktemp --suffix=.tar.gz)
  git archive --format=tar.gz --output="$packed" HEAD
  gcloud compute tpus tpu-vm scp "$packed" "$NAME:jaxpeft.tar.gz" "${where[@]}" --worker=all
  rm -f "$packed"
  # shellcheck disable=SC2016  # the workers expand it
  on_workers 'set -e
    mkdir -p jaxpeft && tar -xzf jaxpeft.tar.gz -C jaxpeft && cd jaxpeft
    python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" && python=python3 || {
      sudo apt-get -q update && sudo apt-get -q -y install software-properties-common
      sudo add-apt-repository -y ppa:deadsnakes/ppa
      sudo apt-get -q -y install python3.12-venv && python=python3.12
    }
    [ -e .venv/bin/python ] || $python -m venv .venv
    .venv/bin/python -m pip install --quiet --editable ".[tpu]"'
}

start() {
  [[ $# -gt 0 ]] || die 'start: give a config, as for python -m jaxpeft.train'
  local arguments
  printf -v arguments '%q ' "$@"
  on_workers "cd jaxpeft && mkdir -p runs && rm -f runs/$NAME.exit && { nohup sh -c '
    .venv/bin/python -m jaxpeft.train \"\$@\"; echo \$? >runs/$NAME.exit' train $arguments \
    >runs/$NAME.log 2>&1 </dev/null & }"
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
  local code now
  while true; do
    create
    install
    start "$@"
    while true; do
      sleep 60
      now=$(state)
      if [[ $now != ACTIVE ]]; then
        say "$NAME is ${now:-gone}; beginning anew, from the newest checkpoint"
        break
      fi
      code=$(ended)
      if [[ -n $code ]]; then
        WORKER=0 on_workers "tail -n 40 $log" || true
        say "training ended with exit code $code; bash scripts/tpu_vm.sh delete gives $NAME back"
        exit "$code"
      fi
    done
    # A request whose TPU was taken is SUSPENDING for a while, and can be deleted after that.
    while [[ $(state) == SUSPENDING ]]; do sleep 15; done
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
