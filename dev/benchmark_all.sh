#!/usr/bin/env bash
# Every measurement of docs/performance.md: one JSON file each in the given folder (25 minutes on 2
# cores, of which the modes take 8), then the table. Let nothing else run meanwhile.
#   dev/benchmark_all.sh [FOLDER] [NAME ...]     only these, e.g. 8x224 800_bf16
#   dev/benchmark_all.sh FOLDER modes            only family x mode
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-work_dirs/benchmark}
shift || true
wanted=" $* "
resnet=configs/mask_rcnn_lasnet_r101.py
config=$resnet
python=${PYTHON:-python}
export LAS_MM_PRETRAINED=none
mkdir -p "$out"

measure() { # NAME SHAPE OPTIONS...
  local name=$1 shape=$2
  shift 2
  if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
  echo "== $name"
  # shellcheck disable=SC2086
  "$python" tools/benchmark.py $config --shape $shape --json "$out/$name.json" "$@" |
    tee "$out/$name.txt"
}

measure 1x224 "1 3 224 224" --rate 0.5 0.25 1.0 --masks blob --memory
measure 8x224 "8 3 224 224" --rate 0.5 0.25 1.0 --masks blob
measure 800 "1 3 800 1344" --rate 0.5 0.25 1.0 --masks blob --memory --rounds 7 --plot "$out/800.png"
measure 800_random "1 3 800 1344" --rate 0.5 --masks random --rounds 5 --engines openvino onnxruntime
measure 800_S1111 "1 3 800 1344" --rate 0.5 --masks blob --granularity 1 1 1 1 --rounds 5 \
  --engines openvino onnxruntime
measure 800_S8471 "1 3 800 1344" --rate 0.5 --masks blob --granularity 8 4 7 1 --rounds 5 \
  --engines openvino onnxruntime
measure 8x224_layer "8 3 224 224" --rate 0.5 --masks blob --mode layer --engines openvino onnxruntime
measure 800_bf16 "1 3 800 1344" --rate 0.5 --masks blob --dtype bf16 --rounds 7

# Families and modes, at rates that should give a FLOPs ratio of about 0.5; the table has the true one.
mode() { # NAME SHAPE MODE OPTIONS...
  local name=$1 shape=$2 mode=$3
  shift 3
  if [[ "$wanted" == *" modes "* ]]; then local wanted="  "; fi
  measure "$name" "$shape" --mode "$mode" --masks blob --rounds 9 --warmup 2 \
    --engines openvino onnxruntime las_mm-static "$@"
}
mode r101_spatial "8 3 224 224" spatial --rate 0.44
mode r101_channel "8 3 224 224" channel --rate 0.595
mode r101_channel_800 "1 3 800 1344" channel --rate 0.595
mode r101_layer "8 3 224 224" layer --rate 0.47
mode r101_both "8 3 224 224" both --rate 0.7 --channel-rate 0.75
config=configs/_base_/lasnet_regnety_800mf.py
mode regnety_800mf_spatial "8 3 224 224" spatial --rate 0.44 0.5
mode regnety_800mf_channel "8 3 224 224" channel --rate 0.48
mode regnety_800mf_layer "8 3 224 224" layer --rate 0.47
mode regnety_800mf_both "8 3 224 224" both --rate 0.7 --channel-rate 0.7
config=configs/imagenet/lasnet_r34_spatial.py
mode r34_spatial "8 3 224 224" spatial --rate 0.5
config=configs/imagenet/lasnet_densenet121_spatial.py
mode densenet121_spatial "8 3 224 224" spatial --rate 0.5
config=configs/imagenet/laudnet_t2tvit19_all.py
measure t2tvit19_1x224 "1 3 224 224" --masks blob --rate 0.6 0.77 0.9 1.0 --rounds 7
measure t2tvit19_8x224 "8 3 224 224" --masks blob --rate 0.6 0.77 0.9 1.0 --rounds 7
config=$resnet
measure whole_800 "1 3 800 1344" --whole-model --rate 0.5 --masks blob --rounds 7
"$python" dev/benchmark_table.py "$out"/*.json
