#!/usr/bin/env bash
# `make sanitize`: tests/ops against an extension built with AddressSanitizer and UBSan (GCC).
#
# build/sanitize gets a package las_mm of links to the real one and an extension of its own, built
# by setup.py with this script as the compiler, so las_mm/ and the normal build stay as they are.
# Arguments go to pytest. LAS_MM_HYPOTHESIS_SCALE: share of the drawn cases, 0.1 unless set.
set -euo pipefail
FLAGS=(-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)

if [[ ${LAS_MM_SANITIZE_CXX:-} ]]; then  # called as the compiler: the last -O wins
  exec "$LAS_MM_SANITIZE_CXX" "$@" "${FLAGS[@]}"
fi

script=$(realpath "$0")
root=$(realpath "$(dirname "$0")/../..")
python=${PYTHON:-$root/.venv/bin/python}
compiler=${CXX:-g++}
out=$root/build/sanitize
cd "$root"

mkdir -p "$out"
LAS_MM_SANITIZE_CXX=$compiler CXX=$script FORCE_CUDA=0 LAS_MM_NO_NATIVE=0 MAX_JOBS=${MAX_JOBS:-2} \
  "$python" setup.py --quiet build_ext --build-lib "$out/lib" --build-temp "$out/temp"

rm -rf "$out/las_mm"
mkdir "$out/las_mm"
for entry in las_mm/*; do
  case $entry in *.so | */__pycache__) ;; *) ln -s "$root/$entry" "$out/las_mm/" ;; esac
done
ln -s "$out"/lib/las_mm/_C*.so "$out/las_mm/"

runtimes=
for name in libasan.so libubsan.so; do
  path=$("$compiler" -print-file-name=$name)
  [[ $path == /* ]] || { echo "sanitize: $compiler has no $name" >&2; exit 1; }
  runtimes+=${runtimes:+:}$(realpath "$path")
done

# The current folder comes first in sys.path. Freed and fresh memory are filled.
cd "$out"
export PYTHONPATH=$out LAS_MM_SANITIZE=$out LAS_MM_HYPOTHESIS_SCALE=${LAS_MM_HYPOTHESIS_SCALE:-0.1}
export LD_PRELOAD=$runtimes
export ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255
export UBSAN_OPTIONS=print_stacktrace=1
"$python" -c '
import pathlib, torch, las_mm._C as c
assert b"__asan_report" in pathlib.Path(c.__file__).read_bytes(), f"not sanitised: {c.__file__}"
print("sanitised:", c.__file__)'
# Without --capture=sys pytest would swallow the report of a process that the sanitiser ends.
# The GPU's tests use nothing of this extension.
ignore=()
for name in cuda_device emulated_kernels kernel_mutants; do
  ignore+=(--ignore "$root/tests/ops/test_$name.py")
done
exec "$python" -m pytest --capture=sys -c "$root/pyproject.toml" --rootdir "$root" \
  "${ignore[@]}" "$root/tests/ops" "$@"
