#!/usr/bin/env bash
# Run all tests in two lanes at a time, one for each core; print the 15 slowest.
# The tests of faults mostly wait, so they leave room for the engine's tests.
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

mkdir -p build
rm -f build/*.xml
lane unit edge faults >build/second-lane.log 2>&1 &
second=$!
trap 'pkill -P $second; kill $second' INT TERM
lane integration engine
first=$?
wait $second
second=$?
cat build/second-lane.log
"$python" -m tests.slowest build/*.xml
exit $((first || second))
