#!/usr/bin/env bash
# Makes DIR an environment of its own with schemathesis from PyPI, for bench/fuzz.py to try an OpenAPI schema with (100 MB).
# A second run does nothing; remove DIR to be rid of it.
#
#   scripts/peer_schemathesis.sh DIR
set -euo pipefail
. "$(dirname "$0")/peer_environment.sh"
peer_environment schemathesis 4.32.5 "$@"
# Hypothesis's version too: it makes the requests, and a seed is to mean the same ones.
peer_install "schemathesis==$version" hypothesis==6.170.17 jsonschema_rs==0.60.3 ||
    { echo "$0: could not install schemathesis $version (is a package index in reach?)" >&2; exit 1; }
"$dir/bin/st" --version >/dev/null
touch "$stamp"
