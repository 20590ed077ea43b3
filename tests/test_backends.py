"""Which backend runs: precedence, refusals with all their reasons, explanations."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import vlmfast
import vlmfast.functional as VF
from vlmfast.backends import selection
from vlmfast.ops import flash_attention
from vlmfast.ops.common import EXTENSION_FILE

X = torch.zeros(1, 2, 5, 8)
sdpa = VF.scaled_dot_product_attention


def chosen(**options):
    return vlmfast.explain(sdpa, X, X, X, **options).backend


def test_kernels_come_first_and_the_reference_takes_the_rest():
    assert chosen() == "cpu"
    double = X.double()
    explanation = vlmfast.explain(sdpa, double, double, double)
    assert explanation.backend == "reference"
    assert "float32, bfloat16 or float16, got torch.float64" in explanation.refusals["cpu"][0]


def test_precedence(monkeypatch):
    monkeypatch.setattr(selection, "FROM_ENVIRONMENT", "reference")
    assert chosen() == "reference"
    with vlmfast.use_backend("cpu"):
        assert chosen() == "cpu"
        assert chosen(backend="reference") == "reference"
        with vlmfast.use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu"
    assert chosen() == "reference"
    monkeypatch.setattr(selection, "FROM_ENVIRONMENT", None)
    assert chosen() == "cpu"


def test_the_environment_forces_a_backend_for_the_whole_process():
    code = """
import torch, vlmfast.functional as VF
x = torch.ones(1, 2, 5, 8)
qkv, plan = torch.ones(1, 4, 4, 24), VF.cross_attention_plan(torch.ones(1, 5, dtype=torch.int), 1)
for call in (
    lambda: VF.scaled_dot_product_attention(x, x, x),
    lambda: VF.shifted_window_attention(qkv, 1, (2, 2)),
    lambda: VF.image_cross_attention(x, x[:, :, None], x[:, :, None], plan),
):
    try:
        call()
    except NotImplementedError as error:
        print(error.args[0].partition(",")[0], "forced by VLMFAST_BACKEND" in error.args[0])
"""
    environment = {**os.environ, "VLMFAST_BACKEND": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    families = ("flash_attention", "window_attention", "cross_attention")
    assert done.stdout.splitlines() == [f"{name}: the backend 'cuda' True" for name in families]


def test_use_backend_ends_with_its_block_and_its_thread():
    with pytest.raises(KeyError), vlmfast.use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu"

    @vlmfast.use_backend("reference")
    def decorated():
        return chosen()

    assert decorated() == "reference"
    seen = []
    with vlmfast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_forced_backends_run(monkeypatch):
    """What is forced is what is called."""
    calls = []
    original = selection.PREDICATES["flash_attention"]["reference"]
    monkeypatch.setitem(
        selection.PREDICATES["flash_attention"],
        "reference",
        lambda *inputs: calls.append(inputs) or original(*inputs),
    )
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    assert "FlashAttention" in type(sdpa(x, x, x).grad_fn).__name__
    assert not calls
    with vlmfast.use_backend("reference"):
        out = sdpa(x, x, x)
    assert "FlashAttention" not in type(out.grad_fn).__name__
    assert len(calls) == 1


def test_a_forced_backend_refuses_with_every_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wide = torch.zeros(1, 2, 5, 300, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as error:
        sdpa(wide, wide, wide, backend="triton")
    heading, *reasons = str(error.value).splitlines()
    assert heading == (
        "flash_attention: the backend 'triton', forced by the argument backend=, "
        "cannot run this call:"
    )
    assert len(reasons) == 3 and all(reason.startswith("  - ") for reason in reasons)
    assert "takes CPU tensors only under TRITON_INTERPRET=1" in reasons[0]
    assert "torch.float64" in reasons[1]
    assert "head dims up to 256, got 300" in reasons[2]
    with (
        vlmfast.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="'cuda', forced by use_backend"),
    ):
        sdpa(X, X, X)


def test_unknown_names(monkeypatch):
    expected = "expected one of 'cpu', 'triton', 'cuda', 'reference', got 'tpu'"
    with pytest.raises(ValueError, match=f"backend: {expected}"):
        sdpa(X, X, X, backend="tpu")
    with pytest.raises(ValueError, match=f"backend: {expected}"):
        vlmfast.use_backend("tpu")
    monkeypatch.setattr(selection, "FROM_ENVIRONMENT", "tpu")
    with pytest.raises(ValueError, match=f"VLMFAST_BACKEND: {expected}"):
        sdpa(X, X, X)


def test_explain_runs_nothing_and_says_why(monkeypatch):
    monkeypatch.setattr(flash_attention, "FORWARD", {})  # a kernel that ran would fail
    explanation = vlmfast.explain(sdpa, X, X, X, is_causal=True)
    assert explanation.backend == "cpu" and explanation.family == "flash_attention"
    assert set(explanation.refusals) == {"triton", "cuda"}
    text = str(explanation)
    assert text.startswith("flash_attention: cpu would run")
    assert "triton cannot: takes CPU tensors only under TRITON_INTERPRET=1" in text
    assert "reference could" in text

    forced = vlmfast.explain(sdpa, X, X, X, backend="cuda")
    assert forced.backend is None and forced.forced_by == "the argument backend="
    assert "nothing would run, forced by the argument backend=" in str(forced)


def test_explain_takes_any_callable_and_passes_errors_on():
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    packed = torch.zeros(5, 2, 8)
    explanation = vlmfast.explain(
        lambda: VF.varlen_attention(packed, packed, packed, lengths, lengths, 5, 5)
    )
    assert explanation.backend == "cpu"
    with pytest.raises(ValueError, match="key: expected the head dim"):
        vlmfast.explain(sdpa, X, X[..., :4], X)
    with pytest.raises(ValueError, match="expected a call that reaches a vlmfast kernel"):
        vlmfast.explain(torch.relu, X)
    assert sdpa(X, X, X).shape == X.shape  # explaining is over, also after an error


def test_triton_takes_cpu_tensors_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    explanation = vlmfast.explain(sdpa, X, X, X)
    assert "triton" not in explanation.refusals
    assert explanation.backend == "cpu"  # still first


def test_values_are_checked_on_the_cpu_only():
    from vlmfast.checks import may_read_values

    assert may_read_values(torch.zeros(1))
    assert not may_read_values(torch.zeros(1, device="meta"))


WITHOUT = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import torch, vlmfast, vlmfast.functional as VF
x = torch.randn(1, 2, 5, 8, requires_grad=True)
VF.scaled_dot_product_attention(x, x, x).sum().backward()
explanation = vlmfast.explain(VF.scaled_dot_product_attention, x, x, x)
print(explanation.backend)
print(explanation)
assert not [name for name in {blocked} if sys.modules[name] is not None]
"""


