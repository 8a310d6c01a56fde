#!/usr/bin/env bash
# Runs the tests: makes .venv on the first run, then pytest with the arguments given here. The default suite leaves out the
# tests that take long, start processes of their own or need a GPU; a later -m replaces that choice. Groups of tests (files,
# or the families of models within one) run side by side, one on each core, in the order of tests/conftest.py; a later -n 0 runs them one
# after the other.
#
# scripts/test.sh --full [argument ...] runs all but those that need a GPU, whole products of options too: an hour and a half on two cores.
# It adds a row of what passed, failed and was skipped to experiments/results/reliability.jsonl; given again, it goes on with a run that was
# cut off. Arguments choose a part: --full tests/training.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
# Programs are compiled once, also across processes and runs: a fifth less CPU time on an empty cache, half on a full one.
export JAX_COMPILATION_CACHE_DIR="$PWD/.pytest_cache/jax" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
(umask 077 && mkdir -p "$JAX_COMPILATION_CACHE_DIR")
choice=(-m 'not slow and not exhaustive and not multiprocess and not gpu')
if [[ "${1:-}" == --full ]]; then
  shift
  NESTED_JAX_FULL="$(printf '%q ' "$@")"
  ((${#})) || NESTED_JAX_FULL=
  export NESTED_JAX_FULL="${NESTED_JAX_FULL% }"
  choice=(-p scripts.full_suite -m 'not gpu')
fi
exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder "${choice[@]}" "$@"
