#!/bin/sh
# install.sh PYTHON VENV EXTRAS: makes the virtual environment and installs Gridmill into it, editable.
#
# Uses uv when it can be had (seconds instead of minutes) and falls back to plain pip; a machine whose Python lacks
# ensurepip, or whose pip is years old, works too. Versions come from constraints.txt. Run again, it repairs.
set -eu
python=$1
venv=$2
extras=$3
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Gridmill needs Python 3.11 or newer; this is $("$python" --version). Try: make PYTHON=python3.12 demo" >&2
    exit 2
}

if [ ! -x "$venv/bin/python" ]; then
    echo "Creating $venv …"
    rm -rf "$venv"
    "$python" -m venv "$venv" 2>/dev/null || "$python" -m venv --without-pip "$venv" || {
        echo "Python's venv module is missing (on Debian: apt-get install python3-venv)" >&2
        exit 2
    }
fi

# uv: the one on PATH, else one from the package index inside the environment itself.
uv=$(command -v uv || true)
if [ -z "$uv" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv >/dev/null 2>&1 || true
    [ -x "$venv/bin/uv" ] && uv="$venv/bin/uv"
fi
# pip's configured extra places for wheels (a CPU build of torch, say) are unknown to uv unless handed over.
links=$("$python" -m pip config get install.find-links 2>/dev/null ||
    "$python" -m pip config get global.find-links 2>/dev/null || true)
links=${PIP_FIND_LINKS:-$links}

echo "Installing gridmill[$extras] …"
if [ -n "$uv" ]; then
    set -- --quiet --python "$venv/bin/python" --constraint constraints.txt
    for link in $links; do set -- "$@" --find-links "$link"; done
    if "$uv" pip install "$@" --editable ".[$extras]"; then exit 0; fi
    echo "uv could not install it; trying pip …" >&2
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >/dev/null || {
    echo "Neither uv nor pip can be had for $venv (on Debian: apt-get install python3-venv)" >&2
    exit 2
}
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
