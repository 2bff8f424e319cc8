#!/usr/bin/env bash
# What `make` needs on a bare Debian 12 or Ubuntu 24.04. Run as root or with sudo.
set -euo pipefail

packages=(git make python3 python3-venv)
# For `make test-browser`, and for figures of `e2sci bench timeline` as SVG or PNG.
packages+=(chromium)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
