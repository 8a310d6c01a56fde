#!/usr/bin/env bash
# Trains Hope on real text: makes .venv on the first run, then `python -m experiments.hope_pretrain` with the arguments given here.
# Relative paths are taken from the checkout's root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
# XLA's CPU backend allocates its temporaries anew at every step: in large pages (Linux, glibc 2.35) a step takes a fifth less time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$python" -m experiments.hope_pretrain "$@"
