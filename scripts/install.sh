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

command -v "$python" >/dev/null 2>&1 || {
    echo "There is no $python here. Gridmill needs Python 3.11 or newer; try: make PYTHON=/path/to/python3 demo" >&2
    exit 2
}
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
# What pip was told (extra places for wheels, such as a CPU build of torch; an index; an authority) uv has to be told too.
configured() {
    "$python" -m pip config get "install.$1" 2>/dev/null || "$python" -m pip config get "global.$1" 2>/dev/null || true
}
links=${PIP_FIND_LINKS:-$(configured find-links)}
index=${PIP_INDEX_URL:-$(configured index-url)}
authority=${PIP_CERT:-$(configured cert)}

echo "Installing gridmill[$extras] …"
if [ -n "$uv" ]; then
    set -- --quiet --python "$venv/bin/python" --constraint constraints.txt
    for link in $links; do set -- "$@" --find-links "$link"; done
    [ -z "$index" ] || set -- "$@" --default-index "$index"
    [ -z "$authority" ] || export SSL_CERT_FILE="$authority"
    if "$uv" pip install "$@" --editable ".[$extras]" 2>"$venv/uv.log"; then exit 0; fi
    echo "uv could not install it (why is in $venv/uv.log); pip can, a little slower …" >&2
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >/dev/null || {
    echo "Neither uv nor pip can be had for $venv (on Debian: apt-get install python3-venv)" >&2
    exit 2
}
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
