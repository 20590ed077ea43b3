"""Compile every Triton launch for every listed GPU, on a machine that has none.

    PYTHONPATH=tests python -m tools.compile_gate            every case
    PYTHONPATH=tests python -m tools.compile_gate --update   and write the register snapshot anew

The launchers run on meta tensors under a driver that only names an architecture, so what is
compiled is what ships: the same configurations, strides, alignments and constants. The gate fails

- where a kernel needs more shared memory, or tensor memory, than a block of that GPU may have,
- where it spills registers on sm_90,
- where its matrix products do not use the tensor cores in the way of that GPU,
- where its registers differ from the snapshot of this Triton version by more than the tolerance,
- where a row of `kernels/configs.py` was compiled by no case.

It must not run in a process that has TRITON_INTERPRET set.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vlmfast.kernels import configs

SNAPSHOTS = Path(__file__).resolve().parent.parent / "snapshots"
REGISTER_TOLERANCE = 8  # what ptxas moves by when code around the loop changes

# How each GPU's tensor cores are driven, as it shows in PTX.
MATRIX_INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
}
EXPECTED_INSTRUCTION = {
    80: "mma.sync",
    86: "mma.sync",
    90: "wgmma",
    100: "tcgen05",
    120: "mma.sync",
}
SPILLS_FORBIDDEN_ON = (90,)
TENSOR_MEMORY_COLUMNS = 512  # of an SM of sm_100, where tcgen05 accumulates


class CompileOnlyDriver:
    """What Triton asks of a driver before a launch, answered for a GPU that is not there."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of one kernel; `matrix` counts its matrix instructions by kind."""

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    tensor_memory: int
    matrix: dict[str, int]
    products: str


@dataclass
class Report:
    """All kernels of one case on one architecture, and the configuration rows that it used."""

    case: str
    arch: int
    kernels: list[Compiled] = field(default_factory=list)
    rows: set[tuple[str, str, configs.Row]] = field(default_factory=set)
    error: str = ""


def examine(kernel: CompiledKernel, arch: int) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    matrix = {name: len(re.findall(p, ptx)) for name, p in MATRIX_INSTRUCTIONS.items()}
    return Compiled(
        kernel=kernel.metadata.name,
        arch=arch,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        matrix={name: count for name, count in matrix.items() if count},
        products=kind_of_products(kernel.asm["ttir"]),
    )


def kind_of_products(ttir: str) -> str:
    """What a kernel's products call for: "wide", "tensor" or nothing.

    "wide" is half precision in tiles of at least 64 rows, which every kind of tensor core takes;
    "tensor" stands for narrower tiles and TF32, which the older mma.sync may serve everywhere.
    """
    kinds = set()
    for line in ttir.splitlines():
        operand = re.search(r"tt\.dot .*? : tensor<(\d+)x\d+x(\w+)>", line)
        if operand is None:
            continue
        rows, dtype = operand.groups()
        if dtype != "f32":
            kinds.add("wide" if int(rows) >= 64 else "tensor")
        elif "inputPrecision = tf32" in line:
            kinds.add("tensor")
    return "wide" if "wide" in kinds else "".join(kinds)


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[Report]:
    """Within the block every launch compiles for `arch` and is examined, and nothing runs."""
    report = Report("", arch)
    run = JITFunction.run
    find_row = configs.find_row

    def compile_and_examine(self, *args, warmup, **kwargs):
        report.kernels.append(examine(run(self, *args, warmup=True, **kwargs), arch))

    def find_and_note_row(shape, arch):
        row = find_row(shape, arch)
        if row is not None:
            report.rows.add((shape.kernel, shape.precision, row))
        return row

    with (
        # reset_active() would look for a real driver, and there may be none.
        mock.patch.object(driver, "_active", CompileOnlyDriver(arch)),
        mock.patch.object(JITFunction, "run", compile_and_examine),
        mock.patch.object(configs, "find_row", find_and_note_row),
        mock.patch.object(configs, "architecture", lambda device: arch),
    ):
        yield report


def complaints(compiled: Compiled) -> list[str]:
    """What is wrong with one compiled kernel."""
    arch, wrong = compiled.arch, []
    limit = configs.SHARED_MEMORY[arch]
    if compiled.shared > limit:
        wrong.append(f"needs {compiled.shared} bytes of shared memory; a block may have {limit}")
    if compiled.tensor_memory > TENSOR_MEMORY_COLUMNS:
        wrong.append(f"needs {compiled.tensor_memory} columns of tensor memory")
    if compiled.stack and arch in SPILLS_FORBIDDEN_ON:
        wrong.append(f"spills: {compiled.stack} bytes of stack a thread")
    expected = {"wide": {EXPECTED_INSTRUCTION[arch]}, "tensor": set(MATRIX_INSTRUCTIONS)}
    if compiled.products and not expected[compiled.products] & compiled.matrix.keys():
        found = ", ".join(compiled.matrix) or "none"
        wanted = " or ".join(sorted(expected[compiled.products]))
        wrong.append(f"matrix instructions: expected {wanted}, found {found}")
    return wrong


