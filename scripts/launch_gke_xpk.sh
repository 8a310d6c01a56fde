#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as one workload of xpk:
#
#   scripts/launch_gke_xpk.sh --cluster c --workload hope --type v5litepod-256 --slices 2 --image python:3.12 --storage runs \
#     -- --model.preset hope-1.3b --train.watchdog-s 600 --train.output /mnt/runs/hope
#
# xpk puts this checkout on top of the image. A pod that is killed or preempted makes GKE start all again, from the newest checkpoint,
# ten times at most. Nothing is deleted but by --delete, which takes the place of -- and what follows; after it, the same command
# goes on. --dry-run prints the commands instead. In the pods this file is run once more, with --in-pod.
# shellcheck disable=SC1091,SC2016,SC2154  # of the sourced files, which set $job, $option_* and $python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

# Exit codes of this project that another try may mend; xpk itself tries again after 42 and from 127 on.
AGAIN=75,76

# A signal makes all processes save and end with code 0. To GKE that is a workload which is done: the one that was told says otherwise.
run_in_pod() {
  local pid stopped=
  source scripts/environment.sh
  prepare_environment tpu
  trap 'stopped=yes; kill -TERM "${pid:-}" 2>/dev/null || true' TERM
  "$python" -m experiments.hope_pretrain --distributed=auto "$@" &
  pid=$!
  wait_to_end "$pid"
  [[ -z "$stopped" ]] || exit 143
  exit "$code"
}

if [[ "${1:-}" == --in-pod ]]; then
  run_in_pod "${@:2}"
fi
read_options 'cluster workload' 'type image slices zone project storage' 'delete' "$@"
check_name "$option_workload" workload
where=(--cluster "$option_cluster" --workload "$option_workload"
  ${option_zone:+--zone "$option_zone"} ${option_project:+--project "$option_project"})
if [[ -n "${option_delete:-}" ]]; then
  ((${#job[@]} == 0)) || fail "--delete is given with arguments of a run, allowed is one of both"
  run xpk workload delete "${where[@]}"
  exit
fi
[[ -n "${option_type:-}" ]] || fail '--type is missing'
[[ -n "${option_image:-}" ]] || fail '--image is missing'
check_number "${option_slices:-1}" slices
check_job '/*' 'an absolute path, on a storage that all pods mount'
run xpk workload create "${where[@]}" --tpu-type "$option_type" --num-slices "${option_slices:-1}" \
  --base-docker-image "$option_image" --script-dir "$PWD" ${option_storage:+--storage "$option_storage"} \
  --max-restarts 10 --restart-on-exit-codes "$AGAIN" --termination-grace-period-seconds 120 \
  --command "exec bash scripts/launch_gke_xpk.sh --in-pod $(quoted "${job[@]}")"
