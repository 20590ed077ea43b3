"""Peak memory of calls: each contest in the life of a process that does nothing else.

As a command, reads contests as JSON lists [family, case, dtype, mode, device, names of
contestants], one a line, and prints the bytes of each contestant, one JSON object a line. Inputs
are made and results are dropped outside of what is counted; what a contestant keeps between calls
is counted, in its first call.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.contest import Contest
from bench.families import FAMILIES

_ROOT = Path(__file__).resolve().parent.parent


class MemoryMeter:
    """What the call of each contestant of a contest adds at its peak.

    On a GPU by the allocator's statistics, on Linux by the resident set of a fresh process. Empty
    where the system tells neither. `backend` is forced in that process.
    """

    def __init__(self, device: str, backend: str | None = None):
        self.backend = backend
        self.can_measure = device == "cuda" or Path("/proc/self/clear_refs").exists()

    def __enter__(self) -> "MemoryMeter":
        if self.can_measure:
            command = [sys.executable, "-m", "bench.memory"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            forced = {} if self.backend is None else {"VLMFAST_BACKEND": self.backend}
            environment = {**os.environ, **forced}
            self._child = subprocess.Popen(command, cwd=_ROOT, env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        if self.can_measure:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self._child.stdin.close()
            self._child.wait()
            self._child.stdout.close()

    def peak_bytes(self, contest: Contest, names: Sequence[str]) -> dict[str, int]:
        """By contestant, for those named.

        Raises RuntimeError if the process that measures ended, for want of memory perhaps; another
        one stands ready for the next contest.
        """
        if not self.can_measure:
            return {}
        asked = [contest.family, contest.case.name, contest.dtype, contest.mode, contest.device]
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([*asked, list(names)]), file=self._child.stdin, flush=True)
            answer = self._child.stdout.readline()
        if not answer:
            self.__exit__()
            self.__enter__()
            raise RuntimeError("the process that measures it ended")
        return json.loads(answer)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status tells no {field}")


def peak(call: Callable[[], object], device: str) -> int:
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
    sweep = FAMILIES[family].sweep
    swept = [case for _, case in sweep.cases] if sweep else []
    case = next(case for case in (*FAMILIES[family].cases, *swept) if case.name == name)
    return Contest(family, case, dtype, mode, device)


def _measure(contest: Contest, names: Sequence[str]) -> dict[str, int]:
    dtype = getattr(torch, contest.dtype)
    module = contest.family_calls
    inputs = module.make_inputs(contest.case, dtype, contest.mode, device=contest.device)
    found = {}
    for contestant in contest.contestants:
        if contestant.name in names:
            call = module.make_call(contestant.prepare(contest.case), inputs, contest.mode)
            found[contestant.name] = peak(call, contest.device)
    return found


def main() -> None:
    """Answers contest by contest until the input ends."""
    # Libraries map their code and their threads' stacks when they first compute, and the first
    # gradient has torch import sympy: 35 MB that would be those of the first contestant.
    sources = torch.rand(3, 1, 1, 64, 64, requires_grad=True).unbind()
    out = torch.nn.functional.scaled_dot_product_attention(*sources).exp()
    torch.autograd.grad(out, sources, torch.ones_like(out))
    for line in sys.stdin:
        *contest, names = json.loads(line)
        print(json.dumps(_measure(_find(*contest), names)), flush=True)


if __name__ == "__main__":
    main()
