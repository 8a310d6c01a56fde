#!/usr/bin/env bash
# Trains Hope on real text: makes .venv on the first run, then `python -m experiments.hope_pretrain` with the arguments given here.
# Relative paths are taken from the checkout's root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
exec "$python" -m experiments.hope_pretrain "$@"
