#!/bin/sh
# On a machine with an NVIDIA GPU: build against the installed torch, run the GPU tests, run the GPU benchmark.
#
#   sh tools/gpu.sh [OUT]      writes OUT/gpu-tests.log, OUT/benchmark-gpu.{json,html}
#
# It uses the python on PATH (PYTHON=... to choose another) and installs nothing, so it also works without a network.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

"$PYTHON" setup.py -q build_ext --inplace || exit 1
# kernels/ is fuseblock.kernels once installed; a link serves the same without pip.
test -e python/fuseblock/kernels || ln -s ../../kernels python/fuseblock/kernels
PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
"$PYTHON" -m fuseblock env | tee "$OUT/env.txt"

"$PYTHON" -m pytest -m gpu -q --tb=short -p no:cacheprovider 2>&1 | tee "$OUT/gpu-tests.log"
status=$(tail -n 1 "$OUT/gpu-tests.log" | grep -c "passed" || true)
grep -q "failed\|error" "$OUT/gpu-tests.log" && status=0

"$PYTHON" -m benchmarks --device cuda --json "$OUT/benchmark-gpu.json" --html "$OUT/benchmark-gpu.html"
test "$status" = 1
