#!/usr/bin/env bash
# Says in one sentence what is missing before a virtual environment can be made.
# Usage: scripts/check-python.sh PYTHON
set -euo pipefail

python=${1:-python3}

if ! command -v "$python" >/dev/null; then
    echo "no '$python' here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python setup" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$("$python" --version) is too old: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python setup" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "'$python' cannot create virtual environments: run scripts/install-debian-packages.sh (Debian, Ubuntu) or install its venv module" >&2
    exit 1
fi
