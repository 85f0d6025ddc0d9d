#!/bin/sh
# Every check: style, types, the order of imports, tests and doctests. With --all the slow cases too, and those that need a training framework,
# in an environment of their own. Further arguments go to pytest.
#
#     sh scripts/test.sh
#     sh scripts/test.sh --all
extras=test
. "$(dirname "$0")/setup.sh"
only="not integrations and not slow" all=
if [ "${1:-}" = --all ]; then
    only="not integrations" all=yes
    shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports --no-logo
.venv/bin/python -m pytest -m "$only" "$@"
[ -z "$all" ] || sh scripts/test_integrations.sh
