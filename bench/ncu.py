"""What Nsight Compute says of the main kernels: python -m bench.ncu FOLDER.

Runs one forward and backward of the first selected case of each family under ncu, and writes
FOLDER/ncu-<family>.csv and the tables FOLDER/ncu.md. Clocks are left as they are.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.contest import Contest, our_call
from bench.families import FAMILIES
from vlmfast.profile import ncu_command, read_ncu
from vlmfast.tables import markdown_table

RUN = "--run"


def command(family: str, report: Path) -> list[str]:
    """The command line that has ncu measure the kernels of a family."""
    return [*ncu_command(str(report)), sys.executable, "-m", "bench.ncu", RUN, family]


def measured(family: str) -> Contest | None:
    """The first selected case of a family, where what it needs is installed."""
    found = (
        Contest(family, case, "bfloat16", "fwd+bwd", "cuda") for case in FAMILIES[family].selected
    )
    return next((contest for contest in found if not contest.missing), None)


def _run(family: str) -> None:
    """One call, of which ncu sees the second time: by then everything is compiled."""
    contest = measured(family)
    if contest is None:
        raise ValueError(f"family: what the cases of {family} need is not installed")
    call = our_call(contest)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def tables(reports: Sequence[Path]) -> str:
    """A Markdown table of each report."""
    lines = []
    for report in reports:
        table = read_ncu(report.read_text().splitlines())
        lines += [f"## {report.stem.removeprefix('ncu-')}", "", markdown_table(*table), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where ncu is missing or fails; what it measured before is kept."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) == 2 and arguments[0] == RUN:
        _run(arguments[1])
        return 0
    if len(arguments) != 1:
        print("usage: python -m bench.ncu FOLDER", file=sys.stderr)
        return 2
    if shutil.which("ncu") is None:
        print("ncu is not installed", file=sys.stderr)
        return 1
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    reports, failures = [], 0
    for family in FAMILIES:
        if measured(family) is None:
            print(f"{family}: what its cases need is not installed", file=sys.stderr)
            continue
        report = folder / f"ncu-{family}.csv"
        try:
            subprocess.run(command(family, report), check=True)
            tables([report])
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            # Where counters are forbidden ncu may end well and have measured nothing.
            print(f"{family}: {error}", file=sys.stderr)
            failures += 1
            continue
        reports.append(report)
        (folder / "ncu.md").write_text(tables(reports))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
