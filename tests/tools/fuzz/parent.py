"""Runs workers, begins them anew where they die, and gathers what they say."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Lock, Thread

FAMILIES = ["flash_attention", "window_attention", "cross_attention", "contrastive_loss"]
DTYPES = ["float32", "bfloat16", "float16"]
_SHOWN = 3  # seeds of each kind of finding


class Report:
    """What ran, and what was found.

    Attributes:
        cases: how many ran, by (family, instruction set).
        findings: by kind, the first few of its cases and how many there were.
    """

    def __init__(self, describe: bool = False, log: Path | None = None) -> None:
        self.describe = describe
        self.cases: Counter[tuple[str, str]] = Counter()
        self.findings: dict[str, list[str]] = {}
        self.begun = time.time()
        self._log = open(log, "a") if log else None  # noqa: SIM115  (as long as the process)
        self._lock = Lock()

    def hear(self, line: str) -> None:
        """Takes a line of a worker's output."""
        with self._lock:
            if self._log:
                print(line, file=self._log, flush=True)
            kind, _, rest = line.partition(" ")
            if kind == "run":
                case, isa = rest.split(" ")
                self.cases[case.partition(":")[0], isa] += 1
            elif kind == "found":
                case, isa, what = rest.split(" ", 2)
                self._find(case, isa, what)
            if self.describe:
                print(line)

    def _find(self, case: str, isa: str, what: str) -> None:
        family, dtype, _ = case.split(":")
        subject, _, detail = what.partition(": ")
        found = self.findings.setdefault(f"{family} {dtype} {isa}: {subject}", [])
        found.append(f"{case}  {detail}")
        if len(found) <= _SHOWN:
            print(f"FOUND {case} on {isa}: {what}", flush=True)

    def __str__(self) -> str:
        minutes = (time.time() - self.begun) / 60
        lines = [f"{sum(self.cases.values())} cases in {minutes:.1f} minutes"]
        lines += [f"  {f:17} {isa:12} {n:8}" for (f, isa), n in sorted(self.cases.items())]
        lines.append(f"{len(self.findings)} kinds of findings")
        for kind, found in sorted(self.findings.items()):
            lines.append(f"  {kind}, {len(found)} times")
            lines += [f"    --repeat {case}" for case in found[:_SHOWN]]
        return "\n".join(lines)


def run(
    report: Report,
    families: Sequence[str],
    dtypes: Sequence[str],
    seed: int,
    until: float,
    problems: int | None = None,
    processes: int = 1,
    module: str = "tools.fuzz.worker",
) -> None:
    """Runs problems from a seed on, each kind in turn, until a time or for a number of problems.

    Args:
        report: is told what happens.
        families: whose problems are run.
        dtypes: of their inputs.
        seed: of the first problem; the next has the next.
        until: seconds since the epoch.
        problems: their number.
        processes: of workers.
        module: whose `main` is a worker's.
    """
    last = None if problems is None else seed + problems - 1
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guarded_malloc.so"
        source = Path(__file__).with_name("guarded_malloc.c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        command = [sys.executable, "-m", module, "--until", str(until), "--step", str(processes)]
        command += ["--families", *families, "--dtypes", *dtypes]
        command += [] if last is None else ["--last", str(last)]
        command += ["--describe"] if report.describe else []
        tests = Path(__file__).parents[2]
        path = os.pathsep.join((str(tests.parent), str(tests)))
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path}
        threads = [
            Thread(target=_work, args=(report, command, environment, seed + i, processes))
            for i in range(processes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _work(
    report: Report, command: list[str], environment: dict[str, str], first: int, step: int
) -> None:
    """Runs one worker after another until one ends well: it has nothing more to do."""
    while True:
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*command, "--first", str(first)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            case = isa = None
            for line in process.stdout or ():
                report.hear(line.rstrip("\n"))
                if line.startswith("run "):
                    _, case, isa = line.split()
            status = process.wait()
            if status == 0:
                return
            errors.seek(0)
            said = errors.read()
        if case is None:  # it never got to work
            report.hear(f"found none:none:{first} none exit {status}: {said.strip()[-2000:]}")
            return
        how = signal.Signals(-status).name if status < 0 else f"exit {status}"
        why = " ".join(line for line in said.splitlines() if line.startswith("guarded_malloc"))
        report.hear(f"found {case} {isa} died of {how}: {why}")
        first = int(case.split(":")[2]) + step
