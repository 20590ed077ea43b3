"""Command line: python -m bench [FAMILY ...], compare, predict, profile or report; see --help."""

import argparse
import importlib
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

import vlmfast
from bench import compare, profile, report
from bench.contest import Contest, contests, run
from bench.contestant import OURS, is_installed
from bench.families import FAMILIES
from bench.measure import Ceilings, measure_ceilings, settle_allocator, unhurried_rate
from bench.memory import MemoryMeter
from bench.report import write_report
from bench.results import Results, append_csv, check_csv, machine_file, write_json
from bench.tables import markdown
from vlmfast.backends import BACKENDS

DTYPES = ("float32", "bfloat16", "float16")
# Sweeps are drawn in one dtype and mode.
SWEPT = {"cpu": ("float32", "fwd"), "cuda": ("bfloat16", "fwd")}
# What a contest takes in all: some seconds, and in the least time of one call float64, eight
# smaller runs of it, and at least seven calls of each contestant, none at the machine's limit.
FIXED, COST = 2.0, 90
# And at least so many calls at the rate of torch's own products.
UNHURRIED_CALLS = 30
# Of the time there is, if there are sweeps: for what comes before them. `make bench` has 80
# contests before the 30 of its sweeps.
SHARE = 0.7
MODES = {"fwd": ("fwd",), "bwd": ("bwd",), "both": ("fwd", "fwd+bwd")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if any of our own results was wrong, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "compare":
        return compare.main(arguments[1:])
    if arguments and arguments[0] == "profile":
        return profile.main(arguments[1:])
    if arguments and arguments[0] == "report":
        return report.main(arguments[1:])
    if arguments and arguments[0] == "predict":
        return importlib.import_module("bench.gpu.predict").main(arguments[1:])  # imports Triton
    parser = _parser()
    options = parser.parse_args(arguments)
    for family in options.families:
        if family not in FAMILIES:
            parser.error(f"argument FAMILY: expected one of {', '.join(FAMILIES)}, got {family!r}")
    chosen = list(_chosen(options))
    if not chosen:
        print(f"no case has {options.filter!r} in its name", file=sys.stderr)
        return 2
    swept = list(_swept(options)) if options.sweeps else []

    if options.append:
        try:
            check_csv(options.append)
        except ValueError as error:
            parser.error(f"argument --append: {error}")
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --out: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU", file=sys.stderr)
        return 2
    if options.out and not is_installed("matplotlib"):
        print("matplotlib is not installed: there will be no report.html", file=sys.stderr)
    start = time.monotonic()
    if not settle_allocator():
        print("this C library's allocator cannot be settled: expect noise", file=sys.stderr)
    print("measuring this machine's ceilings", file=sys.stderr)
    dtypes = list(dict.fromkeys(contest.dtype for contest in [*chosen, *swept]))
    ceilings = measure_ceilings(
        dtypes, options.ceiling_size, min(options.seconds, 2.0), options.device
    )
    tournament = _Tournament(options, ceilings)
    try:
        forced = vlmfast.use_backend(options.backend) if options.backend else nullcontext()
        meter_of = MemoryMeter(options.device, options.backend) if options.memory else nullcontext()
        with forced, meter_of as meter:
            seconds = math.inf if options.minutes is None else 60 * options.minutes
            tournament(chosen, start + seconds * (SHARE if swept else 1), meter)
            tournament(swept, start + seconds, meter, swept=True)
    except NotImplementedError as error:  # the forced backend's reasons
        print(error, file=sys.stderr)
        return 2

    print(markdown(tournament.results))
    if options.out:
        print(f"report: {write_report(options.out, tournament.results)}", file=sys.stderr)
    if options.append:
        append_csv(options.append, tournament.results.rows, ceilings)
        print(f"added to {options.append}", file=sys.stderr)
    return int(any(OURS in row.refusals for row in tournament.results.rows))


def _chosen(options: argparse.Namespace) -> Iterator[Contest]:
    """Of every family in turn: where time runs out, it has seen something of each."""
    families = []
    for name in options.families or FAMILIES:
        found = contests(name, options.dtype, MODES[options.mode], options.filter, options.device)
        wanted = FAMILIES[name].selected if options.selection else FAMILIES[name].cases
        families.append([contest for contest in found if contest.case in wanted])
    return _in_turn(families)


def _swept(options: argparse.Namespace) -> Iterator[Contest]:
    """Small cases of all families before the large ones."""
    dtype, mode = SWEPT[options.device]
    return _in_turn(
        [Contest(name, case, dtype, mode, options.device) for _, case in sweep.cases]
        for name in options.families or FAMILIES
        if (sweep := FAMILIES[name].sweep)
    )


def _in_turn(families: Iterable[Sequence[Contest]]) -> Iterator[Contest]:
    columns = itertools.zip_longest(*families)
    return (contest for column in columns for contest in column if contest is not None)


class _Tournament:
    """Runs contests until the time is up."""

    def __init__(self, options: argparse.Namespace, ceilings: Ceilings):
        self.options = options
        self.results = Results([], ceilings)
        self.rates = {}
        if options.minutes is not None and options.device == "cpu":
            self.rates = {dtype: unhurried_rate(dtype) for dtype in ceilings.flops}

    def __call__(
        self,
        chosen: Sequence[Contest],
        end: float,
        meter: MemoryMeter | None,
        swept: bool = False,
    ) -> None:
        left_out = self.results.left_out
        for number, contest in enumerate(chosen, start=1):
            if contest.missing:
                left_out[f"{contest.family} {contest}"] = f"not installed: {contest.missing},"
                continue
            if time.monotonic() + self._expected_seconds(contest) > end:
                left_out[f"{contest.family} {contest}"] = "no time was left"
                continue
            print(f"{number}/{len(chosen)} {contest.family} {contest}", file=sys.stderr)
            row = run(contest, self.options.seconds, compiles=self.options.compile)
            row.swept = swept
            if meter is not None:
                try:
                    row.peak_bytes.update(meter.peak_bytes(contest, list(row.timings)))
                except RuntimeError as error:
                    row.refusals["peak memory"] = str(error)
            self.results.rows.append(row)
            if self.options.out:  # what there is so far
                write_json(self.options.out / "results.json", self.results)

    def _expected_seconds(self, contest: Contest) -> float:
        if self.options.minutes is None:
            return 0.0
        dtype = getattr(torch, contest.dtype)
        work = contest.family_calls.work(contest.case, dtype, contest.mode)
        calls = COST * self.results.ceilings.least_seconds(work, contest.dtype)
        unhurried = UNHURRIED_CALLS * work.flops / self.rates.get(contest.dtype, math.inf)
        return FIXED + self.options.seconds + max(calls, unhurried)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times families of kernels against their peers, each call checked first.",
        epilog="python -m bench compare BEFORE AFTER: what changed between two results.json. "
        "python -m bench report RESULTS: the report of one that is kept. "
        "python -m bench profile TARGET: where the time of a case or a model goes. "
        "python -m bench predict: how long kernels should take on a GPU, from their machine code.",
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all"
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
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also race what must be compiled first, for up to a minute a shape",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="leave out what would not end in this time, and name it in the report",
    )
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
    parser.add_argument(
        "--append",
        type=Path,
        nargs="?",
        const=machine_file(),
        metavar="FILE",
        help="add every measurement to a CSV file (default: %(const)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
