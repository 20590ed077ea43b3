"""Imports run one way, with no circle, and the core loads neither Triton nor torch.compile."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vlmfast.families import FAMILIES

ROOT = Path(__file__).parent.parent

# Each imports of those before it, and of itself. None is the facade, which imports on first use.
ORDER = (
    "vlmfast.reference",
    "vlmfast.families",
    "vlmfast.kernels",
    "vlmfast.ops",
    "vlmfast.checks",
    "vlmfast.backends",
    "vlmfast.dispatch",
    "vlmfast.contrastive_statistics",
    "vlmfast.distributed",
    "vlmfast.functional",
    "vlmfast.kept",
    "vlmfast.parts",
    "vlmfast.nn",
    "vlmfast.integrations",
    "vlmfast.verify",
    "vlmfast._torchvision_ops",
    "vlmfast.tables",
    "vlmfast.demo",
    "vlmfast.profile",
    "vlmfast.__main__",
)


def module_names() -> dict[str, Path]:
    """Every module of the package, with its file; those of kernels/ as they are imported."""
    found = {}
    for folder, package in (("vlmfast", "vlmfast"), ("kernels", "vlmfast.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = module_names()


def imports_of(name: str, source: str) -> set[str]:
    """The modules of the package that a module imports, in functions, too, and by their names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args:
            found |= imported_by_name(node)
    # A package is imported before what is in it, but those within it are there already.
    found |= {parent for module in found for parent in parents(module)}
    return {module for module in found & MODULES.keys() if module not in {name, *parents(name)}}


def imported_by_name(call: ast.Call) -> set[str]:
    """What `import_module` and `rows` import: all that a pattern may name."""
    function = getattr(call.func, "attr", getattr(call.func, "id", ""))
    first = call.args[0]
    if function == "rows" and isinstance(first, ast.Constant):
        return {f"{first.value}.{family}" for family in FAMILIES}
    if function == "import_module" and isinstance(first, ast.JoinedStr):
        start = first.values[0]
        if isinstance(start, ast.Constant):
            return {module for module in MODULES if module.startswith(start.value)}
    return set()


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def place(module: str) -> int:
    return ORDER.index(".".join(module.split(".")[:2]))


IMPORTS = {
    name: imports_of(name, path.read_text()) for name, path in MODULES.items() if name != "vlmfast"
}


def test_every_module_has_a_place():
    for module in IMPORTS:
        assert ".".join(module.split(".")[:2]) in ORDER, module
    assert {"vlmfast.kernels.common", "vlmfast.ops.common"} <= IMPORTS.keys()


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_run_one_way(module):
    against = [other for other in IMPORTS[module] if place(other) > place(module)]
    assert not against, f"{module} imports {against}"


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_what_is_imported_is_found():
    assert "vlmfast.kernels.flash_attention.forward" in IMPORTS["vlmfast.ops.common"]
    assert "vlmfast.distributed.join" in IMPORTS["vlmfast.functional.contrastive_loss"]
    assert "vlmfast.backends.flash_attention" in IMPORTS["vlmfast.backends.selection"]
    assert "vlmfast.distributed" in imports_of("vlmfast.ops.common", "import vlmfast.distributed")
    later = "def f():\n    from vlmfast.nn import cross_attention"
    assert imports_of("vlmfast.ops.common", later) == {"vlmfast.nn", "vlmfast.nn.cross_attention"}


@pytest.mark.parametrize("module", [name for name in MODULES if "kernels" not in name])
def test_nothing_names_the_benchmarks_or_tests(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] not in ("bench", "tests", "tools"), name


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["triton", "torch._dynamo", "sympy", "torch.utils.flop_counter"])
def test_the_core_does_not_load(module):
    code = "import sys, vlmfast.functional, vlmfast.nn; print({!r} in sys.modules)"
    assert run(code.format(module)) == "False\n"


COUNT = """
from torch.utils.flop_counter import FlopCounterMode
import torch
import vlmfast.functional as VF
x = torch.randn(1, 2, 5, 8)
with FlopCounterMode(display=False) as counter:
    VF.scaled_dot_product_attention(x, x, x)
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("first", ["vlmfast.functional", "torch.utils.flop_counter", "torch"])
def test_operations_are_counted_whichever_is_imported_first(first):
    assert run(f"import {first}\n{COUNT}") == f"{2 * 2 * 2 * 5 * 5 * 8}\n"


def test_looking_for_the_counter_does_not_keep_it_from_counting():
    look = "import importlib.util, vlmfast.functional"
    look += "; assert importlib.util.find_spec('torch.utils.flop_counter')"
    assert run(f"{look}\n{COUNT}") == run(f"import torch\n{COUNT}")
