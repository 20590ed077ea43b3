"""Compile every Triton launch for every listed GPU, on a machine that has none.

    make gates                                           everything
    make gates GATE_ARGS="--family flash_attention"      one family
    make gates GATE_ARGS=--update                        and write the register snapshot anew
    make gates TRITON=3.6.0                              with another Triton than that of .venv

The launchers run on meta tensors under a driver that only names an architecture, so what is
compiled is what ships: the same configurations, strides, alignments and constants. The gate fails

- where a kernel needs more shared memory, or tensor memory, than a block of that GPU may have,
- where it spills registers on sm_90,
- where its matrix products are not rounded as the case says, or do not run on the tensor cores in
  the way of that GPU,
- where its matrix products in half precision wait for one another on sm_90,
- where one of them is computed more than once there by a row that is not marked REPEATS, or where a
  row so marked computes none more than once in any case,
- where its registers differ from the snapshot of this Triton version, tests/snapshots/,
- where a row of `kernels/<family>/configs.py` was compiled by no case.

Its table also says what else costs time on sm_90: rows that begin at multiples of 16 bytes and are
moved by less, and copies of four bytes.

A family takes part by a page in tests/tools/compile_cases/. tests/test_kernels_gate.py runs the
part of this that `TESTED_ARCHITECTURES` names, and tests/test_tools_gate.py plants a bug for each
guard. None of it works in a process that has TRITON_INTERPRET set.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.gpu.assembly import REGISTER_UNIT
from bench.gpu.no_card import CompileOnlyDriver
from tools.compile_cases import CASES
from tools.compile_cases.common import CompileCase
from tools.compiled import MACHINE_CODE_OF, Compiled, examine
from vlmfast.kernels import launch

SNAPSHOT = Path(__file__).parents[1] / "snapshots" / f"registers-triton-{triton.__version__}.json"

# What computes matrix products of half precision.
NATIVE_INSTRUCTION = {
    80: "mma.sync",
    86: "mma.sync",
    90: "wgmma",
    100: "tcgen05",
    120: "mma.sync",
}
SPILLS_FORBIDDEN_ON = (90,)

# What `make test` has the time to compile every case for: the GPU that may not spill, and, of those
# that share rows of mma.sync, the one with the least shared memory, since what fits there fits on
# all. The first case of each family goes through the compiler of every other GPU, too.
TESTED_ARCHITECTURES = (86, 90)
TENSOR_MEMORY_COLUMNS = 512  # of an SM of sm_100, where tcgen05 accumulates


@dataclasses.dataclass
class Report:
    """All kernels of one case on one architecture, and the configuration rows that it used."""

    case: str
    arch: int
    precision: str
    kernels: list[Compiled] = dataclasses.field(default_factory=list)
    row_of_kernel: list[launch.Row | None] = dataclasses.field(default_factory=list)
    rows: set[tuple[str, str, launch.Row]] = dataclasses.field(default_factory=set)
    error: str = ""

    def __str__(self) -> str:
        return f"{self.case}, sm_{self.arch}"


@contextlib.contextmanager
def compile_only(arch: int, precision: str) -> Iterator[Report]:
    """Within the block every launch compiles for `arch` and is examined, and nothing runs."""
    report = Report("", arch, precision)
    run = JITFunction.run
    find_row = launch.find_row
    found: launch.Row | None = None
    tf32 = torch.backends.cuda.matmul.fp32_precision

    def compile_and_examine(self, *args, warmup, **kwargs):
        nonlocal found
        compiled = examine(run(self, *args, warmup=True, **kwargs), arch)
        if not all(map(has_aligned_rows, tensors_in((args, kwargs.values())))):
            compiled = dataclasses.replace(compiled, narrow=0)  # nothing wider is possible
        report.kernels.append(compiled)
        report.row_of_kernel.append(found)
        found = None

    def find_and_note_row(table, shape, arch):
        nonlocal found
        found = row = find_row(table, shape, arch)
        if row is not None:
            report.rows.add((shape.kernel, shape.precision, row))
        return row

    with (
        # reset_active() would look for a real driver, and there may be none.
        mock.patch.object(driver, "_active", CompileOnlyDriver(arch)),
        mock.patch.object(JITFunction, "run", compile_and_examine),
        mock.patch.object(launch, "find_row", find_and_note_row),
        mock.patch.object(launch, "architecture", lambda device: arch),
    ):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield report
        finally:
            torch.backends.cuda.matmul.fp32_precision = tf32


def compile_case(case: CompileCase, arch: int) -> Report:
    with compile_only(arch, case.precision) as report:
        report.case = case.name
        try:
            case.launch()
        except Exception as error:  # whatever a compiler raises belongs in the report
            report.error = f"{type(error).__name__}: {error}"
    return report


def tensors_in(arguments: Iterable[object]) -> Iterator[torch.Tensor]:
    """Those among a kernel's arguments, and within the tuples that it is handed."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif not isinstance(argument, str) and isinstance(argument, Iterable):
            yield from tensors_in(argument)


