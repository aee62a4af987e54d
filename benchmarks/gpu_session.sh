#!/usr/bin/env bash
# Runs what needs a GPU, in steps: the build, the tests, compute-sanitizer on the kernels, and the benchmarks.
#
#     benchmarks/gpu_session.sh --list         # the steps, what matters most first, and the seconds each may take
#     benchmarks/gpu_session.sh [STEP...]      # some of them; default: all
#
# Works in the checkout, installs nothing and needs no network. Needs a Python (PYTHON, or python3) with torch,
# torchvision, setuptools 77, pytest and hypothesis; compute-sanitizer and, unless kernels are there that run on this GPU
# (balanced_learning/_cpu.so and _cuda.so, perhaps built on another machine), nvcc, in CUDA_HOME or on PATH.
#
# Results go to OUT as they come: a JSON file a benchmark, a figure, and logs.tar.gz, eight files at most. No step takes
# longer than TIMEOUT seconds, if that is set. BALANCED_LEARNING_COMMIT is the commit to report where git cannot tell.
# A step that fails does not stop the others, but the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-benchmarks/results} PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

STEPS="\
build          420 build the kernels, unless those that are there run on this GPU, and say what is in use
agree           90 call every kernel, and compare with the CPU: losses, and draws of many random batches
tests          300 run the tests that use a GPU, but for those of training
memcheck       150 compute-sanitizer: accesses beyond a tensor, or misaligned
racecheck      150 compute-sanitizer: races in shared memory
kernel_speed   240 the loss: times, memory, and bandwidth as a share of copying
sampler_speed  150 the sampler, and the whole selection
steps          300 training steps of detectors beside torchvision's, float32 and bfloat16, batches of 2 and 8
pyramids       300 the pyramid beside explicit attention, eager and compiled
synccheck      150 compute-sanitizer: barriers that some threads miss
initcheck      150 compute-sanitizer: reads of what was never written
compiled_steps 470 the same training steps, compiled: minutes each"

kernels_run() {
  "$PYTHON" -c 'import sys, torch; from balanced_learning._backend import has_kernels
sys.exit(not all(has_kernels(torch.device(*device)) for device in (("cpu",), ("cuda", 0))))'
}

build() {
  if ! kernels_run; then
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
      'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export TORCH_CUDA_ARCH_LIST
    BALANCED_LEARNING_BUILD=cuda "$PYTHON" setup.py build_ext --inplace --force
  fi
  "$PYTHON" -m balanced_learning
  "$PYTHON" setup.py --quiet egg_info || true  # so that the reports of the benchmarks name the version of the library
  kernels_run
}

agree() { "$PYTHON" -m tests.every_kernel --device cuda --rounds 2000; }

# Without kernels the tests would be skipped.
tests() {
  kernels_run
  "$PYTHON" -m pytest -q -rs --durations=5 -m gpu tests/test_kernels.py tests/test_ops.py tests/test_losses.py \
    tests/test_samplers.py tests/test_pyramid.py tests/test_path_aggregation.py tests/detection/test_apply.py \
    tests/detection/test_necks.py tests/detection/test_stages.py
}

memcheck() { sanitize memcheck --report-api-errors no; }  # of torch's calls, some fail on purpose
racecheck() { sanitize racecheck; }
synccheck() { sanitize synccheck; }
initcheck() { sanitize initcheck; }

# Without torch's cache of memory, every tensor is an allocation of its own, so that an access beyond it is found.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$@" --error-exitcode 1 \
    "$PYTHON" -m tests.every_kernel --device cuda
}

kernel_speed() { "$PYTHON" benchmarks/kernel_speed.py --device cuda --output "$OUT"; }
sampler_speed() { "$PYTHON" benchmarks/sampler_speed.py --device cuda --output "$OUT"; }
pyramids() { pyramid_speed pyramids; }
steps() { pyramid_speed steps; }
compiled_steps() { pyramid_speed compiled_steps; }
pyramid_speed() { "$PYTHON" benchmarks/pyramid_speed.py --device cuda --output "$OUT" --part "$1"; }

run() {
  local step=$1 seconds=$2 status
  [ "$seconds" -le "${TIMEOUT:-$seconds}" ] || seconds=$TIMEOUT
  echo "== $step, at most $seconds s"
  SECONDS=0
  timeout --kill-after=5 "$seconds" bash -euo pipefail -c "$step" 2>&1 | tee "$logs/$step.log"
  status=${PIPESTATUS[0]}
  [[ $status = 124 || $status = 137 ]] && echo "stopped after $seconds s" | tee -a "$logs/$step.log"
  [ "$status" = 0 ] || failures+=("$step")
  echo "== $step: status $status after $SECONDS s" | tee -a "$logs/$step.log"
  tar -czf "$OUT/logs.tar.gz" -C "$logs" .  # at once, since the next step may be the last there is time for
}

if [ "${1:-}" = --list ]; then
  echo "$STEPS"
  exit
fi
declare -A limits
names=()
while read -r name seconds _; do
  names+=("$name")
  limits[$name]=$seconds
done <<<"$STEPS"
for step in "$@"; do
  [ -n "${limits[$step]:-}" ] || { echo "there is no step $step: see --list" >&2; exit 2; }
done

export -f "${names[@]}" kernels_run sanitize pyramid_speed
mkdir -p "$OUT"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failures=()
for step in "${@:-${names[@]}}"; do run "$step" "${limits[$step]}"; done
echo "== failed: ${failures[*]:-nothing}"
[ ${#failures[@]} = 0 ]
