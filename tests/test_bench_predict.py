"""What a kernel should take, from its code: how often loops run, what they issue, and the sums."""

import dataclasses
import re

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench import __main__ as command_line  # noqa: E402
from bench.gpu import assembly, no_card, predict, trips  # noqa: E402
from bench.gpu.cases import BY_NAME  # noqa: E402

CARD = predict.H200


@triton.jit(do_not_specialize=["rows", "columns"])
def walk_kernel(x, out, rows, columns, SIZE: tl.constexpr):
    """Programs beyond the rows end at once; the others walk columns, more with each program."""
    program = tl.program_id(0)
    if program >= rows:
        return
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for first in range(0, tl.minimum(columns, (program + 1) * SIZE), SIZE):
        tile = tl.arange(0, SIZE)[:, None] * columns + first + tl.arange(0, SIZE)[None, :]
        values = tl.load(x + tile)
        for _step in range(program % 3, rows):
            values = tl.math.exp2(tl.dot(values, values) * 1e-3).to(tl.bfloat16)
        total += values
    tl.store(out + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :], total)


@triton.jit
def follow_kernel(lengths, out):
    total = 0.0
    for i in range(tl.load(lengths + tl.program_id(0))):
        total += tl.load(out + i)
    tl.store(out, total)


@triton.jit
def exponential_kernel(x, out, scale, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.math.exp2(tl.load(x + at) * scale))


def started(kernel, programs, **arguments) -> no_card.Started:
    with no_card.compile_only(90, CARD.multiprocessors) as found:
        kernel.run(grid=(programs,), warmup=False, num_warps=4, num_stages=1, **arguments)
    return found[0]


def walk(rows, columns, programs) -> no_card.Started:
    x = torch.empty(16, columns, dtype=torch.bfloat16, device="meta")
    out = torch.empty(16, 16, device="meta")
    return started(walk_kernel, programs, x=x, out=out, rows=rows, columns=columns, SIZE=16)


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (4, 16), (7, 160)])
def test_loops_are_counted_as_they_run(rows, columns):
    one = walk(rows, columns, programs=8)
    program = trips.parse(one.compiled.asm["ttir"])
    scalars = one.scalars(program.parameters)
    assert program.loops == 2 and program.varying == [0, 1]
    for index in range(8):
        outer = min(columns, 16 * (index + 1)) // 16 if index < rows else 0
        inner = max(0, rows - index % 3)
        assert trips.trips(program, scalars, index) == [outer, outer * inner]


def test_loops_that_hang_on_data_are_not_guessed():
    lengths = torch.empty(4, dtype=torch.int32, device="meta")
    one = started(follow_kernel, 4, lengths=lengths, out=torch.empty(9, device="meta"))
    program = trips.parse(one.compiled.asm["ttir"])
    with pytest.raises(trips.DataDependent):
        trips.trips(program, one.scalars(program.parameters), 0)


def test_integer_division_is_that_of_the_machine():
    divide, rest = trips._BINARY["arith.divsi"], trips._BINARY["arith.remsi"]
    for a in range(-7, 8):
        for b in (-3, -1, 1, 2, 5):
            whole = int(a / b)
            assert (divide(a, b), rest(a, b)) == (whole, a - b * whole)


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""


def test_instructions_belong_to_their_innermost_loop(monkeypatch):
    monkeypatch.setattr(assembly, "run_on", lambda *arguments: SASS)
    code = assembly.instructions(b"")
    loops = assembly.loops(code)
    assert loops == [(0x10, 0x60), (0x30, 0x40)]
    outside, outer, inner = assembly.passes(code, loops)
    assert outside == assembly.Pass(3, 0, 0.0)
    assert outer == assembly.Pass(4, 0, 2 * 64 * 32 * 16 / 4 + 2 * 16 * 8 * 16)
    assert inner == assembly.Pass(2, 1, 0.0)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(64, 0, 4, 8), (255, 0, 8, 1), (32, 0, 1, 32), (32, 100 << 10, 4, 2), (24, 0, 16, 4)],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, blocks):
    assert assembly.blocks_of_sm(registers, shared, warps) == blocks


def test_each_part_is_what_the_busiest_multiprocessor_does():
    x = torch.empty(1024, device="meta")
    numbers = {"x": x, "out": x, "scale": 2.0, "SIZE": 1024}
    programs = 2 * CARD.multiprocessors + 1
    one = started(exponential_kernel, programs, **numbers)
    found = predict._of_one(one, CARD)
    of_program = 1e6 * 1024 / CARD.exponentials / CARD.hertz
    assert found.exponentials == pytest.approx(3 * of_program)
    assert found.products == 0.0 and found.issue > 0.0
    assert found.memory == pytest.approx(1e6 * 2 * 4096 / CARD.bytes)
    assert found.waves == pytest.approx(programs / (CARD.multiprocessors * found.blocks))
    slow = dataclasses.replace(CARD, exponentials=1)
    assert predict._of_one(one, slow).binding == "exponentials"
    assert predict._of_one(one, slow).microseconds == pytest.approx(16 * found.exponentials)


def test_numbers_repeated_by_a_stride_of_0_move_once():
    x = torch.empty(5, 1, 7, dtype=torch.bfloat16, device="meta")
    assert predict.bytes_of([x, x.expand(5, 9, 7), x[:0]]) == 2 * 2 * 35


def test_products_of_attention_are_at_least_those_of_the_formula():
    goal = BY_NAME["small-vit-b16"]
    forward, *backward = predict.predictions(goal, "fwd+bwd")
    flops = goal.family.calls.work(goal.case, torch.bfloat16, "fwd").flops
    assert not any(one.unknown for one in (forward, *backward))
    # 24 heads of 2 blocks of queries leave most of a GPU idle: a block takes what it takes.
    least = 1e6 * flops / (24 * 2) / (CARD.flops / CARD.multiprocessors)
    assert least < forward.products < 2.5 * least


def test_predictions_are_printed_and_kept(tmp_path, capsys):
    arguments = ["predict", "small-vit-b16", "small-phi", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 0
    text = capsys.readouterr().out
    assert "not measured" in text and "loops hang on data" in text
    kept = predict.read(tmp_path)
    assert {goal for goal, _ in kept} == {"small-vit-b16"}  # of the other not all is known
    rows = re.findall(r"\| all \|.*\| ([\d.]+) \|", text)
    assert [f"{us:.1f}" for us in kept.values()] == rows
    assert predict.read(tmp_path / "nothing") == {}
    with pytest.raises(SystemExit):
        command_line.main(["predict", "no-such-goal"])