@pytest.mark.parametrize(
    "blocked, backend, reason",
    [
        (["triton"], "cpu", "triton cannot: triton is not installed"),
        (["vlmfast._C"], "reference", "cpu cannot: the C++ extension vlmfast._C "),
        (["triton", "vlmfast._C", "numpy", "xformers"], "reference", "triton is not installed"),
    ],
)
def test_what_is_missing_is_a_reason_and_no_crash(blocked, backend, reason):
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked)],
        capture_output=True,
        text=True,
        check=True,
    )
    name, *explanation = child.stdout.splitlines()
    assert name == backend
    assert reason in "\n".join(explanation)


def test_importing_vlmfast_imports_nothing_else():
    code = (
        "import sys, torch; before = set(sys.modules); import vlmfast;"
        "print(*sorted(set(sys.modules) - before))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["vlmfast"]


def test_public_names():
    for name in vlmfast.__all__:
        assert getattr(vlmfast, name) is not None
    assert set(vlmfast.__all__) <= set(dir(vlmfast))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = vlmfast.nothing


def test_info_says_what_is_built_found_and_usable(capsys):
    found = vlmfast.info()
    text = capsys.readouterr().out
    assert found["vlmfast"] == vlmfast.__version__ and found["torch"] == torch.__version__
    assert found["extension"] == EXTENSION_FILE and found["cpu_isa"] in found["cpu_isas"]
    assert found["cpu_isas"][0] == "base"
    assert found["families"]["flash_attention"]["cpu"]["cpu"] == []
    assert found["families"]["flash_attention"]["cpu"]["triton"]
    assert found["libraries"]["triton"] and set(found["libraries"]) >= {"timm", "xformers"}
    for expected in (vlmfast.__version__, found["cpu_isa"], "flash_attention on cpu tensors"):
        assert expected in text


def test_the_environment_chooses_the_build_of_the_extension(tmp_path):
    def run_with(file):
        code = "import vlmfast; print(vlmfast.info()['cpu_isas'])"
        environment = {**os.environ, "VLMFAST_EXTENSION": str(file)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )

    other = tmp_path / "other.so"
    shutil.copy(EXTENSION_FILE, other)
    child = run_with(other)
    assert f"extension  {other}\n" in child.stdout and "'base'" in child.stdout
    child = run_with(tmp_path / "missing.so")
    assert child.returncode == 1
    assert "ValueError: VLMFAST_EXTENSION: expected the file of a C++ ext" in child.stderr
