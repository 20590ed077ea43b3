"""The machine code of a kernel for sm_90: what it takes of an SM, its loops, what it issues."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

# An SM of sm_90 (CUDA C++ Programming Guide, compute capabilities).
REGISTERS_OF_SM = 64 * 1024
REGISTER_UNIT = 8  # a GPU hands registers to a thread by eights; smaller changes mean nothing
SHARED_OF_SM = 228 * 1024
SHARED_RESERVED = 1024  # of each block, by the driver
WARPS_OF_SM = 64
BLOCKS_OF_SM = 32

WARPS_OF_GROUP = 4  # that issue a wgmma together

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_WGMMA = re.compile(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\.")
_MMA = re.compile(r"\bHMMA\.(\d+)\.")
_MMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


def run_on(code: bytes, tool: str, *options: str) -> str:
    """What a tool of Triton's own CUDA prints of a file with this content."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [str(path), *options, file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


class Usage(NamedTuple):
    """What a kernel takes of an SM."""

    registers: int
    stack: int


def usage(cubin: bytes) -> Usage:
    """As cuobjdump tells."""
    text = run_on(cubin, "cuobjdump", "--dump-resource-usage")
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return Usage(numbers["REG"], numbers["STACK"])


def blocks_of_sm(registers: int, shared: int, warps: int) -> int:
    """How many blocks fit an SM at a time, by registers a thread, shared bytes and warps of one."""
    registers = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32 * warps
    return min(
        REGISTERS_OF_SM // registers,
        SHARED_OF_SM // (shared + SHARED_RESERVED),
        WARPS_OF_SM // warps,
        BLOCKS_OF_SM,
    )


@dataclass(frozen=True)
class Pass:
    """What one warp issues once in a stretch of code.

    Attributes:
        instructions: all of them, those behind a branch that is not taken, too.
        exponentials: MUFU.EX2, each of 32 numbers.
        flops: of matrix products.
    """

    instructions: int = 0
    exponentials: int = 0
    flops: float = 0.0


class Loop(NamedTuple):
    """Addresses of its first instruction and of the branch back."""

    first: int
    last: int


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of each."""
    sass = run_on(cubin, "cuobjdump", "--dump-sass")
    return [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]


def loops(code: Sequence[tuple[int, str]]) -> list[Loop]:
    """In the order of their first instructions, outer before inner ones."""
    found = []
    for address, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:  # what ends a kernel branches to itself
            found.append(Loop(int(branch[1], 16), address))
    return sorted(found, key=lambda loop: (loop.first, -loop.last))


def passes(code: Sequence[tuple[int, str]], found: Sequence[Loop]) -> list[Pass]:
    """One through what no loop holds, then one through each loop without those inside it."""
    shares: list[list[str]] = [[] for _ in range(len(found) + 1)]
    for address, text in code:
        around = [i for i, loop in enumerate(found) if loop.first <= address <= loop.last]
        inmost = min(around, key=lambda i: found[i].last - found[i].first, default=-1)
        shares[inmost + 1].append(text)
    return [_sum_up(share) for share in shares]


def _sum_up(texts: Sequence[str]) -> Pass:
    return Pass(
        instructions=len(texts),
        exponentials=sum("MUFU.EX2" in text for text in texts),
        flops=sum(_flops(text) for text in texts),
    )


def _flops(text: str) -> float:
    """Of one warp's share of a matrix instruction."""
    if wide := _WGMMA.search(text):
        rows, columns, inner = map(int, wide.groups())
        return 2.0 * rows * columns * inner / WARPS_OF_GROUP
    if narrow := _MMA.search(text):
        rows, columns, inner = _MMA_SHAPES[narrow[1]]
        return 2.0 * rows * columns * inner
    return 0.0
