"""A plugin of pytest: takes every Nth test, and records each as it ends."""

import os
from pathlib import Path

import pytest

from bench.gpu import records

LONGEST = 4000  # characters of a traceback


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", default="0/1", help="I/N: the tests whose number is I modulo N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--every").split("/"))
    config.hook.pytest_deselected(
        items=[item for number, item in enumerate(items) if number % parts != part]
    )
    items[:] = items[part::parts]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the workers of pytest-xdist the one that steers them records the tests."""
    path = os.environ.get("VLMFAST_TEST_RECORDS")
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if path is None or is_worker or (report.when != "call" and report.passed):
        return
    record = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        record["failure"] = report.longreprtext[-LONGEST:]
    records.append(Path(path), record)
