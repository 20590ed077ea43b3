"""Triton configurations compile and are sound (tools.compile_gate).

On the GPUs of `gate.TESTED_ARCHITECTURES`; on all that are listed `make gates` does the same.
"""

import pytest

triton = pytest.importorskip("triton")

from tools import compile_gate as gate  # noqa: E402
from tools.compile_cases import CASES  # noqa: E402

NAMES = [(family, case.name) for family, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def compilations():
    with gate.Compilations(archs=gate.TESTED_ARCHITECTURES) as running:
        yield running


@pytest.mark.parametrize(("family", "case"), NAMES)
def test_case_compiles_within_its_limits(compilations, family, case):
    reports = compilations.reports(family, case)
    wrong = [line for report in reports for line in gate.complaints(report)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", CASES)
def test_every_configuration_row_is_compiled(compilations, family):
    wrong = gate.uncovered_rows(family, compilations.all_reports(family), gate.TESTED_ARCHITECTURES)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", CASES)
def test_no_row_is_marked_that_repeats_nothing(compilations, family):
    wrong = gate.idle_marks(compilations.all_reports(family))
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(
    not gate.SNAPSHOT.exists(), reason=f"no register snapshot of Triton {triton.__version__}"
)
@pytest.mark.parametrize("family", CASES)
def test_registers_are_those_of_the_snapshot(compilations, family):
    wrong = gate.registers_moved(family, compilations.all_reports(family))
    assert not wrong, "\n".join(wrong)
