#!/usr/bin/env bash
# Runs the integration tests of this bundle whose names hold one of the arguments, or all, each in a process of its own: what
# one does to the GPU is none of the others' business. JOBS at once, 8 by default, SECONDS_EACH at most, 400 by default, with
# their output in LOGS, by default a new folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
export run=$here/run.sh logs=${LOGS:-$(mktemp -d)} seconds=${SECONDS_EACH:-400}
if [ ! -x "$here/bin/test-it" ]; then
  echo "each-test.sh: there is no $here/bin/test-it" >&2
  exit 2
fi

one() {
  log=$logs/${1//:/_}.txt
  timeout "$seconds" "$run" test-it --exact "$1" >"$log" 2>&1 || code=$?
  # A process may die of taking CUDA down when its test has passed.
  if grep -q "^test result: ok. 1 passed" "$log"; then echo "ok $1"; else echo "FAILED (${code:-0}) $1"; fi
}
export -f one

mkdir -p "$logs"
names=$("$run" test-it --list "$@" | sed -n 's/: test$//p')
if [ -z "$names" ]; then
  echo "each-test.sh: no test has such a name" >&2
  exit 2
fi
xargs -P "${JOBS:-8}" -I{} bash -c 'one "$1"' _ {} <<<"$names" | tee "$logs/summary.txt" |
  grep --line-buffered -v "^ok " || true
echo "$(grep -c "^ok " "$logs/summary.txt") passed, $(grep -c "^FAILED" "$logs/summary.txt") failed; see $logs"
! grep -q "^FAILED" "$logs/summary.txt"
