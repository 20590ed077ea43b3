"""Peak memory of calls: each contest in the life of a process that does nothing else.

As a command, reads contests as JSON lists [family, case, dtype, mode, device], one a line, and
prints the bytes of each contestant, one JSON object a line. Inputs are made and results are dropped
outside of what is counted; what a contestant keeps between calls is counted, in its first call.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.cases import CASES, SWEEPS
from bench.contest import Contest

_ROOT = Path(__file__).resolve().parent.parent


def peak_bytes(contests: Sequence[Contest]) -> Iterator[dict[str, int]]:
    """What the call of each contestant of a contest adds at its peak, by contestant.

    On a GPU by the allocator's statistics, on Linux by the resident set of a fresh process. Empty
    where the system tells neither.
    """
    on_cpu = any(contest.device == "cpu" for contest in contests)
    if on_cpu and not Path("/proc/self/clear_refs").exists():
        yield from ({} for _ in contests)
        return
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.memory"],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        for contest in contests:
            line = json.dumps(
                [contest.family, contest.case.name, contest.dtype, contest.mode, contest.device]
            )
            print(line, file=child.stdin, flush=True)
            answer = child.stdout.readline()
            if not answer:
                raise RuntimeError(f"the process that measures memory ended in {contest}")
            yield json.loads(answer)
        child.stdin.close()


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status tells no {field}")


def _peak(call: Callable[[], object], device: str) -> int:
    """Bytes that a call adds at its peak; the results of the call included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)  # so that memory freed earlier is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS:")
    call()
    return max(0, _resident("VmHWM:") - before)


def _find(family: str, name: str, dtype: str, mode: str, device: str) -> Contest:
    sweep = [case for _, case in SWEEPS[family].cases] if family in SWEEPS else []
    case = next(case for case in (*CASES[family], *sweep) if case.name == name)
    return Contest(family, case, dtype, mode, device)


def _measure(contest: Contest) -> dict[str, int]:
    dtype = getattr(torch, contest.dtype)
    inputs = contest.page.make_inputs(contest.case, dtype, contest.mode, device=contest.device)
    found = {}
    for contestant in contest.contestants:
        if contestant.refusal(contest.case, dtype) is None:
            call = contest.page.make_call(contestant.prepare(contest.case), inputs, contest.mode)
            found[contestant.name] = _peak(call, contest.device)
    return found


def main() -> None:
    """Answers contest by contest until the input ends."""
    # Libraries map their code and their threads' stacks when they first compute.
    torch.nn.functional.scaled_dot_product_attention(*torch.rand(3, 1, 1, 64, 64)).exp()
    for line in sys.stdin:
        print(json.dumps(_measure(_find(*json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
