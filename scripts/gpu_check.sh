#!/usr/bin/env bash
# Check itune on one NVIDIA GPU, without network, in under 8 minutes: scripts/gpu_check.sh [--steps N]
#
# Prints one JSON line a finding (see scripts/gpu_check.py) and exits with 1 when something is wrong.
# Needs a python3 with jax for CUDA (0.11 or 0.12 on Python 3.12), numpy, safetensors, flax and optax; of what itune
# installs beside these, nothing: neither datasets, grain, ml_collections, orbax nor transformers is imported.
# A machine without a network that has jax and transformers but not flax and optax takes four wheels (1.5 MB; without
# transformers also rich, pygments, markdown-it-py, mdurl, pyyaml, typing-extensions, safetensors). Here:
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels flax optax msgpack absl-py
# and there:
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
# PYTHON chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
[ -n "${XLA_PYTHON_CLIENT_MEM_FRACTION-}" ] || export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-.9}"
exec timeout --signal=INT 475 "${PYTHON:-python3}" scripts/gpu_check.py "$@"
