#!/bin/sh
# Every check: style, types, the order of imports, tests and doctests. With --all the slow cases too, and those that need
# a training framework, in an environment of their own. Further arguments go to pytest, such as `-n 0`, which runs the
# tests in one process.
#
#     sh scripts/test.sh            14 minutes on 2 cores, once everything is installed
#     sh scripts/test.sh --all
extras=test
. "$(dirname "$0")/setup.sh"
only="not integrations and not slow" all=
if [ "${1:-}" = --all ]; then
    only="not integrations" all=yes
    shift
fi
# Tests start hundreds of processes, and each would compile the package's modules again.
unset PYTHONDONTWRITEBYTECODE
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports --no-logo
# The tests of a file share what its fixtures record, so one worker runs them all.
# Three workers on 2 cores: much of their time they wait for processes that a test has started.
.venv/bin/python -m pytest -n 3 --dist loadfile -m "$only" "$@"
[ -z "$all" ] || sh scripts/test_integrations.sh
