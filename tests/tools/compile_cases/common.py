"""What a case of the compile gate is."""

from collections.abc import Callable
from typing import NamedTuple

from vlmfast.kernels.launch import ARCHITECTURES


class CompileCase(NamedTuple):
    """A call of a family's launchers.

    Attributes:
        name: what reports and the register snapshot call it.
        launch: calls the launchers on meta tensors, just as an operator would.
        precision: of every product in its kernels, as `kernels/launch.py` names it: "half", "tf32"
            or "ieee". The gate sets torch's TF32 switch accordingly.
        archs: what it is compiled for.
    """

    name: str
    launch: Callable[[], None]
    precision: str = "half"
    archs: tuple[int, ...] = ARCHITECTURES