def has_aligned_rows(tensor: torch.Tensor) -> bool:
    """Whether rows of half precision begin at multiples of 16 bytes; those of others may not."""
    strides = [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    return tensor.element_size() != 2 or all(s % 8 == 0 for s in strides[:-1])


def complaints(report: Report) -> list[str]:
    """What is wrong with the kernels of one report, a line each."""
    if report.error:
        return [f"{report}: {report.error}"]
    return [
        f"{report}, {compiled.kernel}: {wrong}"
        for compiled, row in zip(report.kernels, report.row_of_kernel, strict=True)
        for wrong in (
            *_resources(compiled),
            *_products(compiled, report.precision),
            *_waste(compiled, row, report.precision),
        )
    ]


def _resources(compiled: Compiled) -> Iterator[str]:
    limit = launch.SHARED_MEMORY[compiled.arch]
    if compiled.shared > limit:
        yield f"needs {compiled.shared} bytes of shared memory; a block may have {limit}"
    if compiled.tensor_memory > TENSOR_MEMORY_COLUMNS:
        yield f"needs {compiled.tensor_memory} columns of tensor memory; there are 512"
    if compiled.stack and compiled.arch in SPILLS_FORBIDDEN_ON:
        yield f"spills: {compiled.stack} bytes of stack a thread"


def _products(compiled: Compiled, precision: str) -> Iterator[str]:
    if not compiled.products:
        return
    allowed = {"half": {"wide", "narrow"}, "tf32": {"tf32"}, "ieee": {"ieee"}}[precision]
    if not compiled.products <= allowed:
        yield f"products: expected {_list(allowed)}, found {_list(compiled.products)}"
        return
    native = NATIVE_INSTRUCTION[compiled.arch]
    if precision == "half":
        needed = {"wide": {native}, "narrow": {"mma.sync"}}
        expected = set().union(*(needed[kind] for kind in compiled.products))
        fine = compiled.instructions == expected
    elif precision == "tf32":  # wgmma and tcgen05 take it in some layouts only
        expected = {native, "mma.sync"}
        fine = bool(compiled.instructions) and compiled.instructions <= expected
    else:
        expected = {"fma"}
        fine = compiled.instructions == expected
    if not fine:
        yield (
            f"matrix instructions: expected {_list(expected)}, "
            f"found {_list(compiled.instructions) or 'none'}"
        )


def _waste(compiled: Compiled, row: launch.Row | None, precision: str) -> Iterator[str]:
    if compiled.arch not in MACHINE_CODE_OF or precision != "half":
        return
    if compiled.serialised:
        yield "products wait for one another"
    if compiled.repeats > 1 and not (row and row.repeats):
        yield f"computes a product {compiled.repeats} times; its row is not marked REPEATS"


def idle_marks(reports: Iterable[Report]) -> list[str]:
    """Rows marked REPEATS by which no case computes a product twice, of cases of sm_90."""
    launched = [
        (compiled, row)
        for report in reports
        if report.precision == "half"
        for compiled, row in zip(report.kernels, report.row_of_kernel, strict=True)
        if row and row.repeats and compiled.arch in MACHINE_CODE_OF
    ]
    needed = {(compiled.kernel, row) for compiled, row in launched if compiled.repeats > 1}
    marked = {(compiled.kernel, row) for compiled, row in launched}
    return [f"{kernel}: marked REPEATS, and does not: {row}" for kernel, row in marked - needed]


def wasted_time(compiled: Compiled) -> Iterator[str]:
    """What costs time on sm_90 without being wrong."""
    if compiled.serialised:
        yield "serialised"
    if compiled.repeats > 1:
        yield f"computed {compiled.repeats} times"
    if compiled.narrow:
        yield f"{compiled.narrow} narrow tiles"
    if compiled.short_copies:
        yield f"{compiled.short_copies} copies of 4 bytes"


def _list(words: Iterable[str]) -> str:
    return " and ".join(sorted(words))


def tables_of(family: str) -> dict[str, launch.Table]:
    """The family's launch configurations, by kernel."""
    return importlib.import_module(f"vlmfast.kernels.{family}.configs").TABLES


def uncovered_rows(
    family: str, reports: Iterable[Report], archs: tuple[int, ...] = launch.ARCHITECTURES
) -> list[str]:
    """Rows of the family's configurations, on some architectures, that no case compiled."""
    used = {
        (kernel, report.arch, precision, row)
        for report in reports
        for kernel, precision, row in report.rows
    }
    return [
        f"{kernel}, sm_{arch}, {precision}: no case compiles {row}"
        for kernel, table in tables_of(family).items()
        for (arch, precision), rows in table.items()
        if arch in archs
        for row in rows
        if (kernel, arch, precision, row) not in used
    ]


def snapshot_of(reports: Iterable[Report]) -> dict[str, dict[str, int]]:
    """Registers by case and architecture, then by kernel."""
    return {str(r): {k.kernel: k.registers for k in r.kernels} for r in reports}


def snapshot_differences(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """What two snapshots of a family disagree about, a line each."""

    def flat(snapshot: dict[str, dict]) -> dict[str, int]:
        return {
            f"{case}, {kernel}": registers
            for case, kernels in snapshot.items()
            for kernel, registers in kernels.items()
        }

    before, now = flat(old), flat(new)
    wrong = [f"{name}: not in the snapshot" for name in now.keys() - before.keys()]
    wrong += [f"{name}: in the snapshot, but not compiled" for name in before.keys() - now.keys()]
    wrong += [
        f"{name}: {now[name]} registers, {before[name]} in the snapshot"
        for name in now.keys() & before.keys()
        if abs(now[name] - before[name]) >= REGISTER_UNIT
    ]
    return sorted(wrong)


def read_snapshot() -> dict[str, dict]:
    """The snapshot of this Triton version, by family; empty where there is none."""
    return json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}


def write_snapshot(family: str, reports: Iterable[Report]) -> None:
    """Renews one family's part."""
    snapshot = {**read_snapshot(), family: snapshot_of(reports)}
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(json.dumps(snapshot, indent=1, sort_keys=True) + "\n")


def registers_moved(family: str, reports: Iterable[Report]) -> list[str]:
    """How the reports differ from the snapshot, if this Triton version has one.

    What it has of the family's cases that were not compiled this time is let be.
    """
    snapshot = read_snapshot()
    if not snapshot:
        return []
    now = snapshot_of(reports)
    known = {str(Report(case.name, arch, "")) for case in CASES[family] for arch in case.archs}
    left_out = known - now.keys()
    before = {name: k for name, k in snapshot.get(family, {}).items() if name not in left_out}
    wrong = snapshot_differences(before, now)
    if wrong:
        wrong.append(f'wanted? then: make gates GATE_ARGS="--family {family} --update"')
    return wrong


def targets(family: str, case: CompileCase, archs: Iterable[int]) -> list[int]:
    """What a case is compiled for: those of `archs` that it names, or all, if it is the first."""
    return [arch for arch in case.archs if arch in archs or case is CASES[family][0]]


def _prepare_process() -> None:
    gc.freeze()  # what importing torch leaves behind need not be looked through again and again


def _compile(family: str, index: int, arch: int) -> Report:
    return compile_case(CASES[family][index], arch)


class Compilations:
    """The families' cases, compiled in the background by as many processes as cores."""

    def __init__(
        self,
        families: Iterable[str] = tuple(CASES),
        archs: Iterable[int] = launch.ARCHITECTURES,
    ):
        # Forking would copy the threads of torch; a fresh process costs two seconds.
        self.pool = ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            mp_context=get_context("spawn"),
            initializer=_prepare_process,
        )
        self.futures: dict[tuple[str, str], list[Future[Report]]] = {
            (family, case.name): [
                self.pool.submit(_compile, family, index, arch)
                for arch in targets(family, case, archs)
            ]
            for family in families
            for index, case in enumerate(CASES[family])
        }

    def __enter__(self) -> "Compilations":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def reports(self, family: str, case: str) -> list[Report]:
        """One case on each of its architectures, as soon as they are compiled."""
        return [future.result() for future in self.futures[family, case]]

    def all_reports(self, family: str) -> list[Report]:
        return [report for case in CASES[family] for report in self.reports(family, case.name)]


