#!/usr/bin/env bash
# Makes DIR an environment of its own with the Rust sglang_router from PyPI, for bench/router.py and router_http.py to
# compare with. A second run does nothing; remove DIR to be rid of it.
#
#   scripts/peer_router.sh DIR
set -euo pipefail
. "$(dirname "$0")/peer_environment.sh"
peer_environment sglang-router 0.3.2 "$@"
# Its launcher imports these without declaring them all.
peer_install "sglang-router==$version" requests aiohttp orjson uvicorn fastapi setproctitle ||
    { echo "$0: could not install sglang_router $version (is a package index in reach?)" >&2; exit 1; }
"$dir/bin/python" -c 'import sglang_router.launch_router'
touch "$stamp"
