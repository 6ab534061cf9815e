#!/usr/bin/env bash
# Makes .venv complete, once. Idempotent: a stamp holds the lock file's hash, so a second run does nothing.
#
#   ASYNCEP_ENV_CACHE=DIR   keep the 11 GB of locked packages in DIR/<hash of the lock>, shared by every
#                           checkout; .venv then only points at it. Without it everything is in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "setup: '$python' not found; install Python 3.11 or set PYTHON=" >&2; exit 2; }

lock_hash=$("$python" -c 'import hashlib,sys;print(hashlib.sha256(open("requirements.lock","rb").read()).hexdigest()[:16])')
self_hash=$(cat pyproject.toml scripts/setup_env.sh | sha256sum | cut -c1-16)
stamp=".venv/.asyncep-$lock_hash-$self_hash${ASYNCEP_ENV_CACHE:+-cached}"
[ -e "$stamp" ] && exit 0

install_locked() { # $1: a virtual environment's folder
    echo "setup: installing $(grep -c '==' requirements.lock) locked packages into $1 (about 11 GB, 4 minutes)"
    "$1/bin/python" -m pip install --quiet --progress-bar off --no-deps -r requirements.lock
}

if [ -n "${ASYNCEP_ENV_CACHE:-}" ]; then
    base="$ASYNCEP_ENV_CACHE/$lock_hash"
    mkdir -p "$ASYNCEP_ENV_CACHE"
    # Two checkouts may get here at once: one installs, the other waits.
    exec 9>"$base.lock"
    flock 9
    if [ ! -e "$base/.complete" ]; then
        rm -rf "$base"
        "$python" -m venv "$base"
        install_locked "$base"
        touch "$base/.complete"
    else
        echo "setup: using the locked packages in $base"
    fi
    flock -u 9
    rm -rf .venv
    "$python" -m venv .venv
    site=$(.venv/bin/python -c 'import sysconfig;print(sysconfig.get_paths()["purelib"])')
    "$base/bin/python" -c 'import sysconfig;print(sysconfig.get_paths()["purelib"])' >"$site/locked-packages.pth"
else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    install_locked .venv
fi
echo "setup: installing this checkout (editable)"
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
# Without them everything works, more slowly: a failure is said and no more.
.venv/bin/python -m asyncep_kernels.native.build || true
rm -f .venv/.asyncep-*
touch "$stamp"
echo "setup: done"
