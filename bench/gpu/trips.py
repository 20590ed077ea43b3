"""How often the loops of a Triton kernel run, from its code and arguments, without running it.

Bounds of loops are scalars, and scalars are few: those of Triton's own representation (TTIR) are
evaluated for one program after another, tensors are not. What hangs on loaded data is unknown.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = Any  # an int, float or bool; None: unknown
Values = dict[str, Value]

_BINARY: dict[str, Callable[[Any, Any], Value]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": lambda a, b: int(a / b) if (a < 0) != (b < 0) else a // b,
    "arith.remsi": lambda a, b: a - b * (int(a / b) if (a < 0) != (b < 0) else a // b),
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
}
_UNARY = ("arith.extsi", "arith.extui", "arith.trunci")
_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
}
_NAME = re.compile(r"%[\w#]+")


class DataDependent(ValueError):
    """How often a loop runs hangs on what is loaded."""


@dataclass
class Operation:
    """A line that computes scalars, or a block: `regions` has its body, or both branches."""

    kind: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    detail: str = ""
    regions: list[list["Operation"]] = field(default_factory=list)
    loop: int = -1  # its number, in the order of the text

    def has_loops(self) -> bool:
        inner = (operation for region in self.regions for operation in region)
        return self.loop >= 0 or any(operation.has_loops() for operation in inner)


@dataclass
class Program:
    """A kernel as parsed: its parameters, blocks of operations by label, and number of loops.

    Attributes:
        parameters: name in the text, and of the kernel's parameter that it is a part of.
        varying: numbers of the loops whose bounds are no constants: others may be unrolled.
    """

    parameters: list[tuple[str, str]]
    blocks: dict[str, list[Operation]]
    loops: int
    varying: list[int]


def parse(ttir: str) -> Program:
    """Raises ValueError where there is a loop without bounds."""
    lines = iter(ttir.splitlines())
    signature = next(line for line in lines if "tt.func public" in line)
    parameters = re.findall(r'(%\w+): [^%]*?loc\("(\w+)"', signature)
    parser = _Parser(lines)
    blocks = parser.blocks()
    every = [operation for block in blocks.values() for operation in _flat(block)]
    constants = {x.results[0] for x in every if x.kind == "arith.constant"}
    varying = [x.loop for x in every if x.loop >= 0 and not constants >= {*x.operands[1:4]}]
    return Program(parameters, blocks, parser.loops, varying)


def _flat(operations: Sequence[Operation]) -> Iterator[Operation]:
    for operation in operations:
        yield operation
        for region in operation.regions:
            yield from _flat(region)


class _Parser:
    def __init__(self, lines: Iterator[str]):
        self.lines = lines
        self.loops = 0

    def blocks(self) -> dict[str, list[Operation]]:
        found: dict[str, list[Operation]] = {}
        label = "^bb0"
        while label:
            found[label], label = self._region()
        return found

    def _region(self) -> tuple[list[Operation], str]:
        """Operations up to the end of a region or to the next label, which is then the second."""
        operations: list[Operation] = []
        for line in self.lines:
            text = line.strip()
            if text.startswith("}"):
                return operations, text[1:].strip() if text.startswith("} else") else ""
            if text.startswith("^"):
                return operations, re.split(r"[:(]", text)[0]
            if text.endswith("({"):  # what a reduction does with two elements
                for inner in self.lines:
                    if inner.strip().startswith("})"):
                        break
                continue
            if operation := self._operation(text):
                operations.append(operation)
        return operations, ""

    def _operation(self, text: str) -> Operation | None:
        results, equals, right = text.partition(" = ")
        if not equals or not results.startswith("%") or "{" in results:
            results, right = "", text
        name, _, count = results.partition(":")
        names = tuple(f"{name}#{i}" for i in range(int(count))) if count else (name,)
        kind = right.split(" ", 1)[0].split("(", 1)[0]
        operands = tuple(_NAME.findall(right.split(" loc(")[0]))
        if kind == "scf.while":
            raise ValueError("a loop without bounds")
        operation = Operation(kind, names, operands, right)
        if kind == "scf.for":
            operation.loop = self.loops
            self.loops += 1
            operation.regions.append(self._region()[0])
        elif kind == "scf.if":
            region, rest = self._region()
            operation.regions.append(region)
            operation.regions.append(self._region()[0] if rest.startswith("else") else [])
        elif "tensor<" in right:
            return None
        return operation


def trips(program: Program, arguments: Mapping[str, Value], index: int) -> list[int]:
    """For each loop, in the order of the text, how often its body runs in the program `index`.

    Args:
        program: the kernel.
        arguments: scalars, by their names in the text.
        index: tl.program_id(0).

    Raises:
        DataDependent: that hangs on what is loaded.
    """
    return _Evaluation(program, arguments, index).counts


class _Evaluation:
    def __init__(self, program: Program, arguments: Mapping[str, Value], index: int):
        self.index = index
        self.counts = [0] * program.loops
        self.values: Values = dict(arguments)
        label: str | None = "^bb0"
        while label is not None:
            label = self._run(program.blocks[label])

    def _run(self, operations: Sequence[Operation]) -> str | None:
        """Returns the label of the block that follows, if one does."""
        for operation in operations:
            if operation.kind == "cf.cond_br":
                condition = self.values.get(operation.operands[0])
                if condition is None:
                    raise DataDependent(operation.detail)
                return re.findall(r"\^bb\d+", operation.detail)[0 if condition else 1]
            if operation.kind == "cf.br":
                return re.findall(r"\^bb\d+", operation.detail)[0]
            if operation.kind == "tt.return":
                return None
            if operation.kind == "scf.for":
                self._loop(operation)
            elif operation.kind == "scf.if":
                self._branch(operation)
            else:
                self.values[operation.results[0]] = self._value(operation)
        return None

    def _loop(self, operation: Operation) -> None:
        variable, *bounds = operation.operands[:4]
        begin, end, step = (self.values.get(bound) for bound in bounds)
        if begin is None or end is None or step is None:
            raise DataDependent(operation.detail)
        turns = range(begin, end, step)
        self.counts[operation.loop] += len(turns)
        if not any(inner.has_loops() for inner in operation.regions[0]):
            return
        for name in re.findall(r"(%\w+) = ", operation.detail.partition("iter_args")[2]):
            self.values[name] = None  # carried from turn to turn
        for value in turns:
            self.values[variable] = value
            self._run(operation.regions[0])

    def _branch(self, operation: Operation) -> None:
        condition = self.values.get(operation.operands[0])
        if condition is None:
            if operation.has_loops():
                raise DataDependent(operation.detail)
            return
        taken = operation.regions[0 if condition else 1]
        self._run(taken)
        if taken and taken[-1].kind == "scf.yield":
            for name, source in zip(operation.results, taken[-1].operands, strict=False):
                self.values[name] = self.values.get(source)

    def _value(self, operation: Operation) -> Value:
        kind, detail = operation.kind, operation.detail
        if kind == "arith.constant":
            return _constant(detail)
        if kind == "tt.get_program_id":
            return self.index if " x " in f"{detail} " else None
        found = [self.values.get(name) for name in operation.operands]
        if kind == "arith.select" and found[0] is not None:
            return found[1] if found[0] else found[2]
        if not found or any(value is None for value in found):
            return None
        if kind in _BINARY:
            return _BINARY[kind](*found)
        if kind in _UNARY:
            return found[0]
        if kind == "arith.cmpi":
            comparison = _COMPARISONS.get(detail.split()[1].rstrip(","))
            return comparison(*found) if comparison else None
        return None


def _constant(detail: str) -> Value:
    text = detail.split()[1]
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else None
