"""Each guard of the compile gate catches a planted bug."""

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tools import compile_gate as gate  # noqa: E402
from tools import compiled  # noqa: E402
from tools.compile_cases.common import CompileCase  # noqa: E402
from vlmfast.kernels import launch  # noqa: E402


@triton.jit
def product_kernel(
    a, b, out, SIZE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr
):
    rows, inner = tl.arange(0, SIZE), tl.arange(0, INNER)
    left = tl.load(a + rows[:, None] * INNER + inner[None, :])
    right = tl.load(b + inner[:, None] * SIZE + rows[None, :])
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    product = tl.dot(left, right, input_precision=PRECISION)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], product)


@triton.jit
def normalise_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(out + at, values / tl.sum(values * values))


@triton.jit(do_not_specialize=["columns"])
def copy_kernel(x, out, columns, SIZE: tl.constexpr):
    rows, inner = tl.arange(0, SIZE), tl.arange(0, SIZE)
    offsets = rows[:, None] * columns + inner[None, :]
    tl.store(out + offsets, tl.load(x + offsets, mask=inner[None, :] < columns, other=0.0))


@triton.jit
def attend_kernel(query, key, value, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    tile = rows[:, None] * SIZE + rows[None, :]
    scores = tl.dot(tl.load(query + tile), tl.trans(tl.load(key + tile)))
    values = tl.load(value + tile)
    tl.store(out + tile, tl.dot(tl.math.exp2(scores).to(values.dtype), values))


@triton.jit
def wrong_kernel(x, out):
    tl.store(out, tl.load(x) + tl.arange(0, 3))  # not a power of two


def product(
    size=64, inner=64, dtype=torch.bfloat16, precision="ieee", widen=False, warps=4
) -> CompileCase:
    """A product of two matrices as a case that the gate should judge."""

    def launch():
        a = torch.empty(size, inner, dtype=dtype, device="meta")
        out = torch.empty(size, size, device="meta")
        options = {"SIZE": size, "INNER": inner, "PRECISION": precision, "WIDEN": widen}
        product_kernel[(1,)](a, a.T, out, **options, num_warps=warps)

    return CompileCase("product", launch, "half" if dtype != torch.float32 else precision)


def normalise(size, warps) -> CompileCase:
    def launch():
        x = torch.empty(size, device="meta")
        normalise_kernel[(1,)](x, x, SIZE=size, num_warps=warps)

    return CompileCase("normalise", launch)


def complaints(case, arch):
    return gate.complaints(gate.compile_case(case, arch))


@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
def test_sound_kernels_pass(arch):
    assert complaints(product(), arch) == []
    assert complaints(product(size=32), arch) == []
    assert complaints(product(dtype=torch.float32, precision="tf32"), arch) == []
    assert complaints(product(size=32, dtype=torch.float32), arch) == []
    assert complaints(normalise(1024, warps=4), arch) == []


def test_each_architecture_shows_its_own_matrix_instruction():
    found = [gate.compile_case(product(), arch).kernels[0] for arch in (80, 90, 100)]
    assert [k.instructions for k in found] == [{"mma.sync"}, {"wgmma"}, {"tcgen05"}]


def test_too_much_shared_memory_is_caught_where_it_is_too_much():
    case = product(size=128, inner=256, warps=8)
    assert complaints(case, 90) == []
    (line,) = complaints(case, 86)
    assert line.startswith("product, sm_86, product_kernel: needs ")
    assert line.endswith("bytes of shared memory; a block may have 101376")


def test_too_much_tensor_memory_is_caught():
    report = gate.compile_case(product(), 100)
    (compiled,) = report.kernels
    assert compiled.tensor_memory > 0
    report.kernels = [dataclasses.replace(compiled, tensor_memory=513)]
    (line,) = gate.complaints(report)
    assert line.endswith("needs 513 columns of tensor memory; there are 512")


def test_spills_are_caught():
    assert complaints(normalise(16384, warps=8), 90) == []
    (line,) = complaints(normalise(16384, warps=1), 90)
    assert "normalise_kernel: spills: " in line


def test_product_that_misses_its_tensor_core_is_caught():
    (line,) = complaints(product(warps=2), 90)  # wgmma takes four warps
    assert line.endswith("matrix instructions: expected wgmma, found mma.sync")


def test_product_without_tensor_cores_is_caught():
    (line,) = complaints(product(size=32, widen=True), 90)
    assert line.endswith("products: expected narrow and wide, found ieee")


@pytest.mark.parametrize(("wanted", "used"), [("ieee", "tf32"), ("tf32", "ieee")])
def test_float32_rounded_in_the_wrong_way_is_caught(wanted, used):
    case = product(dtype=torch.float32, precision=used)._replace(precision=wanted)
    (line,) = complaints(case, 80)
    assert line.endswith(f"products: expected {wanted}, found {used}")


def wasted_time(case):
    (kernel,) = gate.compile_case(case, 90).kernels
    return list(gate.wasted_time(kernel))


def attention(warps):
    def launch():
        x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
        attend_kernel[(1,)](x, x, x, torch.empty(64, 64, device="meta"), SIZE=64, num_warps=warps)

    return CompileCase("attention", launch)


def test_product_that_several_warps_compute_is_seen():
    assert wasted_time(attention(warps=4)) == []
    assert wasted_time(attention(warps=8)) == ["computed 2 times"]


def attention_of_a_row(repeats, warps):
    row = launch.Row(64, 64, launch.Launch(64, 64, warps, 1), repeats=repeats)
    shape = launch.ShapeClass("family_fwd", "half", 64, 64, plain=True)

    def start():
        launch.run_with_launch(
            {(90, "half"): (row,)},
            shape,
            torch.device("meta"),
            lambda found: attention(found.num_warps).launch(),
        )

    return gate.compile_case(CompileCase("attention", start), 90)


def test_row_that_repeats_a_product_must_be_marked_and_no_other():
    (line,) = gate.complaints(attention_of_a_row(repeats=False, warps=8))
    assert line.endswith("computes a product 2 times; its row is not marked REPEATS")
    wanted = attention_of_a_row(repeats=True, warps=8)
    assert gate.complaints(wanted) == gate.idle_marks([wanted]) == []
    idle = attention_of_a_row(repeats=True, warps=4)
    (line,) = gate.idle_marks([idle])
    assert line.startswith("attend_kernel: marked REPEATS, and does not")
    assert gate.idle_marks([idle, wanted]) != []
    (line,) = complaints(attention(warps=8), 90)
    assert "2 times" in line


def test_what_the_assembler_says_of_products_that_wait_is_read(monkeypatch):
    run_on = compiled.run_on

    def warned(code, tool, *options):
        warning = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async ..."
        return run_on(code, tool, *options) + (warning if tool == "ptxas" else "")

    monkeypatch.setattr(compiled, "run_on", warned)
    assert wasted_time(attention(warps=4)) == ["serialised"]
    (line,) = complaints(attention(warps=4), 90)
    assert line.endswith("products wait for one another")


@pytest.mark.parametrize(("columns", "remarks"), [(64, ["2 narrow tiles"]), (63, [])])
def test_rows_moved_by_less_than_they_could_be_are_seen(columns, remarks):
    def launch():
        x = torch.empty(64, columns, dtype=torch.bfloat16, device="meta")
        copy_kernel[(1,)](x, x, columns, SIZE=64, num_warps=4)

    assert wasted_time(CompileCase("copy", launch)) == remarks


def test_kernel_that_does_not_compile_is_caught():
    def launch():
        x = torch.empty(4, device="meta")
        wrong_kernel[(1,)](x, x)

    (line,) = complaints(CompileCase("wrong", launch), 80)
    assert line.startswith("wrong, sm_80: CompilationError")


def test_registers_that_moved_are_caught(monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "SNAPSHOT", tmp_path / "registers.json")
    monkeypatch.setattr(gate, "CASES", {"family": []})
    few, many = (gate.compile_case(normalise(4096, warps), 90) for warps in (8, 2))
    assert gate.registers_moved("family", [few]) == []  # a Triton version without a snapshot
    gate.write_snapshot("family", [few])
    assert gate.registers_moved("family", [few]) == []
    line, advice = gate.registers_moved("family", [many])
    (a,), (b,) = few.kernels, many.kernels
    name = "normalise, sm_90, normalise_kernel"
    assert line == f"{name}: {b.registers} registers, {a.registers} in the snapshot"
    assert advice.endswith('make gates GATE_ARGS="--family family --update"')


def test_kernels_that_appear_or_vanish_are_caught(monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "SNAPSHOT", tmp_path / "registers.json")
    monkeypatch.setattr(gate, "CASES", {"family": [], "other": []})
    report = gate.compile_case(normalise(1024, warps=4), 90)
    gate.write_snapshot("family", [report])
    (line, _) = gate.registers_moved("family", [])
    assert line.endswith("in the snapshot, but not compiled")
    (line, _) = gate.registers_moved("other", [report])
    assert line.endswith("not in the snapshot")


def test_only_architectures_left_out_may_miss_in_a_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "SNAPSHOT", tmp_path / "registers.json")
    case = normalise(1024, warps=4)
    compiled = [gate.compile_case(case, arch) for arch in (86, 90)]
    gate.write_snapshot("family", compiled)
    monkeypatch.setattr(gate, "CASES", {"family": [case]})
    assert gate.registers_moved("family", compiled[:1]) == []
    monkeypatch.setattr(gate, "CASES", {"family": [case._replace(archs=(86,))]})
    (line, _) = gate.registers_moved("family", compiled[:1])
    assert line == "normalise, sm_90, normalise_kernel: in the snapshot, but not compiled"


