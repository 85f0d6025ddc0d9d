#!/bin/sh
# Every check: style, types, tests and doctests. With --all the slow cases too. Further arguments go to pytest.
#
#     sh scripts/test.sh
#     sh scripts/test.sh --all
extras=test
. "$(dirname "$0")/setup.sh"
only="not slow"
if [ "${1:-}" = --all ]; then
    only="slow or not slow"
    shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -m "$only" "$@"
