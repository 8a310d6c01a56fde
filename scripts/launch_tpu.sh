#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it as a queued resource, waits, installs this checkout on every worker, runs there.
#
#   scripts/launch_tpu.sh --name hope --zone us-west4-a --type v5litepod-64 --runtime v2-alpha-tpuv5-lite \
#     --setup 'sudo mount 10.0.0.2:/share /mnt' -- --model.preset hope-760m --train.watchdog-s 600 --train.output /mnt/runs/hope
#
# The same command goes on from the newest checkpoint, on the same slice while it is there. Nothing is deleted but by
# --delete, which takes the place of -- and what follows. --dry-run prints the commands instead.
# shellcheck disable=SC1091,SC2016,SC2154  # of the sourced files, which set $job, $option_* and $python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

WAIT_S=60 # between two looks at the queue

state() {
  gcloud compute tpus queued-resources describe "$option_name" "${where[@]}" '--format=value(state.state)'
}

wait_for_slice() {
  local now
  while now="$(state)" && [[ "$now" != ACTIVE ]]; do
    case "$now" in
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "the queued resource $option_name is $now: delete it (--delete), then give the same command again"
        ;;
    esac
    echo "$option_name is ${now:-being created}"
    sleep "$WAIT_S"
  done
  [[ "$now" == ACTIVE ]] || fail "the queued resource $option_name cannot be looked at"
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$option_name" "${where[@]}" --worker=all --command="$1"
}

read_options 'name zone' 'type runtime project setup' 'spot delete' "$@"
check_name "$option_name" name
where=(--zone="$option_zone" ${option_project:+--project="$option_project"})
if [[ -n "${option_delete:-}" ]]; then
  ((${#job[@]} == 0)) || fail "--delete is given with arguments of a run, allowed is one of both"
  run gcloud compute tpus queued-resources delete "$option_name" "${where[@]}" --force
  exit
fi
[[ -n "${option_type:-}" ]] || fail '--type is missing'
[[ -n "${option_runtime:-}" ]] || fail '--runtime is missing'
check_job '/*' 'an absolute path, on a disk that all workers share'

archive="$(mktemp -d)/nested_jax.tar.gz"
trap 'rm -r "$(dirname "$archive")"' EXIT
create=(gcloud compute tpus queued-resources create "$option_name" --node-id="$option_name" "${where[@]}"
  --accelerator-type="$option_type" --runtime-version="$option_runtime" ${option_spot:+--spot})
if [[ -n "${option_dry_run:-}" ]]; then
  run "${create[@]}"
  run gcloud compute tpus queued-resources describe "$option_name" "${where[@]}" '--format=value(state.state)'
else
  state >/dev/null 2>&1 || "${create[@]}"
  wait_for_slice
  [[ -z "$(git status --porcelain)" ]] || echo "note: the last commit is copied; what git status shows as changed or new is not" >&2
fi
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$option_name:nested_jax.tar.gz" "${where[@]}" --worker=all
on_all_workers "set -e; ${option_setup:-true}; mkdir -p nested_jax; tar -xzf nested_jax.tar.gz -C nested_jax; source nested_jax/scripts/environment.sh; prepare_environment tpu"
on_all_workers "set -o pipefail; cd nested_jax; .venv/bin/python -m experiments.hope_pretrain $(quoted "${job[@]}") 2>&1 | tee -a ~/nested_jax.log"
