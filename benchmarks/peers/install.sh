#!/usr/bin/env bash
# Makes .venv-kvpress, the environment that kvpress is compared in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

${PYTHON:-python3} -m venv .venv-kvpress
.venv-kvpress/bin/pip install --quiet --no-deps --requirement benchmarks/peers/requirements.txt
