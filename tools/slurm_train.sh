#!/usr/bin/env bash
# Train under Slurm: [GPUS=8] tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments]
set -euo pipefail
here=$(dirname "$0")
usage='usage: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]'
partition=${1:?$usage}
job=${2:?$usage}
config=${3:?$usage}
work_dir=${4:?$usage}
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
# SRUN_ARGS is split into words on purpose.
# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$job" --gres="gpu:$per_node" --ntasks="$gpus" \
    --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} "${PYTHON:-python}" -u "$here/train.py" "$config" --work-dir "$work_dir" \
    --launcher slurm "${@:5}"
