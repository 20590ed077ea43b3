"""Fixtures that every family uses."""

import os

import pytest
import torch

from vlmfast.verify.common import cpu_isa as force_cpu_isa

# Triton decides between compiling and interpreting when a kernel is defined, so the two kinds of
# test need a process each: `make test` runs both.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from tools import interpreter

    interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that this process can run."""
    fits = [(item.get_closest_marker("interpreter") is not None) == INTERPRETING for item in items]
    config.hook.pytest_deselected(
        items=[item for item, fit in zip(items, fits, strict=True) if not fit]
    )
    items[:] = [item for item, fit in zip(items, fits, strict=True) if fit]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `cpu_isa` once for each instruction set of this machine."""
    if "cpu_isa" in metafunc.fixturenames:
        import vlmfast.ops.common  # noqa: F401  (loads the extension)

        isas = torch.ops.vlmfast.cpu_isas().split(",")
        metafunc.parametrize("cpu_isa", isas, indirect=True)


@pytest.fixture
def cpu_isa(request: pytest.FixtureRequest):
    """The instruction set that the CPU kernels use for the length of the test."""
    with force_cpu_isa(request.param):
        yield request.param


@pytest.fixture
def guarded():
    """Runs Triton kernels in the interpreter under guards (tools.guard)."""
    from tools.guard import guarded

    with guarded(seed=3):
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts torch's generator at the same place."""
    torch.manual_seed(0)


@pytest.fixture
def nan_in_new_memory():
    """Lets torch.empty and its like return NaN, so that an element left unwritten shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
