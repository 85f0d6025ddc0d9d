# Sourced by the scripts beside it: makes .venv at the top of the repository and installs the extras named in $extras.
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/installed-$extras
if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    echo "Installing geomprobe[$extras] into .venv (torch is large: minutes on a fresh machine) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    touch "$stamp"
fi
