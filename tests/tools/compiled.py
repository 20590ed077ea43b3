"""What a compiled Triton kernel is made of, as its representations tell.

Of every kernel: registers, spills, shared memory, and how its matrix products are computed. Of one
for sm_90 also what its machine code spends time on that it need not: see `Compiled`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from triton.compiler import CompiledKernel

from bench.gpu.assembly import blocks_of_sm, run_on, usage

# How matrix products are computed, as it shows in PTX. "fma", without tensor cores, shows in the
# layout of the result in Triton's own representation.
INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
}
FMA_PRODUCT = r"tt\.dot .*-> tensor<[^>]*#blocked"
ROWS_OF_WIDE_PRODUCTS = 64  # the least that wgmma and tcgen05 take; narrower ones are mma.sync's

MACHINE_CODE_OF = (90,)
SERIALISED = "C7515"  # ptxas's number for wgmma that wait for one another

WIDEST_ACCESS = 16  # bytes that a thread loads or stores at once


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel.

    Attributes:
        products: kinds of matrix products that its source asks for: "wide" and "narrow" in half
            precision, "tf32", "ieee".
        instructions: kinds of instruction that compute them.
        repeats: how often a product is computed: more than once where warps outnumber the rows and
            columns of a tile, so that some do the work of others.
        narrow: tiles of half precision that threads load or store by less than 16 bytes.
        matrix, waits: matrix instructions in the machine code, and those that wait for them.
        serialised: whether each of them waits for the one before, as the assembler says.
        short_copies: asynchronous copies of four bytes to shared memory.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    products: frozenset[str]
    instructions: frozenset[str]
    repeats: int
    narrow: int
    matrix: int = 0
    waits: int = 0
    serialised: bool = False
    short_copies: int = 0

    @property
    def blocks(self) -> int:
        """How many fit an SM of sm_90 at a time."""
        return blocks_of_sm(self.registers, self.shared, self.warps)


def examine(kernel: CompiledKernel, arch: int) -> Compiled:
    taken = usage(kernel.asm["cubin"])
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    found = {name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)}
    if re.search(FMA_PRODUCT, ttgir):
        found.add("fma")
    return Compiled(
        kernel=kernel.metadata.name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=taken.registers,
        stack=taken.stack,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        products=frozenset(kinds_of_products(kernel.asm["ttir"])),
        instructions=frozenset(found),
        repeats=max(repeats_of_products(ttgir), default=1),
        narrow=sum(1 for _ in narrow_tiles(ttgir, kernel.metadata.num_warps)),
        **(_machine_code(kernel, arch) if arch in MACHINE_CODE_OF else {}),
    )


def _machine_code(kernel: CompiledKernel, arch: int) -> dict[str, int | bool]:
    sass = run_on(kernel.asm["cubin"], "cuobjdump", "--dump-sass")
    options = ("--verbose", f"--gpu-name=sm_{arch}a", "--output-file=/dev/null")
    assembler = run_on(kernel.asm["ptx"].encode(), "ptxas", *options)
    return {
        "matrix": len(re.findall(r"\b(?:HGMMA|QGMMA|HMMA)\.", sass)),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),
        "serialised": SERIALISED in assembler,
        "short_copies": len(re.findall(r"\bLDGSTS\.E(?!\S*\.(?:64|128)\b)", sass)),
    }


def kinds_of_products(ttir: str) -> Iterator[str]:
    for rest, rows, dtype in re.findall(r"tt\.dot (.*?) : tensor<(\d+)x\d+x(\w+)>", ttir):
        if dtype != "f32":
            yield "wide" if int(rows) >= ROWS_OF_WIDE_PRODUCTS else "narrow"
        else:
            yield "tf32" if "inputPrecision = tf32" in rest else "ieee"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def repeats_of_products(ttgir: str) -> Iterator[int]:
    """Of each product, how many warps compute the same part of it.

    A warp computes tiles of `instrShape` of the result; warps beyond those that the result has are
    handed tiles again, from the first.
    """
    layouts = {
        name: (_numbers(warps), _numbers(shape))
        for name, warps, shape in re.findall(
            r"(#mma\d*) = #ttg\.nvidia_mma<{.*?warpsPerCTA = \[([\d, ]+)\], "
            r"instrShape = \[([\d, ]+)\]",
            ttgir,
        )
    }
    dots = r"(?:warp_group_dot|tt\.dot) .*-> tensor<(\d+)x(\d+)xf32, (#mma\d*)>"
    for rows, columns, name in re.findall(dots, ttgir):
        warps, shape = layouts[name]
        yield max(1, warps[0] * shape[0] // int(rows)) * max(1, warps[1] * shape[1] // int(columns))


def narrow_tiles(ttgir: str, warps: int) -> Iterator[str]:
    """Two-dimensional tiles of half precision that threads move by fewer bytes than they could.

    That is 16 at once, or a thread's whole share of a small tile.
    """
    blocked = r"(#blocked\d*) = #ttg\.blocked<{sizePerThread = \[([\d, ]+)\],.*? order = \[(\d)"
    widths = {
        name: _numbers(sizes)[int(fastest)] for name, sizes, fastest in re.findall(blocked, ttgir)
    }
    access = r"(?:tt\.load|tt\.store|async_copy_global_to_local) .*?"
    tile = r"(tensor<(\d+)x(\d+)x!tt\.ptr<b?f16>, ([^>]+)>)"
    for text, rows, columns, layout in re.findall(access + tile, ttgir):
        share = 2 * int(rows) * int(columns) // (32 * warps)
        width = 2 * widths.get(layout, 2)  # the layout of a product has two neighbours a thread
        if width < min(WIDEST_ACCESS, share):
            yield text
