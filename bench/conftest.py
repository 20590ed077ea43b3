"""What `pytest bench` takes and tells beyond pytest-benchmark's own."""

from typing import Any

import pytest

from bench.measure import settle_allocator
from bench.results import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile",
        action="store_true",
        help="also time what must be compiled first, for up to a minute a shape",
    )


def pytest_configure() -> None:
    settle_allocator()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Threads, instruction set, commit and versions, in every file that is saved."""
    machine_info["vlmfast"] = machine()