def test_first_case_of_a_family_goes_to_every_architecture_and_no_case_to_none():
    for family, cases in gate.CASES.items():
        assert gate.targets(family, cases[0], gate.TESTED_ARCHITECTURES) == [*cases[0].archs]
        for case in cases[1:]:
            found = gate.targets(family, case, gate.TESTED_ARCHITECTURES)
            assert found == [a for a in gate.TESTED_ARCHITECTURES if a in case.archs] != []
            assert gate.targets(family, case, launch.ARCHITECTURES) == [*case.archs]


def test_configuration_row_that_no_case_compiles_is_caught(monkeypatch):
    row = launch.Row(64, 64, launch.Launch(64, 64, 4, 1))
    table = {(90, "half"): (row,)}
    monkeypatch.setattr(gate, "tables_of", lambda family: {f"{family}_fwd": table})
    shape = launch.ShapeClass("family_fwd", "half", 64, 64, plain=True)

    def covers():
        launch.run_with_launch(table, shape, torch.device("meta"), lambda found: None)

    report = gate.compile_case(CompileCase("covers", covers), 90)
    assert gate.uncovered_rows("family", [report]) == []
    (line,) = gate.uncovered_rows("family", [])
    assert line == f"family_fwd, sm_90, half: no case compiles {row}"
    assert gate.uncovered_rows("family", [], archs=(90,)) == [line]
    assert gate.uncovered_rows("family", [], archs=(86,)) == []


def test_nothing_is_left_behind():
    before = launch.find_row, torch.backends.cuda.matmul.fp32_precision
    gate.compile_case(product(dtype=torch.float32, precision="tf32"), 90)
    assert (launch.find_row, torch.backends.cuda.matmul.fp32_precision) == before