def compile_case(name: str, launch: Callable[[], None], arch: int) -> Report:
    with compile_only(arch) as report:
        report.case = name
        try:
            launch()
        except Exception as error:  # whatever a compiler raises belongs in the report
            report.error = f"{type(error).__name__}: {error}"
    return report


def uncovered_rows(reports: Iterable[Report]) -> list[str]:
    """Rows of the table that no case compiled."""
    used = {
        (kernel, report.arch, precision, row)
        for report in reports
        for kernel, precision, row in report.rows
    }
    return [
        f"{kernel}, sm_{arch}, {precision}: no case compiles {row}"
        for kernel, table in configs.TABLE.items()
        for (arch, precision), rows in table.items()
        for row in rows
        if (kernel, arch, precision, row) not in used
    ]


def snapshot_of(reports: Iterable[Report]) -> dict[str, dict[str, dict[str, int]]]:
    """Registers by case, architecture and kernel."""
    snapshot: dict[str, dict[str, dict[str, int]]] = {}
    for report in reports:
        of_case = snapshot.setdefault(report.case, {})
        of_case[f"sm_{report.arch}"] = {k.kernel: k.registers for k in report.kernels}
    return snapshot


def snapshot_differences(old: dict, new: dict, tolerance: int = REGISTER_TOLERANCE) -> list[str]:
    """Where two snapshots name different kernels, or registers further apart than the tolerance."""

    def flat(snapshot: dict) -> dict[tuple[str, str, str], int]:
        return {
            (case, arch, kernel): registers
            for case, archs in snapshot.items()
            for arch, kernels in archs.items()
            for kernel, registers in kernels.items()
        }

    before, now = flat(old), flat(new)
    wrong = [f"{key}: not in the snapshot" for key in now.keys() - before.keys()]
    wrong += [f"{key}: in the snapshot, but not compiled" for key in before.keys() - now.keys()]
    wrong += [
        f"{key}: {now[key]} registers, {before[key]} in the snapshot"
        for key in now.keys() & before.keys()
        if abs(now[key] - before[key]) > tolerance
    ]
    return sorted(wrong)


def _compile_by_name(task: tuple[str, int]) -> Report:
    from tools.compile_cases import CASES

    name, arch = task
    return compile_case(name, CASES[name].launch, arch)


def compile_all(processes: int = 2) -> Iterator[Report]:
    """Reports of every case on every architecture, in order."""
    from tools.compile_cases import CASES

    tasks = [(name, arch) for name, case in CASES.items() for arch in case.archs]
    # Forking would copy the threads of torch; a fresh process costs two seconds.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_by_name, tasks)


def check(reports: list[Report], update: bool = False) -> list[str]:
    """Everything that is wrong with the reports; writes the snapshot instead of comparing it."""
    wrong = [f"{r.case}, sm_{r.arch}: {r.error}" for r in reports if r.error]
    wrong += [
        f"{report.case}, sm_{report.arch}, {compiled.kernel}: {complaint}"
        for report in reports
        for compiled in report.kernels
        for complaint in complaints(compiled)
    ]
    wrong += uncovered_rows(reports)
    file = SNAPSHOTS / f"registers-triton-{triton.__version__}.json"
    snapshot = snapshot_of(reports)
    if update:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(snapshot, indent=1, sort_keys=True) + "\n")
    elif file.exists():
        wrong += snapshot_differences(json.loads(file.read_text()), snapshot)
    else:
        print(f"no snapshot of registers for Triton {triton.__version__}; --update makes one")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the register snapshot")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    reports = []
    print(f"{'case':44} {'arch':6} {'kernel':40} registers stack shared matrix instructions")
    for report in compile_all():
        reports.append(report)
        for k in report.kernels:
            matrix = " ".join(f"{count} {name}" for name, count in k.matrix.items()) or "none"
            print(
                f"{report.case:44} sm_{k.arch:<3} {k.kernel:40} {k.registers:9} {k.stack:5} "
                f"{k.shared:6} {matrix}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(k) for r in reports for k in r.kernels]))
    wrong = check(reports, options.update)
    print("\n".join(["", *wrong, f"{len(reports)} compilations, {len(wrong)} complaints"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
