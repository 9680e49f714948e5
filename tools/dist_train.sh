#!/usr/bin/env bash
# Train on several devices of one or more machines:
#   tools/dist_train.sh CONFIG N_DEVICES [arguments of train.py]
# More machines: set NNODES, NODE_RANK and MASTER_ADDR. Without GPUs the processes talk over gloo.
set -euo pipefail
here=$(dirname "$0")
config=${1:?usage: dist_train.sh CONFIG N_DEVICES [arguments of train.py]}
devices=${2:?usage: dist_train.sh CONFIG N_DEVICES [arguments of train.py]}
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$devices" "$here/train.py" "$config" --launcher pytorch "${@:3}"
