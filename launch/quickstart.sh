#!/usr/bin/env bash
# Set up, then train on the repository's own sample of real speech: two processes on the CPU, about five minutes.
#
#   bash launch/quickstart.sh [FLAG ...]       flags of bin/train.py, which win over the preset
#
# Works from any directory; the run's folder is made under runs/ where you stand. The environment: launch/setup.sh.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$(bash "$root/launch/setup.sh")"

# Two processes share the machine: threads beyond its cores only get into each other's way.
processes=2
cores="$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)"
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# torchrun, by the name that needs no PATH. --standalone picks a free port, so that two quickstarts do not meet.
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" \
    "$root/bin/train.py" --preset quickstart --data_root "$root" "$@"
