#!/usr/bin/env bash
# Runs what needs a GPU: the tests, compute-sanitizer on the kernels, and the benchmarks. Works in the checkout, installs
# nothing and needs no network.
#
#     OUT=results benchmarks/gpu_session.sh
#
# Needs nvcc and compute-sanitizer, in CUDA_HOME or on PATH, and a Python (PYTHON, or python3) with torch, torchvision,
# setuptools, pytest and hypothesis. Builds the kernels for this GPU, unless TORCH_CUDA_ARCH_LIST names others. Logs and
# results go to OUT. A step that fails does not stop the others, but the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
export PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
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
# egg_info lets the reports of the benchmarks name the version of the library.
run build env BALANCED_LEARNING_BUILD=cuda "$PYTHON" setup.py egg_info build_ext --inplace
run info "$PYTHON" -m balanced_learning
# Those left out need more packages, and no GPU.
run tests "$PYTHON" -m pytest tests --continue-on-collection-errors \
  --ignore tests/training --ignore tests/examples --ignore tests/test_readme.py

# Without torch's cache of memory, every tensor is an allocation of its own, so that an access beyond it is found.
for tool in memcheck racecheck initcheck synccheck; do
  run "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    --kernel-name kernel_substring=balanced_learning \
    "$PYTHON" -m pytest -q tests/test_kernels.py tests/test_ops.py tests/test_samplers.py \
    -k "cuda and not plain and not compile and not opcheck and not many_draws and not equally_likely"
done

for benchmark in benchmarks/*_speed.py; do
  run "$(basename "$benchmark" .py)" "$PYTHON" "$benchmark" --device cuda --output "$OUT"
done

# Where there are images, and the packages of the extra "train".
if [ -n "${BALANCED_LEARNING_DATA:-}" ]; then
  for options in "" "--backbone resnet50 --amp bf16"; do
    run "train_step${options:+_resnet50}" "$PYTHON" benchmarks/train_step.py --device cuda --output "$OUT" $options
  done
fi

echo "== failed: ${failures[*]:-nothing}"
[ ${#failures[@]} = 0 ]
