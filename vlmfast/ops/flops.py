"""Formulas of operators' floating-point operations, for torch.utils.flop_counter.

That module loads Triton, so it is not imported for their sake. Where it is there already, formulas
are registered at once, and otherwise as soon as somebody has imported it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"

_formulas: dict[Any, Callable[..., int]] = {}


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Registers a formula, which receives the operator's arguments."""
    _formulas[operator._overloadpacket] = formula
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], operator._overloadpacket)


def _register(counter: ModuleType, operator: Any) -> None:
    counter.register_flop_formula(operator, get_raw=True)(_formulas[operator])


class _CounterFinder(MetaPathFinder):
    """Has the other finders find the counter, and registers the formulas once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                for operator in _formulas:
                    _register(module, operator)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _CounterFinder())