def _line(report: Report, k: Compiled) -> str:
    code, remarks = " " * 12, ()
    if k.arch in MACHINE_CODE_OF:
        code, remarks = f"{k.matrix:3} {k.waits:5} {k.blocks:6}", wasted_time(k)
    return (
        f"{report.case:38} sm_{k.arch:<3} {k.kernel:37} {k.registers:9} {k.stack:5} {k.shared:6} "
        f"{code} {', '.join((*sorted(k.instructions), *remarks))}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=CASES, action="append", help="only this one")
    parser.add_argument("--update", action="store_true", help="write the register snapshot anew")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    families = options.family or list(CASES)
    wrong = []
    print(
        f"{'case':38} {'arch':6} {'kernel':37} registers stack shared "
        "mma waits blocks instructions, and what costs time"
    )
    with Compilations(families) as compilations:
        for family in families:
            reports = []
            for case in CASES[family]:
                for report in compilations.reports(family, case.name):
                    reports.append(report)
                    wrong += complaints(report)
                    print("\n".join(_line(report, k) for k in report.kernels), flush=True)
            wrong += uncovered_rows(family, reports) + idle_marks(reports)
            if options.update:
                write_snapshot(family, reports)
            elif not read_snapshot():
                print(
                    f"no snapshot of registers for Triton {triton.__version__}; --update makes one"
                )
            wrong += registers_moved(family, reports)
    print("\n".join(["", *wrong, f"{len(wrong)} complaints"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
