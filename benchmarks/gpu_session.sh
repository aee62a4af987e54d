#!/usr/bin/env bash
# All that only a machine with a GPU can show: the CUDA tests, compute-sanitizer on them, and the benchmarks.
#
#     OUT=results benchmarks/gpu_session.sh
#
# Needs torch, torchvision, pytest and hypothesis. Builds the kernels for the GPU that is there, unless
# TORCH_CUDA_ARCH_LIST says otherwise. Goes on after a failure, and fails in the end if anything did.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
mkdir -p "$OUT"
failures=()

run() {
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$OUT/$name.log"
  [ "${PIPESTATUS[0]}" = 0 ] || failures+=("$name")
}

if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST
fi
export CUDA_HOME BALANCED_LEARNING_BUILD=cuda
run build "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
run info "$PYTHON" -m balanced_learning
run tests "$PYTHON" -m pytest tests/*.py
run detection "$PYTHON" -m pytest tests/detection

# Our kernels alone, and every allocation its own, so that an access beyond a tensor is one beyond an allocation.
for tool in memcheck racecheck initcheck synccheck; do
  run "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$CUDA_HOME/bin/compute-sanitizer" --tool "$tool" --error-exitcode 1 \
    --kernel-name kernel_substring=balanced_learning \
    "$PYTHON" -m pytest -q tests/test_kernels.py tests/test_ops.py tests/test_samplers.py \
    -k "cuda and not plain and not compile and not opcheck and not many_draws and not equally_likely"
done

for benchmark in benchmarks/*_speed.py; do
  run "$(basename "$benchmark" .py)" "$PYTHON" "$benchmark" --device cuda --output "$OUT"
done

echo "== failed: ${failures[*]:-nothing}"
[ ${#failures[@]} = 0 ]
