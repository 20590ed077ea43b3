"""Fixtures that every family uses."""

import ctypes
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
    """Runs a test that asks for `cpu_isa` once for each instruction set of this machine, or for
    the one that the environment forces."""
    if "cpu_isa" in metafunc.fixturenames:
        import vlmfast.ops.common  # noqa: F401  (loads the extension)

        isas = (os.environ.get("VLMFAST_CPU_ISA") or torch.ops.vlmfast.cpu_isas()).split(",")
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


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory):
    """Processes of one group, as many as the tests of ranks need."""
    from tools.processes import Processes
    from tools.ranks import MOST

    with Processes(MOST, str(tmp_path_factory.mktemp("group") / "rendezvous")) as processes:
        yield processes


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts torch's generator at the same place."""
    torch.manual_seed(0)


@pytest.fixture
def nan_in_new_memory():
    """Lets malloc return memory full of NaN, so that an element left unwritten shows.

    glibc fills with the complement of M_PERTURB's lowest byte, and 0xFF throughout is NaN in every
    floating dtype. Blocks that are mapped afresh are zero, so none of up to 32 MiB are. The malloc
    of a sanitizer takes no such options, and is told by its own (tools/sanitize.py).
    """
    mmap_threshold, perturb = -3, -6  # M_MMAP_THRESHOLD, M_PERTURB of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 32 << 20)
    mallopt(perturb, 0x100)
    assert torch.empty(1000).isnan().all()
    yield
    mallopt(perturb, 0)
