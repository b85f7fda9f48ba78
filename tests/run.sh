#!/usr/bin/env bash
# Run all tests in three lanes at a time; print the 15 slowest.
# Two lanes hold the tests that mostly wait for processes and clocks. The engine's tests only
# compute; they have the lowest priority, so they use what the others leave of two cores. Ray gives
# its workers a low priority too, unless told otherwise; then the unit tests would starve them.
set -u
python=$1
export OMP_NUM_THREADS=1 RAY_worker_niceness=0

lane() {
  local failed=0 lower
  for room in "$@"; do
    [ "$room" = engine ] && lower=19 || lower=0
    nice -n "$lower" "$python" -m pytest "tests/$room" --junit-xml="build/$room.xml" || failed=1
  done
  return $failed
}

mkdir -p build
rm -f build/*.xml
lane faults edge >build/faults.log 2>&1 &
faults=$!
lane unit engine >build/computing.log 2>&1 &
computing=$!
trap 'pkill -P $faults; pkill -P $computing; kill $faults $computing' INT TERM
lane integration
failed=$?
for other in faults computing; do
  wait "${!other}" || failed=1
  cat "build/$other.log"
done
"$python" -m tests.slowest build/*.xml
exit $failed
