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
promtool=0
command -v promtool >/dev/null || promtool=1
if [ ${#missing[@]} -eq 0 ] && [ $promtool -eq 0 ]; then
    exit 0
fi
apt-get update -qq
if [ ${#missing[@]} -gt 0 ]; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
# For a long test of /metrics. The package `prometheus` has it, and would start a service.
if [ $promtool -eq 1 ]; then
    folder=$(mktemp -d)
    (
        cd "$folder"
        apt-get download -qq -o APT::Sandbox::User=root prometheus
        dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool > promtool
        install -m 755 promtool /usr/local/bin/promtool
    )
    rm -r "$folder"
fi
