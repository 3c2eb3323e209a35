#!/bin/sh
# All that needs an NVIDIA GPU, in stages of less than ten minutes: build, tests, sanitizers, benchmarks, tuning.
#
#   sh tools/gpu.sh [OUT] [STAGE ...]      results, logs and the state of each stage go to OUT (default: out/gpu)
#   sh tools/gpu.sh --list                 the stages
#
# Without stages it runs those that have not passed yet with the present sources, so it can be stopped and started again. It
# uses the python on PATH (PYTHON=... for another), that python's torch and the CUDA it finds, and installs nothing: it needs no
# network.
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python3}" tools/gpu.py "$@"
