"""What a family brings to the races: cases, contestants, and what makes calls of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

from bench.contestant import Contestant

INFERENCE_DTYPES = ("float32", "bfloat16")


class TimedCase(Protocol):
    """What every family's case has: a name, the model it is from, and its shape in words."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def dtypes(self) -> Sequence[str]: ...


class Sweep(NamedTuple):
    """Cases that differ in one size, to see how time and memory grow with it."""

    size: str
    cases: tuple[tuple[int, TimedCase], ...]


@dataclass(frozen=True)
class Family:
    """One row of the benchmark.

    Attributes:
        cases: what is measured.
        selection: names of the most telling ones, which `make bench` has time for.
        contestants: who computes them; the first one is ours.
        calls: a module with make_inputs, make_call, chosen_backend, reference, yardsticks, work.
        sweep: what the family's cost is drawn against.
        remark: what a reader of its table should know.
    """

    cases: Sequence[TimedCase]
    selection: Sequence[str]
    contestants: Sequence[Contestant]
    calls: ModuleType
    sweep: Sweep | None = None
    remark: str | None = None

    @property
    def selected(self) -> list[TimedCase]:
        """The cases of the selection."""
        return [case for case in self.cases if case.name in self.selection]
