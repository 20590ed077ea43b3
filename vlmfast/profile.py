"""Where the time of a model or of one kernel goes, and how far it is from the machine's limits.

A target is a row of the demo, by any part of its name; a model of timm, as vit_base_patch16_224;
or a case of the benchmarks, as clip-text. Cases and the machine's limits are told by the command of
this name that a checkout has besides (see README).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.cuda import nvtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
from vlmfast.ops.common import EXTENSION_ERROR
from vlmfast.tables import markdown_table, milliseconds

__all__ = ["main", "ncu_command", "read_ncu"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COSTLIEST = 10
COUNTERS = "cycles,instructions,cache-references,cache-misses,branch-misses"

# What ncu measures of a kernel, and what the table calls it.
NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "dram__bytes.sum": "DRAM bytes",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared memory",
}


@dataclass(frozen=True)
class Target:
    """What is profiled; one step is one call of `run`.

    flops: of a step.
    least_bytes: that a step must move: of a model its parameters and inputs.
    """

    name: str
    run: Callable[[], object]
    dtype: str
    flops: int
    least_bytes: int


class Ceilings(Protocol):
    """What the machine can do: operations a second, by dtype, and bytes a second."""

    flops: Mapping[str, float]
    bandwidth: float


FindCase = Callable[[argparse.Namespace, str], Iterator[Target]]  # of options and a device
MeasureCeilings = Callable[[Sequence[str], str], Ceilings]  # of dtypes and a device


@dataclass(frozen=True)
class Findings:
    """One profiled target: seconds a step, its costliest operators."""

    target: Target
    seconds: float
    operators: list[tuple[str, float, int]]  # name, seconds a step by itself, calls a step
    trace: Path


def main(
    arguments: Sequence[str] | None = None,
    module: str = "vlmfast",
    find_case: FindCase | None = None,
    measure_ceilings: MeasureCeilings | None = None,
) -> int:
    """Profiles, prints tables, writes traces; returns 0.

    Args:
        arguments: of the command line.
        module: whose command this is, `python -m <module> profile`.
        find_case: the targets that one names who names no model; it may raise SystemExit.
        measure_ceilings: what the machine can do; None: no share of it is told.
    """
    parser = _parser(module)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    if options.ncu_report:
        try:
            table = read_ncu(options.ncu_report.read_text().splitlines())
        except (OSError, ValueError) as error:
            parser.error(f"argument --ncu-report: {options.ncu_report}: {error}")
        print(markdown_table(*table))
        return 0
    if options.target is None:
        parser.error("the following arguments are required: TARGET")
    targets = list(_targets(options, find_case))
    if options.no_trace:
        _run_alone(targets, options.steps)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    found = [_measure(target, options) for target in targets]
    print("\n".join(_report(found, measure_ceilings)))
    if torch.cuda.is_available():
        print(_ncu_command(module, options))
        print(f"then: python -m {module} profile --ncu-report ncu.csv")
    print("open a trace at https://ui.perfetto.dev")
    if sys.platform == "linux":
        for target in targets:
            print(f"\n{target.name}\n{_counters(target.run, options.steps)}")
    return 0


def _parser(module: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {module} profile", description=__doc__)
    parser.add_argument("target", nargs="?", metavar="TARGET")
    parser.add_argument(
        "--patched", action="store_true", help="also after vlmfast.patch, and both side by side"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--mode", choices=("fwd", "bwd", "fwd+bwd"), default="fwd", help="of a case"
    )
    parser.add_argument("--batch", type=int, default=8, help="of a timm model (default: 8)")
    parser.add_argument("--steps", type=int, default=5, help="profiled (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("out/profile"), help="for the traces")
    parser.add_argument(
        "--no-trace",
        action="store_true",
        help="run the steps alone, between cudaProfilerStart and Stop, as ncu wants it",
    )
    parser.add_argument(
        "--ncu-report",
        type=Path,
        help="print the table of a CSV that the ncu command below a profile on CUDA has written",
    )
    return parser


def _targets(options: argparse.Namespace, find_case: FindCase | None) -> Iterator[Target]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = _find_model(options, device)
    if found is None:
        if find_case is None:
            raise SystemExit(f"no model is called {options.target!r}; for cases see README")
        yield from find_case(options, device)
        return
    model, inputs, run, dtype = found
    given = inputs.values() if isinstance(inputs, dict) else (inputs,)
    read = sum(x.nbytes for x in (*model.parameters(), *given))
    flops = _count_flops(lambda: run(model, inputs))
    yield Target("before", lambda: run(model, inputs), dtype, flops, read)
    if options.patched:
        patched = copy.deepcopy(model)
        print(vlmfast.patch(patched))
        yield Target("after", lambda: run(patched, inputs), dtype, flops, read)


def _count_flops(run: Callable[[], object]) -> int:
    """Of torch's attention by its plain formula: the counter does not know all of its kernels."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _find_model(
    options: argparse.Namespace, device: str
) -> tuple[nn.Module, Any, Callable[[Any, Any], object], str] | None:
    """A row of the demo, or a model of timm; None if the name is neither."""
    try:
        from vlmfast import demo
    except ModuleNotFoundError as error:
        print(f"without {error.name} there are no models to profile, only cases", file=sys.stderr)
        return None
    for subject in demo.SUBJECTS:
        if options.target in subject.name:
            torch.manual_seed(0)
            inputs = {
                name: (x.to(subject.dtype) if x.is_floating_point() else x).to(device)
                for name, x in subject.inputs(False).items()
            }
            model = subject.model(patched=False, quick=False).to(device)
            return model, inputs, subject.run, str(subject.dtype).removeprefix("torch.")
    import timm

    if not timm.is_model(options.target):
        return None
    torch.manual_seed(0)
    model = timm.create_model(options.target, pretrained=False).eval()
    shape = (options.batch, *model.default_cfg["input_size"])
    dtype = DTYPES[options.dtype]

    def run(model: nn.Module, x: torch.Tensor) -> object:
        with torch.inference_mode():
            return model(x)

    return (
        model.to(device, dtype),
        torch.randn(shape, dtype=dtype, device=device),
        run,
        options.dtype,
    )


