#!/usr/bin/env bash
# The first minutes on a GPU: builds for the card at hand, compares the kernels with the CPU, runs
# compute-sanitizer, then times the whole network and each kernel beside cuDNN. Each stage has a time
# limit and a log of its own; one that fails does not lose the others. Needs no network and no mmcv
# ops; about 12 minutes on 16 cores.
#   tools/gpu_first_run.sh [--dry-run] OUT [STAGE ...]     --dry-run: what runs without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
dry=""
if [ "${1:-}" = --dry-run ]; then dry=--dry-run; shift; fi
out=${1:?gpu_first_run.sh: name a folder for the results}
shift
wanted=" $* "
mkdir -p "$out"
python=${PYTHON:-python3}
cores=$(nproc)
config=configs/mask_rcnn_lasnet_r101.py
tests=tests/ops/test_cuda_device.py
export LAS_MM_PRETRAINED=none LAS_MM_CACHE=${LAS_MM_CACHE:-$out/cache} PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

stage() { # NAME SECONDS COMMAND ...
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - begin)) | tee -a "$out/stages.tsv"
}

network() { # NAME SHAPE DTYPE SECONDS [ENGINE ...]
  local name=$1 shape=$2 dtype=$3 limit=$4
  shift 4
  # shellcheck disable=SC2086
  stage "$name" "$limit" "$python" tools/benchmark.py $config --device cuda --shape $shape \
    --dtype "$dtype" --rate 0.5 1.0 --masks blob --rounds 7 --engines "$@" --json "$out/$name.json"
}

if [ -n "$dry" ]; then
  # Beside other work on few cores: one thread, as threads that wait for each other there take many
  # times as long, and limits that only end what hangs.
  export OMP_NUM_THREADS=1
  stage tests 900 env LAS_MM_HYPOTHESIS_SCALE=0.01 "$python" -m pytest -q -p no:cacheprovider $tests
  stage kernels 900 "$python" dev/benchmark_kernels.py --dry-run --network --shapes 1x224 \
    --precisions fp32 --json "$out/kernels.json"
else
  nvidia-smi >"$out/nvidia-smi.log" 2>&1
  stage build 240 env FORCE_CUDA=1 MAX_JOBS="$cores" "$python" setup.py build_ext --inplace
  stage tests 150 "$python" -m pytest -q ${TESTS:+-k "$TESTS"} --durations=10 -W ignore -n $((cores < 12 ? cores : 12)) -p no:cacheprovider $tests
  few="LAS_MM_HYPOTHESIS_SCALE=0.01 PYTORCH_NO_CUDA_MEMORY_CACHING=1"
  for tool in memcheck racecheck; do
    # shellcheck disable=SC2086
    stage $tool 60 env $few compute-sanitizer --error-exitcode 1 --tool $tool \
      "$python" -m pytest -q -x -p no:cacheprovider $tests -k "not graph and not built"
  done
  for dtype in fp16 fp32; do
    usual="eager-nhwc eager-nchw graph las_mm-static las_mm-graph"
    if [ $dtype = fp32 ]; then
      usual="$usual eager-nhwc-tf32 graph-tf32 las_mm-static-tf32 las_mm-tf32 las_mm-graph-tf32"
    fi
    # shellcheck disable=SC2086
    {
      network "1x800_$dtype" "1 3 800 1344" $dtype 90 $usual
      network "128x224_$dtype" "128 3 224 224" $dtype 90 $usual
      network "1x224_$dtype" "1 3 224 224" $dtype 90 $usual
    }
  done
  stage kernels 90 "$python" dev/benchmark_kernels.py --network ${KERNELS:-} --json "$out/kernels.json"
  for tile in large medium small; do
    stage "kernels_$tile" 60 "$python" dev/benchmark_kernels.py --tile $tile --no-dense \
      --precisions tf32 fp16 --json "$out/kernels_$tile.json"
  done
  # Last, as tuning takes longest: what torch.compile makes of the static network.
  network 1x800_fp16_compile "1 3 800 1344" fp16 90 compile las_mm-graph
  network 128x224_fp16_compile "128 3 224 224" fp16 90 compile las_mm-graph
fi
awk -F'\t' '$2 != 0 {failed = failed " " $1} END {if (failed) {print "failed:" failed; exit 1}}' "$out/stages.tsv"
