#!/bin/sh
# The tests that need a training framework, in an environment of their own: .venv-integrations sees all that .venv has,
# torch above all, and adds the frameworks with what they demand. Arguments go to pytest.
#
#     sh scripts/test_integrations.sh
extras=test
. "$(dirname "$0")/setup.sh"
stamp=.venv-integrations/installed
if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    rm -rf .venv-integrations
    .venv/bin/python -m venv .venv-integrations
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    shared=$(.venv/bin/python -c "$purelib")
    echo "import site; site.addsitedir('$shared')" >"$(.venv-integrations/bin/python -c "$purelib")/shared.pth"
    .venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check \
        --editable ".[lightning,transformers,accelerate]"
    touch "$stamp"
fi
exec .venv-integrations/bin/python -m pytest -o addopts="--doctest-modules --strict-markers -ra" -W default "$@" \
    tests/behavior/integrations geomprobe/integrations
