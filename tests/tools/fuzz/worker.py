"""A process that runs problems one after another.

Its standard output has lines `run CASE ISA`, before the kernels run, and `found CASE ISA WHAT:
DETAIL`. A case is FAMILY:DTYPE:SEED.
"""

import argparse
import faulthandler
import itertools
import signal
import time
import traceback

import torch

import vlmfast.ops.common  # noqa: F401  (loads the extension)
from tools.fuzz.judge import Trial

_HANGS = 600  # seconds for one problem


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", required=True)
    parser.add_argument("--dtypes", nargs="+", required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--last", type=int)
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--describe", action="store_true", help="say what each problem is")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    isas = torch.ops.vlmfast.cpu_isas().split(",")
    kinds = list(itertools.product(options.families, options.dtypes))
    for seed in itertools.count(options.first, options.step):
        if time.time() > options.until or (options.last is not None and seed > options.last):
            break
        family, dtype = kinds[seed % len(kinds)]
        signal.alarm(_HANGS)  # ends the process
        run(family, dtype, seed, isas, options.describe)
    signal.alarm(0)


def run(family: str, dtype: str, seed: int, isas: list[str], describe: bool) -> None:
    """One problem on all instruction sets."""
    case = f"{family}:{dtype}:{seed}"
    try:
        trial = Trial(family, getattr(torch, dtype), seed)
        if describe:
            print(trial.description, flush=True)
        for isa in isas:
            print(f"run {case} {isa}", flush=True)
            for finding in trial.judge(isa):
                print(f"found {case} {isa} {finding}", flush=True)
    except Exception:  # of the reference, of torch, or of what makes the problem
        error = traceback.format_exc().strip().splitlines()
        print(f"found {case} none {error[-1]}: {' / '.join(error[-7:-1])}", flush=True)


if __name__ == "__main__":
    main()
