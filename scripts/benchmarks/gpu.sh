# Proves on a GPU what the documents say of GPUs, in 8 minutes, and prints one table.
#
#     sh scripts/benchmarks/gpu.sh                  where there is a GPU
#     sh scripts/benchmarks/gpu.sh --device cpu     the same, smaller, to know that the script works
set -eu
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" scripts/benchmarks/gpu.py "$@"
