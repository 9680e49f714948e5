#!/usr/bin/env bash
# The measurements on a GPU: correctness first (make test-gpu), then one JSON file each in the given
# folder, then the table. Let nothing else run on the GPU meanwhile; tuning torch.compile takes most
# of the time.
#   dev/benchmark_cuda.sh [FOLDER] [NAME ...]     only these, e.g. 1x224_fp16
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-work_dirs/benchmark_cuda}
shift || true
wanted=" $* "
config=configs/mask_rcnn_lasnet_r101.py
python=${PYTHON:-.venv/bin/python}
export LAS_MM_PRETRAINED=none
make test-gpu
mkdir -p "$out"

measure() { # NAME SHAPE DTYPE
  local name=$1_$3
  if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
  echo "== $name"
  # shellcheck disable=SC2086
  "$python" tools/benchmark.py $config --device cuda --shape $2 --dtype "$3" \
    --rate 0.5 0.25 1.0 --masks blob --json "$out/$name.json" | tee "$out/$name.txt"
}

for dtype in fp32 fp16; do
  measure 1x224 "1 3 224 224" $dtype
  measure 128x224 "128 3 224 224" $dtype
  measure 800 "1 3 800 1344" $dtype
done
"$python" dev/benchmark_table.py "$out"/*.json
