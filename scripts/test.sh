#!/usr/bin/env bash
# Sets up what is missing, then runs the tests, one process a core (at most 8), a file in one process.
# Nothing but the set-up uses the network. Compiled programs are kept in .venv/test-cache: a first run
# takes longer than later ones. Types and shapes in annotations are not checked while tests run, which
# takes a tenth longer, unless JAXPEFT_CHECK_TYPES is 1, as in .ci/run.
#
# Usage: bash scripts/test.sh [PYTEST ARGUMENTS], for example: bash scripts/test.sh -m slow
# PYTHON names another interpreter than python3: PYTHON=python3.13 bash scripts/test.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test
export HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE  # each of a hundred processes would compile the same modules
workers=$(.venv/bin/python -c 'import os; print(min(os.cpu_count() or 1, 8))')
exec .venv/bin/python -m pytest -n "$workers" --dist loadfile \
  --no-loadscope-reorder "$@"
