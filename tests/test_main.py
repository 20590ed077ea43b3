"""python -m vlmfast, and the budget that `verify` holds kernels to."""

import math
import subprocess
import sys

import pytest
import torch

import vlmfast.__main__ as command
from vlmfast import verify
from vlmfast.verify import common
from vlmfast.verify.flash_attention import dense_case, normal_bias, packed_case


def test_info(capsys):
    assert command.main(["info"]) == 0
    assert "flash_attention on cpu tensors" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["info", "--seed", "1"], ["verify", "x"]])
def test_wrong_commands_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m vlmfast" in capsys.readouterr().err


def test_demo_says_which_package_it_lacks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "vlmfast.demo", raising=False)
    assert command.main(["demo"]) == 1
    assert capsys.readouterr().err == "the demo needs matplotlib: pip install vlmfast[demo]\n"


def test_demo_is_handed_its_arguments(monkeypatch):
    import vlmfast.demo

    seen = []
    monkeypatch.setattr(vlmfast.demo, "main", lambda arguments: seen.append(arguments) or 7)
    assert command.main(["demo", "--out", "here"]) == 7
    assert seen == [["--out", "here"]]


SMALL = [
    dense_case("dense", (1, 2, 9, 8)),
    dense_case("biased", (1, 2, 9, 8), mask=normal_bias(1, 2, 9, 9)),
    packed_case("packed", [(4, 5), (3, 2)], (2, 1), 8),
]


def test_verify_covers_every_kernel_of_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(verify, "CASES", {"flash_attention": SMALL})
    assert command.main(["verify", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    isas = torch.ops.vlmfast.cpu_isas().split(",")
    for isa in isas:
        for dtype in ("float32", "bfloat16", "float16"):
            assert f"flash_attention, cpu {isa}, {dtype}, cpu tensors" in text
    count = len(isas) * 3 * len(SMALL)
    assert f"{count} of {count} cases keep their budget" in text
    assert "from seed 3" in text


def wrong_by(factor):
    """A case whose kernel is off by a factor in one gradient."""

    def kernel(inputs, backend):
        outputs = SMALL[0].kernel(inputs, backend)
        key = inputs["key"]
        key.register_hook(lambda gradient: gradient * (1 + factor))
        return outputs

    return common.Case(**{**vars(SMALL[0]), "kernel": kernel})


@pytest.mark.parametrize(
    "dtype, factor", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_verify_catches_a_wrong_kernel(dtype, factor, monkeypatch, capsys):
    monkeypatch.setattr(verify, "CASES", {"flash_attention": [wrong_by(factor)]})
    monkeypatch.setattr(verify, "DTYPES", (dtype,))
    assert command.main(["verify"]) == 1
    text = capsys.readouterr().out
    assert "grad_key" in text and "FAILED" in text
    assert f"0 of {len(torch.ops.vlmfast.cpu_isas().split(','))} cases" in text


def test_verify_fails_where_nothing_can_be_verified(monkeypatch, capsys):
    monkeypatch.setattr(verify, "_variants", lambda family: iter(()))
    assert command.main(["verify"]) == 1
    assert "no kernel is usable" in capsys.readouterr().err


def test_relative_error():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert common.relative_error(truth.float(), truth) == 0.0
    assert common.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert common.relative_error(torch.tensor([3.0, 4.5]), truth, terms=10.0) == pytest.approx(0.05)
    assert common.relative_error(torch.tensor([3.0, math.nan]), truth) == math.inf
    assert common.relative_error(torch.tensor([3.0]), truth) == math.inf
    assert common.relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    infinite = torch.tensor([-math.inf, 1.0])
    assert common.relative_error(infinite, infinite.double()) == 0.0
    assert common.relative_error(torch.tensor([0.0, 1.0]), infinite.double()) == math.inf
    assert common.relative_error(torch.tensor([math.nan, 1.0]), infinite.double()) == math.inf
    assert (
        common.relative_error(torch.tensor([-math.inf, -math.inf]), infinite.double()) == math.inf
    )


def test_budget_is_twice_the_worst_and_one_rounding():
    assert common.budget([1e-3, 3e-3, 2e-3], torch.bfloat16) == 6e-3 + 2**-8
    assert common.unit_roundoff(torch.float32) == 2**-24
    assert common.unit_roundoff(torch.float16) == 2**-11
    assert common.unit_roundoff(torch.bfloat16) == 2**-8


def test_cpu_isa_restores_the_environment(monkeypatch):
    monkeypatch.delenv("VLMFAST_CPU_ISA", raising=False)
    with common.cpu_isa("base"):
        assert torch.ops.vlmfast.cpu_isa() == "base"
        with common.cpu_isa(torch.ops.vlmfast.cpu_isas().split(",")[-1]):
            pass
        assert torch.ops.vlmfast.cpu_isa() == "base"
    assert torch.ops.vlmfast.cpu_isa() == torch.ops.vlmfast.cpu_isas().split(",")[-1]


def test_the_module_runs():
    child = subprocess.run(
        [sys.executable, "-m", "vlmfast", "info"], capture_output=True, text=True, check=True
    )
    assert "flash_attention on cpu tensors" in child.stdout
