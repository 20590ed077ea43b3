"""Command line: python -m bench [FAMILY ...], or python -m bench compare; see --help."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

import vlmfast
from bench import compare
from bench.cases import CASES, SELECTION, SWEEPS
from bench.contest import Contest, contests, run
from bench.html import page
from bench.measure import measure_ceilings, settle_allocator
from bench.memory import peak_bytes
from bench.peers import OURS
from bench.report import Row, append_csv, machine, markdown, write_json
from vlmfast.backends import BACKENDS

DTYPES = ("float32", "bfloat16", "float16")
# Sweeps are drawn in one dtype and mode.
SWEPT = {"cpu": ("float32", "fwd"), "cuda": ("bfloat16", "fwd")}
MODES = {"fwd": ("fwd",), "bwd": ("bwd",), "both": ("fwd", "fwd+bwd")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if any of our own results was wrong, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "compare":
        return compare.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    for family in options.families:
        if family not in CASES:
            parser.error(f"argument FAMILY: expected one of {', '.join(CASES)}, got {family!r}")
    chosen = list(_chosen(options))
    if not chosen:
        print(f"no case has {options.filter!r} in its name", file=sys.stderr)
        return 2
    swept = [
        Contest(family, case, *SWEPT[options.device], options.device)
        for family in (options.families or SWEEPS)
        if options.sweeps and family in SWEEPS
        for _, case in SWEEPS[family].cases
    ]

    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU", file=sys.stderr)
        return 2
    if not settle_allocator():
        print("this C library's allocator cannot be settled: expect noise", file=sys.stderr)
    print("measuring this machine's ceilings", file=sys.stderr)
    dtypes = list(dict.fromkeys(contest.dtype for contest in [*chosen, *swept]))
    ceilings = measure_ceilings(
        dtypes, options.ceiling_size, min(options.seconds, 2.0), options.device
    )
    try:
        with vlmfast.use_backend(options.backend) if options.backend else nullcontext():
            rows = _race(chosen, options.seconds, options.memory)
            sweep_rows = _race(swept, options.seconds, options.memory)
    except NotImplementedError as error:  # the forced backend's reasons
        print(error, file=sys.stderr)
        return 2

    print(markdown(rows, ceilings))
    if options.out:
        by_sweep = {
            family: (SWEEPS[family], [row for row in sweep_rows if row.family == family])
            for family in dict.fromkeys(contest.family for contest in swept)
        }
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "results.json", [*rows, *sweep_rows], ceilings)
        (options.out / "report.md").write_text(markdown(rows, ceilings) + "\n")
        (options.out / "report.html").write_text(page(rows, by_sweep, ceilings, machine()))
        print(f"report: {options.out / 'report.html'}", file=sys.stderr)
    if options.append:
        append_csv(options.append, [*rows, *sweep_rows])
    return int(any(OURS in row.refusals for row in [*rows, *sweep_rows]))


def _chosen(options: argparse.Namespace) -> Iterator[Contest]:
    for family in options.families or CASES:
        for contest in contests(
            family, options.dtype, MODES[options.mode], options.filter, options.device
        ):
            if not options.selection or contest.case.name in SELECTION[family]:
                yield contest


def _race(chosen: Sequence[Contest], seconds: float, with_memory: bool) -> list[Row]:
    rows = []
    for number, contest in enumerate(chosen, start=1):
        print(f"{number}/{len(chosen)} {contest}", file=sys.stderr)
        rows.append(run(contest, seconds))
    if with_memory and chosen:
        print("measuring memory", file=sys.stderr)
        for row, found in zip(rows, peak_bytes(chosen), strict=True):
            row.peak_bytes.update(found)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times families of kernels against their peers, each call checked first.",
        epilog="python -m bench compare BEFORE AFTER: what changed between two results.json.",
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(CASES)}; default: all"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given repeatedly")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="fwd",
        help="bwd: backward alone; both: forward, and forward with backward (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--filter", default="", help="only cases with this in their name")
    parser.add_argument(
        "--selection", action="store_true", help="only the most telling cases of each family"
    )
    parser.add_argument(
        "--sweeps", action="store_true", help="also draw cost against size, for each family"
    )
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
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
    parser.add_argument(
        "--out", type=Path, help="folder for report.html, report.md and results.json"
    )
    parser.add_argument("--append", type=Path, help="CSV file to add every measurement to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
