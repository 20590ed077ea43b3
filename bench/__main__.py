"""Command line: python -m bench FAMILY, see --help."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import vlmfast
from bench.cases import CASES
from bench.contest import contests, run
from bench.measure import measure_ceilings, settle_allocator
from bench.peers import CONTESTANTS, OURS
from bench.report import markdown, write_json
from vlmfast.backends import BACKENDS

DTYPES = ("float32", "bfloat16", "float16")
MODES = {"fwd": ("fwd",), "bwd": ("bwd",), "both": ("fwd", "fwd+bwd")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if any of our own results was wrong, else 0."""
    options = _parser().parse_args(arguments)
    family = importlib.import_module(f"bench.{options.family}")
    contestants = CONTESTANTS[options.family]
    chosen = list(contests(options.family, options.dtype, MODES[options.mode], options.filter))
    if not chosen:
        print(f"no case of {options.family} has {options.filter!r} in its name", file=sys.stderr)
        return 2

    if not settle_allocator():
        print("this C library's allocator cannot be settled: expect noise", file=sys.stderr)
    print("measuring this machine's ceilings", file=sys.stderr)
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in chosen))
    ceilings = measure_ceilings(dtypes, options.ceiling_size, options.seconds)
    rows = []
    for number, (case, dtype, mode) in enumerate(chosen, start=1):
        print(f"{number}/{len(chosen)} {case.name} {dtype} {mode}", file=sys.stderr)
        with vlmfast.use_backend(options.backend) if options.backend else nullcontext():
            try:
                rows.append(run(family, case, dtype, mode, contestants, options.seconds))
            except NotImplementedError as error:  # the forced backend's reasons
                print(error, file=sys.stderr)
                return 2

    print(markdown(rows, [peer.name for peer in contestants if peer.name != OURS], ceilings))
    if options.json:
        write_json(options.json, rows, ceilings)
    return int(any(OURS in row.refusals for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times a family of kernels against its peers, each checked first.",
    )
    parser.add_argument("family", choices=CASES)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given repeatedly")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="fwd",
        help="bwd: backward alone; both: forward, and forward with backward (default: %(default)s)",
    )
    parser.add_argument("--filter", default="", help="only cases with this in their name")
    parser.add_argument("--backend", choices=BACKENDS, help="force one of vlmfast's backends")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="for each race (default: %(default)s)"
    )
    parser.add_argument(
        "--ceiling-size",
        type=int,
        default=2048,
        help="of the matrices that the matmul ceiling is measured with (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
