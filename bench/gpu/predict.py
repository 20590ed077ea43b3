"""How long kernels should take, from their machine code: python -m bench predict [GOAL ...].

For each kernel of a goal, compiled for sm_90 without a GPU: what its programs issue, how often
their loops run, and the time that each part of the GPU would take alone, at the rates of a named
one: memory, if every tensor moved once; matrix products, padding and repeats included;
exponentials; and issuing instructions, where one behind a branch that is not taken counts, too.
The longest is the prediction: what is missed by more than a fifth is a question.

Every part is shared by the programs of a multiprocessor, and the busiest one decides. Kernels
whose loops hang on data (which token sees which image) are named and not predicted.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.gpu import assembly, records, trips
from bench.gpu.assembly import Pass
from bench.gpu.cases import GOALS, MODES, SMALL, Goal
from bench.gpu.no_card import Started, compile_only
from vlmfast.tables import markdown_table

ARCHITECTURE = 90
SAMPLES = 48  # programs whose loops are counted: others do as much
ALL = "all"  # kernels of a call


@dataclass(frozen=True)
class Card:
    """Rates of a GPU, a second, measured, and of each of its multiprocessors, a cycle."""

    name: str = "H200"
    multiprocessors: int = 132
    hertz: float = 1.75e9
    bytes: float = 4.3e12
    flops: float = 790e12  # bfloat16, by wgmma
    issued: int = 4  # instructions of a warp
    exponentials: int = 16


H200 = Card()


@dataclass(frozen=True)
class Prediction:
    """Of one kernel of a call, or of all.

    Attributes:
        launches: how often the call starts it.
        blocks: how many fit a multiprocessor.
        waves: programs over those that run at a time.
        memory, products, exponentials, issue: microseconds of each alone, all launches together.
        unknown: why nothing but memory is known, or "".
    """

    kernel: str
    launches: int
    programs: int = 0
    blocks: int = 0
    waves: float = 0.0
    memory: float = 0.0
    products: float = 0.0
    exponentials: float = 0.0
    issue: float = 0.0
    unknown: str = ""

    @property
    def parts(self) -> dict[str, float]:
        names = ("memory", "products", "exponentials", "issue")
        return {name: getattr(self, name) for name in names}

    @property
    def binding(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def microseconds(self) -> float:
        return max(self.parts.values())


def predictions(goal: Goal, mode: str, card: Card = H200) -> list[Prediction]:
    """One for each kernel that our call of a goal starts."""
    with compile_only(ARCHITECTURE, card.multiprocessors) as started:
        goal.our_call(mode, "meta")()
    kernels: dict[str, list[Started]] = {}
    for one in started:
        kernels.setdefault(one.name, []).append(one)
    return [_predicted(name, ones, card) for name, ones in kernels.items()]


def _predicted(name: str, ones: Sequence[Started], card: Card) -> Prediction:
    each = [_of_one(one, card) for one in ones]
    sums = {part: sum(one.parts[part] for one in each) for part in each[0].parts}
    return replace(each[0], launches=len(ones), **sums)


def _of_one(one: Started, card: Card) -> Prediction:
    kernel, programs = one.compiled, one.programs
    warps = kernel.metadata.num_warps
    registers = assembly.usage(kernel.asm["cubin"]).registers
    blocks = assembly.blocks_of_sm(registers, kernel.metadata.shared, warps)
    unknown, executed = "", Pass()
    try:
        executed = _executed(one)
    except trips.DataDependent:
        unknown = "loops hang on data"
    except ValueError as error:
        unknown = str(error)
    # Of the busiest multiprocessor, in units of what one warp of each program issues.
    share = warps * math.ceil(programs / card.multiprocessors)
    cycles_to_us = 1e6 / card.hertz
    flops_a_cycle = card.flops / card.multiprocessors / card.hertz
    return Prediction(
        one.name,
        1,
        programs,
        blocks,
        programs / (card.multiprocessors * blocks),
        unknown=unknown,
        memory=1e6 * bytes_of(one.tensors) / card.bytes,
        products=share * executed.flops / flops_a_cycle * cycles_to_us,
        exponentials=share * executed.exponentials * 32 / card.exponentials * cycles_to_us,
        issue=share * executed.instructions / card.issued * cycles_to_us,
    )


def _executed(one: Started) -> Pass:
    """What a warp of an average program issues."""
    code = assembly.instructions(one.compiled.asm["cubin"])
    found = assembly.loops(code)
    outside, *inside = assembly.passes(code, found)
    program = trips.parse(one.compiled.asm["ttir"])
    numbers = range(program.loops) if len(found) == program.loops else program.varying
    if len(found) != len(numbers):
        raise ValueError(f"{len(found)} loops in its machine code, {len(numbers)} in its source")
    sampled = sorted({i * one.programs // SAMPLES for i in range(SAMPLES)})
    turns = [trips.trips(program, one.scalars(program.parameters), index) for index in sampled]
    total = [outside, *inside]
    often = [1.0, *(sum(turn[i] for turn in turns) / len(turns) for i in numbers)]
    return Pass(
        *(
            sum(n * getattr(part, name) for n, part in zip(often, total, strict=True))
            for name in ("instructions", "exponentials", "flops")
        )
    )


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of the elements of tensors, each once however often it is repeated by a stride of 0."""
    return sum(
        x.element_size()
        * math.prod(n if s else 1 for n, s in zip(x.shape, x.stride(), strict=True))
        for x in tensors
        if x.numel()
    )


