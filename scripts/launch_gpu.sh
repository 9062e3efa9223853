#!/usr/bin/env bash
# Trains on all GPUs of one machine, in one process:
#   scripts/launch_gpu.sh configs/NAME.py [--mesh data=4,fsdp=2] [--setting VALUE ...]
# Several machines without a scheduler: the same on each, numbered from 0, with the address of the first:
#   scripts/launch_gpu.sh configs/NAME.py --coordinator 10.0.0.1:1234 --processes 2 --process 0 ...
# The mesh is data=-1, all GPUs, if none is given. PYTHON is the interpreter (.venv/bin/python).
# Tried: with JAX_PLATFORMS=cpu and two virtual devices. Not tried: GPUs.
set -euo pipefail
config=${1:?"which config? $0 configs/NAME.py"}
shift
mesh=(--mesh data=-1)
if [[ " $*" == *" --mesh"* ]]; then mesh=(); fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" # an error, not a CPU, where the GPUs do not work
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" scripts/train.py "$config" "${mesh[@]}" "$@"
