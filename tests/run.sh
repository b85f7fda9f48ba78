#!/usr/bin/env bash
# Run all tests in three lanes at a time; print the 15 slowest.
# Two lanes hold the tests that mostly wait for processes and clocks. The engine's tests only
# compute; they have the lowest priority, so they use what the others leave of two cores.
set -u
python=$1
export OMP_NUM_THREADS=1

lane() {
  local failed=0
  for room in "$@"; do
    "$python" -m pytest "tests/$room" --junit-xml="build/$room.xml" || failed=1
  done
  return $failed
}

computing() {
  local failed=0
  lane unit || failed=1
  renice -n 19 $BASHPID >/dev/null
  lane engine || failed=1
  return $failed
}

mkdir -p build
rm -f build/*.xml
lane faults >build/faults.log 2>&1 &
faults=$!
computing >build/computing.log 2>&1 &
computing=$!
trap 'pkill -P $faults; pkill -P $computing; kill $faults $computing' INT TERM
lane integration edge
failed=$?
for other in faults computing; do
  wait "${!other}" || failed=1
  cat "build/$other.log"
done
"$python" -m tests.slowest build/*.xml
exit $failed
