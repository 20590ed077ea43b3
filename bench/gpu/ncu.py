"""What Nsight Compute says of the main kernels: python -m bench.gpu.ncu FOLDER.

Runs one forward and backward of a goal of each family under ncu, and writes FOLDER/ncu-<goal>.csv
and the tables FOLDER/ncu.md. Clocks are left as they are.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu import records
from bench.gpu.cases import BY_NAME, MODES
from vlmfast.profile import ncu_command, read_ncu
from vlmfast.tables import markdown_table

RUN = "--run"
MEASURED = ("vit-l14-336", "swin-t-s1", "phi", "clip-32768")


def command(goal: str, report: Path) -> list[str]:
    """The command line that has ncu measure the kernels of a goal."""
    return [*ncu_command(str(report)), sys.executable, "-m", "bench.gpu.ncu", RUN, goal]


def _run(goal: str) -> None:
    """One call, of which ncu sees the second time: by then everything is compiled."""
    call = BY_NAME[goal].our_call(MODES[-1], "cuda")
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
        print("usage: python -m bench.gpu.ncu FOLDER", file=sys.stderr)
        return 2
    if shutil.which("ncu") is None:
        print("ncu is not installed", file=sys.stderr)
        return 1
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    reports, failures = [], 0
    for goal in MEASURED:
        report = folder / f"ncu-{goal}.csv"
        try:
            subprocess.run(command(goal, report), check=True)
            tables([report])
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            # Where counters are forbidden ncu may end well and have measured nothing.
            print(f"{goal}: {error}", file=sys.stderr)
            failures += 1
            continue
        reports.append(report)
        records.rewrite(folder / "ncu.md", tables(reports))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
