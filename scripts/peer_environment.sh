# Sourced by scripts/peer_*.sh: an environment of its own for a peer, of which nothing enters .venv.
#
#   peer_environment NAME VERSION [DIR]    sets dir and stamp, makes the environment; ends the script where it is there

peer_environment() {
    [ $# -eq 3 ] || { echo "usage: $0 DIR" >&2; exit 2; }
    peer=$1 version=$2 dir=$3
    stamp="$dir/.$peer-$version"
    [ -e "$stamp" ] && exit 0
    local python=${PYTHON:-python3.11}
    command -v "$python" >/dev/null || { echo "$0: '$python' not found; install Python 3.11 or set PYTHON=" >&2; exit 2; }
    echo "$0: installing $peer $version into $dir"
    "$python" -m venv "$dir"
}

peer_install() { "$dir/bin/python" -m pip install --quiet --progress-bar off --disable-pip-version-check "$@"; }
