#!/usr/bin/env bash
# Makes DIR an environment of its own with the Rust sglang_router from PyPI, for bench/router.py and router_http.py to
# compare with. Nothing of it enters .venv. A second run does nothing; remove DIR to be rid of it.
#
#   scripts/peer_router.sh DIR
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: scripts/peer_router.sh DIR" >&2; exit 2; }
dir=$1
version=0.3.2
stamp="$dir/.sglang-router-$version"
[ -e "$stamp" ] && exit 0
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "peer_router: '$python' not found; install Python 3.11 or set PYTHON=" >&2; exit 2; }
echo "peer_router: installing sglang_router $version into $dir"
"$python" -m venv "$dir"
# Its launcher imports these without declaring them all.
"$dir/bin/python" -m pip install --quiet --progress-bar off --disable-pip-version-check \
    "sglang-router==$version" requests aiohttp orjson uvicorn fastapi setproctitle ||
    { echo "peer_router: could not install sglang_router $version (is a package index in reach?)" >&2; exit 1; }
"$dir/bin/python" -c 'import sglang_router.launch_router'
touch "$stamp"
