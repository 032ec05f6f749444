#!/bin/bash
# The compute capabilities of this machine's GPUs as CMake writes them ("90-real;120-real"); nothing where there are none.
set -euo pipefail
nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -nE 's/^([0-9]+)\.([0-9]+) *$/\1\2-real/p' | sort -nu | paste -sd ';' || true