def microseconds(found: Sequence[Prediction]) -> float | None:
    """Of kernels that follow each other, each limited by what binds it."""
    if any(one.unknown for one in found):
        return None
    return sum(one.microseconds for one in found)


def table(goal: Goal, mode: str, found: Sequence[Prediction]) -> str:
    """In Markdown."""
    header = ["kernel", "launches", "programs", "blocks an SM", "waves"]
    header += ["memory", "products", "exponentials", "issue", "predicted, us", "binding"]
    rows = [list(_row(one)) for one in found]
    total = microseconds(found)
    rows.append([ALL, *[""] * 8, "" if total is None else f"{total:.1f}", ""])
    return f"## {goal.name}: {goal.case.shape}, {mode}\n\n{markdown_table(header, rows)}\n"


def _row(one: Prediction) -> Iterator[str]:
    yield one.kernel.removesuffix("_kernel")
    yield str(one.launches)
    yield from (str(one.programs), str(one.blocks), f"{one.waves:.1f}")
    if one.unknown:
        yield from (f"{one.memory:.1f}", "", "", "", "", one.unknown)
        return
    yield from (f"{part:.1f}" for part in one.parts.values())
    yield from (f"{one.microseconds:.1f}", one.binding)


def read(folder: Path) -> dict[tuple[str, str], float]:
    """Microseconds by goal and mode, of a run of this module with --out; none if there is none."""
    file = folder / "predictions.jsonl"
    found = records.read(file) if file.exists() else ()
    return {(x["goal"], x["mode"]): x["us"] for x in found if x["us"] is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each goal and mode."""
    parser = argparse.ArgumentParser(prog="python -m bench predict", description=__doc__)
    names = {goal.name: goal for goal in (*GOALS, *SMALL)}
    parser.add_argument(
        "goals", nargs="*", choices=[[], *names], metavar="GOAL", help="default: all"
    )
    parser.add_argument("--out", type=Path, help="a folder for predictions.jsonl and .md")
    options = parser.parse_args(arguments)
    if unknown := set(options.goals) - set(names):
        parser.error(f"argument GOAL: unknown: {', '.join(sorted(unknown))}")
    print(f"Predicted, not measured, for: {json.dumps(asdict(H200))}\n")
    tables = []
    if options.out:
        (options.out / "predictions.jsonl").unlink(missing_ok=True)
    for goal in [names[name] for name in options.goals] or GOALS:
        for mode in MODES:
            found = predictions(goal, mode)
            tables.append(table(goal, mode, found))
            print(tables[-1], flush=True)
            if options.out:
                us = microseconds(found)
                record = {"goal": goal.name, "mode": mode, "us": us and round(us, 2)}
                records.append(options.out / "predictions.jsonl", record)
                records.rewrite(options.out / "predictions.md", "\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
