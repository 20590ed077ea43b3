"""`python -m tools.fuzz`: starts the workers, counts what they run and gathers what they find."""

import argparse
import os
import sys
import time
from pathlib import Path

from tools.fuzz.parent import DTYPES, FAMILIES, Report, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--problems", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, help="of the first problem; one is drawn without")
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", metavar="FAMILY:DTYPE:SEED", help="one problem, described")
    parser.add_argument("--log", type=Path, help="a file for every line of the workers")
    options = parser.parse_args()
    families, dtypes = options.family or FAMILIES, options.dtype or DTYPES
    seed, problems, processes = options.seed, options.problems, options.processes
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    if options.repeat:
        family, dtype, number = options.repeat.split(":")
        families, dtypes, seed, problems, processes = [family], [dtype], int(number), 1, 1
    print(f"problems from seed {seed} on; {processes} processes", flush=True)
    report = Report(describe=bool(options.repeat), log=options.log)
    run(report, families, dtypes, seed, time.time() + 60 * options.minutes, problems, processes)
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
