#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: set-up, data, training, and a before-and-after table.
#
# A 135M chat model learns by LoRA to say in one word what a question asks for. What is done already
# is not done again, and an interrupted training goes on where it was.
#
# Usage: bash scripts/quickstart.sh [--section.key value ...], keys of configs/quickstart.yaml
# PYTHON names another interpreter than python3: PYTHON=python3.13 bash scripts/quickstart.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh quickstart

# Model and data came with the set-up; from here on nothing may reach for the network.
export HF_HUB_OFFLINE=1

.venv/bin/python scripts/quickstart_data.py
.venv/bin/python -m jaxpeft.train configs/quickstart.yaml "$@"
.venv/bin/python scripts/quickstart_report.py runs/quickstart
