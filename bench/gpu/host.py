"""What launching a call costs its host: python -m bench.gpu.host FOLDER.

Seconds of the CPU until a call of ours and of its first peer returns, at small batch sizes, where
it may be longer than the kernels take. FOLDER/host.jsonl gets a record of each.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu import records, trials
from bench.gpu.cases import MODES, SMALL
from bench.gpu.records import Record
from bench.measure import Call, launch_seconds, race


def launch_timer(call: Call) -> Record:
    """Microseconds of the host a call, with an empty queue to begin with."""
    timing = race({"": call}, trials.SECONDS, launch_seconds)[""]
    return {"median_us": round(1e6 * timing.median, 2), "samples": timing.samples}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where there is no GPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m bench.gpu.host FOLDER", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch finds no GPU", file=sys.stderr)
        return 1
    file = Path(arguments[0]) / "host.jsonl"
    file.unlink(missing_ok=True)
    for goal in SMALL:
        for mode in MODES:
            for contestant in goal.family.contestants[:2]:
                record = trials.tried(goal, mode, contestant, "cuda", launch_timer)
                print(record, flush=True)
                records.append(file, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
