#!/bin/sh
# Records, replays, verifies and plots the training of a small ResNet on handwritten digits.
#
#     sh scripts/quickstart.sh [RUN]        default: runs/digits, replaced each time
extras=examples
. "$(dirname "$0")/setup.sh"
run=${1:-runs/digits}
geomprobe() { .venv/bin/geomprobe "$@"; }

echo "--- pass 1: train, and record the run"
geomprobe record --force -o "$run" --seed 0 scripts/examples/digits.py
echo "--- pass 2: the same run, bit for bit, measured"
geomprobe replay --force "$run"
echo "--- what is in the trace, and the identities it must satisfy"
geomprobe inspect "$run"
geomprobe verify "$run"
geomprobe plot --force --skip-last-epoch "$run" -o "$run/gamma.png"

cat <<END

Wrote
  $run/record.h5   pass 1: the environment, a fingerprint of every step, and the final weights
  $run/trace.h5    pass 2: the trace, certified to be of the same run
  $run/gamma.png   RSI, EB and their ratio gamma by epoch (No Wrong Turns, figure 2)

Look at gamma.png: is gamma positive all along, and above the dashed line, which is what a random walk would
show? Then open trace.h5 with h5py, xarray or geomprobe.open_trace("$run"); README.md explains each column.
END
