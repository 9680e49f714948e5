#!/usr/bin/env bash
# Evaluate on several devices: tools/dist_test.sh CONFIG CHECKPOINT N_DEVICES [arguments of test.py]
set -euo pipefail
here=$(dirname "$0")
usage='usage: dist_test.sh CONFIG CHECKPOINT N_DEVICES [arguments of test.py]'
config=${1:?$usage}
checkpoint=${2:?$usage}
devices=${3:?$usage}
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29501}" \
    --nproc_per_node="$devices" "$here/test.py" "$config" "$checkpoint" \
    --launcher pytorch "${@:4}"
