#!/usr/bin/env bash
# Set up with the test extra, then run the tests.
#
#   bash launch/test.sh [ARGUMENT ...]         of pytest: launch/test.sh tests/losses -k hard
#
# Works from any directory; arguments that name files are relative to the repository.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$(bash "$root/launch/setup.sh" test)"
cd "$root"
exec "$python" -m pytest "$@"
