#!/bin/sh
# What one GPU of 80 GiB or more shows in ten minutes, into benchmarks/results/gpu.json; with --dry the same, small, on a CPU.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m benchmarks.engine gpu "$@"
