#!/bin/sh
# Builds the docs site; a warning or a link that leads nowhere is an error. Needs no network once .venv is made.
#
#     sh scripts/docs.sh [FOLDER]        default: build/site
extras=docs
. "$(dirname "$0")/setup.sh"
site=${1:-build/site}
.venv/bin/python -m sphinx -q -W --keep-going -E -c docs -d build/doctrees . "$site"
echo "Wrote $site/index.html"