def _measure(target: Target, options: argparse.Namespace) -> Findings:
    on_gpu = torch.cuda.is_available()
    for _ in range(2):
        target.run()
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        target.run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        _steps(target, options.steps)
    trace = options.out / f"{_file_name(options.target)}-{_file_name(target.name)}.json"
    profiler.export_chrome_trace(str(trace))
    operators = [
        (
            event.key,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            / (1e6 * options.steps),
            event.count // options.steps,
        )
        for event in profiler.key_averages()
    ]
    operators.sort(key=lambda operator: operator[1], reverse=True)
    return Findings(target, statistics.median(times), operators, trace)


def _steps(target: Target, count: int) -> None:
    """On a GPU each step is an NVTX range."""
    for step in range(count):
        with contextlib.ExitStack() as ranges:
            if torch.cuda.is_available():
                ranges.enter_context(nvtx.range(f"vlmfast {target.name} step {step}"))
            target.run()


def _run_alone(targets: Sequence[Target], steps: int) -> None:
    """On a GPU a profiler sees nothing but the steps: what is compiled and checked comes before."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        for target in targets:
            target.run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for target in targets:
        _steps(target, steps)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _file_name(text: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in text).strip("-")


def _report(found: Sequence[Findings], measure_ceilings: MeasureCeilings | None) -> Iterator[str]:
    ceilings = None
    if measure_ceilings is None:
        yield "shares of the machine's ceilings: see README"
    else:
        dtypes = list(dict.fromkeys(f.target.dtype for f in found))
        ceilings = measure_ceilings(dtypes, "cuda" if torch.cuda.is_available() else "cpu")
    body = []
    for f in found:
        rate = f.target.flops / f.seconds
        line = [
            f.target.name,
            milliseconds(f.seconds),
            f"{f.target.flops / 1e9:.3g}",
            f"{rate / 1e9:.0f}",
        ]
        line.append(f"{rate / ceilings.flops[f.target.dtype]:.0%}" if ceilings else "")
        moved = f.target.least_bytes / f.seconds
        line += [f"{moved / 1e9:.1f}", f"{moved / ceilings.bandwidth:.0%}" if ceilings else ""]
        body.append([*line, str(f.trace)])
    header = ["", "ms a step", "GFLOP", "GFLOP/s", "of ceiling", "GB/s", "of ceiling", "trace"]
    yield markdown_table(header, body)
    for f in found:
        total = sum(seconds for _, seconds, _ in f.operators)
        yield f"\nthe costliest operators, {f.target.name} (time by itself)"
        yield markdown_table(
            ["operator", "ms a step", "share", "calls"],
            [
                [name, milliseconds(seconds), f"{seconds / total:.0%}", str(calls)]
                for name, seconds, calls in f.operators[:COSTLIEST]
            ],
        )
    yield ""
    yield from _resources()


def ncu_command(report: str) -> list[str]:
    """Nsight Compute, of what a program does between cudaProfilerStart and Stop, to a CSV file.

    Clocks are left as they are.
    """
    raw = ["--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"]
    return ["ncu", *raw, "--metrics", ",".join(NCU_METRICS), "--log-file", report]


def _ncu_command(module: str, options: argparse.Namespace) -> str:
    """The same target under Nsight Compute, one step of it."""
    profiled = ["-m", module, "profile", options.target, "--steps", "1", "--no-trace"]
    profiled += ["--dtype", options.dtype, "--mode", options.mode, "--batch", str(options.batch)]
    profiled += ["--patched"] if options.patched else []
    return shlex.join([*ncu_command("ncu.csv"), "python", *profiled])


def _resources() -> Iterator[str]:
    """What the kernels that ran take: the instruction set, or registers and shared memory."""
    if EXTENSION_ERROR is None:
        yield f"CPU kernels: {torch.ops.vlmfast.cpu_isa()}, {torch.get_num_threads()} threads"
    body = list(_triton_resources())
    if body:
        yield markdown_table(
            ["Triton kernel", "registers", "spills", "shared bytes", "warps"], body
        )


def _triton_resources() -> Iterator[list[str]]:
    """A line for each Triton kernel of ours that this process has put on a GPU."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("vlmfast.kernels."):
            continue
        for kernel in vars(module).values():
            for cache in getattr(kernel, "device_caches", {}).values():
                for compiled in cache[0].values():
                    if compiled.module is None:  # on no GPU yet, which would tell its registers
                        continue
                    yield [
                        compiled.name,
                        str(compiled.n_regs),
                        str(compiled.n_spills),
                        str(compiled.metadata.shared),
                        str(compiled.metadata.num_warps),
                    ]


