"""`python -m vlmfast verify`: every kernel that this machine can run against float64."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from vlmfast import backends
from vlmfast.families import rows
from vlmfast.verify.common import Case, Measurement, cpu_isa, measure

CASES: dict[str, list[Case]] = {family: row.CASES for family, row in rows("vlmfast.verify").items()}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _variants(family: str) -> Iterator[tuple[str, str, str | None]]:
    """(device, backend, instruction set) of every kernel of a family that this machine can run."""
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for backend, reasons in backends.refusals(family, device).items():
            if reasons or backend == "reference":
                continue
            if backend == "cpu":
                for isa in torch.ops.vlmfast.cpu_isas().split(","):
                    yield device, backend, isa
            else:
                yield device, backend, None


def _line(name: str, measurements: Sequence[Measurement]) -> str:
    """One case: the tensor that comes closest to its budget, or exceeds it most."""
    worst = max(measurements, key=lambda m: m.error / m.budget)
    verdict = "ok" if all(m.passed for m in measurements) else "FAILED"
    failed = [m.tensor for m in measurements if not m.passed]
    note = f"  {', '.join(failed)}" if failed else ""
    return (
        f"  {name:30} {worst.tensor:15} {worst.error:9.2e} {worst.torch_error:9.2e} "
        f"{worst.budget:9.2e}  {verdict}{note}"
    )


def main(first_seed: int | None = None) -> int:
    """Measures everything and prints a table; returns the number of cases that failed.

    Args:
        first_seed: of the random inputs; None draws one, which is printed.
    """
    if first_seed is None:
        first_seed = int.from_bytes(os.urandom(3), "little")
    print(f"inputs from seed {first_seed}; each line shows the tensor nearest to its budget,")
    print("forward or gradient: error against float64 of ours, of torch, and what is allowed")
    failures = measured = 0
    for family, cases in CASES.items():
        for device, backend, isa in _variants(family):
            for dtype in DTYPES:
                variant = f"{backend} {isa}" if isa else backend
                print(f"{family}, {variant}, {str(dtype).removeprefix('torch.')}, {device} tensors")
                for case in cases:
                    with cpu_isa(isa) if isa else nullcontext():
                        result = measure(case, backend, dtype, device, first_seed)
                    print(_line(case.name, result), flush=True)
                    failures += not all(m.passed for m in result)
                    measured += 1
    if measured == 0:
        print("no kernel is usable here: see python -m vlmfast info", file=sys.stderr)
        return 1
    print(f"{measured - failures} of {measured} cases keep their budget")
    return failures
