"""Random problems for the CPU kernels, and proof that bugs in kernels are found."""

import os
import time

from tools.fuzz.parent import DTYPES, FAMILIES, Report, run
from tools.fuzz.planted import BUGS

PROBLEMS = 2000  # about a minute of two cores


def test_random_problems_find_nothing():
    # The same in each run, so that the same kernels get the same verdict; `make fuzz` draws others.
    report = Report()
    until = time.time() + 1200
    run(report, FAMILIES, DTYPES, 0, until, PROBLEMS, processes=os.cpu_count() or 1)
    assert not report.findings, f"\n{report}"
    assert {family for family, _ in report.cases} == set(FAMILIES)
    assert sum(report.cases.values()) >= PROBLEMS


def test_planted_bugs_are_found():
    report = Report()
    problems = 2 * len(BUGS)
    arguments = (["flash_attention"], ["bfloat16"], 0, time.time() + 600, problems)
    run(report, *arguments, module="tools.fuzz.planted")
    found = [set() for _ in BUGS]
    for kind, cases in report.findings.items():
        for case in cases:
            seed = int(case.split()[0].split(":")[2])
            found[seed % len(BUGS)].add(kind.partition(": ")[2])
    none, reads, writes, unwritten, sign = found
    assert not none, report
    assert reads == {"died of SIGSEGV"}, report
    assert writes and writes <= {"died of SIGSEGV", "died of SIGABRT"}, report
    assert "out not finite" in unwritten, report
    assert "out" in sign, report
