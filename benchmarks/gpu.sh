#!/bin/sh
# What one GPU of 80 GiB or more shows in ten minutes, into benchmarks/results/gpu.json; --dry: the same, small, on a CPU.
# PYTHON: with fewstep and pytest; that of .venv where there is one.
cd "$(dirname "$0")/.." || exit
[ -x .venv/bin/python ] && : "${PYTHON:=.venv/bin/python}"
exec "${PYTHON:-python}" -m benchmarks.engine gpu "$@"
