"""Run nvcc for CMake, keep ptxas's resource report beside the object, refuse register spills.

CMake puts this script in front of each CUDA compile command. ptxas reports, for every kernel and
architecture, something like::

    ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
    ptxas info    : Function properties for _Z6kernelv
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 40 registers, ...

A kernel that spills is slower than its tile promises, and nothing else says so: the build fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FUNCTION = re.compile(r"Function properties for (\S+)")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REPORT_LINE = re.compile(r"^(ptxas info|\s+\d+ bytes stack frame)")


def spills(report: str) -> list[str]:
    """One line for each kernel of a ptxas report that spills registers."""
    found = []
    function = "?"
    for line in report.splitlines():
        if match := FUNCTION.search(line):
            function = match[1]
        elif (match := SPILLS.search(line)) and (int(match[1]) or int(match[2])):
            found.append(f"{function}: {line.strip()}")
    return found


def main(command: list[str]) -> int:
    """Run the compile command; its exit status, or 1 where a kernel spills."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = result.stderr.splitlines(keepends=True)
    report = "".join(line for line in lines if REPORT_LINE.match(line))
    sys.stderr.write("".join(line for line in lines if not REPORT_LINE.match(line)))
    if result.returncode != 0 or "-o" not in command:
        return result.returncode

    object_file = Path(command[command.index("-o") + 1])
    object_file.with_suffix(".ptxas.txt").write_text(report)
    if found := spills(report):
        object_file.unlink()
        sys.stderr.write("ptxas spilled registers:\n  " + "\n  ".join(found) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
