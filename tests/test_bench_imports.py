"""Imports of bench/ run one way, and nothing that is shipped knows of it."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("flash_attention", "window_attention", "cross_attention", "contrastive_loss")
GPU = (
    *("__init__", "records", "plan", "children", "bias", "cases", "no_card", "launches"),
    *("trips", "assembly", "predict"),
    *("ahead", "numbers", "memcheck", "trials", "goals", "search", "host", "peers", "ncu"),
    *("pytest_plugin", "tests", "__main__"),
)
# Each module imports only what stands before it.
ORDER = (
    "__init__",
    *("measure", "contestant", "common", "family"),
    *(f"{row}.{x}" for row in FAMILIES for x in ("cases", "peers", "calls", "__init__")),
    *(f"modules.{x}" for x in ("cases", "peers", "build", "calls", "__init__")),
    *("families", "results", "tables", "html", "report"),
    *("contest", "memory", "compare", "profile", "host", "__main__"),
    *(f"gpu.{x}" for x in GPU),
    *("conftest", "test_families"),
)


def modules() -> dict[str, str]:
    """The source of each module of bench/, by its name there."""
    folder = ROOT / "bench"
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return {".".join(x.with_suffix("").parts): (folder / x).read_text() for x in paths}


def imported(source: str) -> Iterator[str]:
    """Every module that the source imports, anywhere in it; of `from a import b` also a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def edges(name: str, source: str) -> Iterator[str]:
    """The modules of bench/ that one of them imports; a folder is imported with what is in it."""
    for target in imported(source):
        top, _, target = target.partition(".")
        if top == "bench":
            row = target.partition(".")[0]
            if f"{row}.__init__" in ORDER and row != name.partition(".")[0]:
                yield f"{row}.__init__"
            if target in ORDER:
                yield target


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(ORDER)


def test_imports_run_one_way() -> None:
    for name, source in modules().items():
        above = {x for x in edges(name, source) if ORDER.index(x) >= ORDER.index(name)}
        assert not above, f"bench/{name} imports {above}"


def test_no_family_imports_another() -> None:
    for name, source in modules().items():
        family = name.partition(".")[0]
        if family in FAMILIES:
            rows = {x.partition(".")[0] for x in edges(name, source)} & {*FAMILIES, "modules"}
            assert rows <= {family}, f"bench/{name} imports {rows}"


def test_the_report_stands_on_its_page_its_tables_and_the_results() -> None:
    chain = ("report", "html", "tables", "results")
    found = {name: set(edges(name, modules()[name])) for name in chain}
    for upper, lower in itertools.pairwise(chain):
        assert lower in found[upper]


@pytest.mark.parametrize(
    ("name", "source", "edge"),
    [
        ("tables", "def f():\n    from bench.html import page", "html"),
        ("results", "import bench.tables", "tables"),
        ("measure", "from bench import contest", "contest"),
        ("common", "from bench.modules.calls import work", "modules.__init__"),
    ],
)
def test_an_import_that_runs_the_other_way_is_seen(name: str, source: str, edge: str) -> None:
    assert edge in edges(name, source)
    assert ORDER.index(edge) > ORDER.index(name)


def test_nothing_that_is_shipped_knows_of_bench() -> None:
    shipped = [*(ROOT / "vlmfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(shipped) > 20
    for path in shipped:
        assert not [x for x in imported(path.read_text()) if x.partition(".")[0] == "bench"]
    for path in [*shipped, *(x for x in (ROOT / "csrc").rglob("*") if x.suffix in (".cpp", ".h"))]:
        assert not re.search(r"\bbench\b", path.read_text()), path