def _counters(run: Callable[[], object], steps: int) -> str:
    """What Linux counts of this process during some steps, or why it does not."""
    perf = shutil.which("perf")
    if perf is None:
        return "no counters: perf is not installed"
    command = [perf, "stat", "-x", ",", "-e", COUNTERS, "-p", str(os.getpid())]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)  # until it has attached itself
    for _ in range(steps):
        run()
    child.send_signal(signal.SIGINT)
    _, output = child.communicate()
    counts = {}
    for fields in csv.reader(output.splitlines()):
        if len(fields) > 2 and fields[0].isdigit():
            counts[fields[2]] = int(fields[0])
    if not counts:
        if "<not supported>" in output:
            return "no counters: this machine's processor lets perf count nothing"
        return f"no counters: {output.strip() or 'perf counted nothing'}"
    return markdown_table(
        ["counter", "a step"], [[k, f"{v / steps:.4g}"] for k, v in counts.items()]
    )


def read_ncu(lines: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table from the CSV that `ncu --csv --page raw` writes.

    The CSV has a line of names and a line of units above one line for each launch, and lines of
    ncu's own, which begin with ==, anywhere.
    """
    rows = list(csv.reader(line for line in lines if line and not line.startswith("==")))
    if len(rows) < 2 or "Kernel Name" not in rows[0]:
        raise ValueError("lines: expected what ncu --csv --page raw writes")
    names, units, *launches = rows
    columns = [names.index("Kernel Name"), *(names.index(m) for m in NCU_METRICS if m in names)]
    header = [
        " ".join(filter(None, (NCU_METRICS.get(names[c], "kernel"), units[c]))) for c in columns
    ]
    return header, [[launch[c] for c in columns] for launch in launches]
