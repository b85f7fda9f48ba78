"""Prints the slowest tests of several runs: `python -m tests.slowest build/*.xml`."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

SHOWN = 15


def main(files: list[Path]) -> None:
    cases = [case for file in files for case in ElementTree.parse(file).iter("testcase")]  # noqa: S314 - our own
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:SHOWN]
    print(f"the {SHOWN} slowest of {len(cases)} tests, with set-up:")  # noqa: T201
    for case in slowest:
        place = str(case.get("classname")).replace(".", "/")
        print(f"{float(case.get('time', 0)):7.1f} s  {place}.py::{case.get('name')}")  # noqa: T201


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
