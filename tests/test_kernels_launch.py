"""Launch configurations: their tables, what finds a row, and autotuning."""

import pytest
import torch

triton = pytest.importorskip("triton")

from tools.compile_gate import tables_of  # noqa: E402
from vlmfast.families import FAMILIES  # noqa: E402
from vlmfast.kernels import launch  # noqa: E402
from vlmfast.kernels.launch import Launch, Row, ShapeClass  # noqa: E402

CPU = torch.device("cpu")  # takes the rows of launch.INTERPRETED_ARCHITECTURE
SHIPPED = Launch(64, 64, 4, 2)
MASKED = Launch(32, 32, 4, 1)
SHAPE = ShapeClass("kernel", "half", 64, 197, plain=True)


ROWS = (Row(64, 256, SHIPPED, plain_only=True), Row(128, launch.UNLIMITED, MASKED))
TABLE = {(arch, "half"): ROWS for arch in launch.ARCHITECTURES}


@pytest.fixture(autouse=True)
def nothing_searched(monkeypatch):
    """Nothing searched yet, autotuning off."""
    monkeypatch.setattr(launch, "searched", {})
    monkeypatch.delenv("VLMFAST_AUTOTUNE", raising=False)


def launched(shape=SHAPE):
    """The launches that a call runs with."""
    runs = []
    launch.run_with_launch(TABLE, shape, CPU, runs.append)
    return runs


def use_timer(monkeypatch, seconds):
    """Lets autotuning take its times from a function of the launch; returns what it timed."""
    timed = []
    search = launch.search

    def searching(shape, shipped, run):
        def timer(call):
            call()
            timed.append(call.args[0])
            return seconds(call.args[0])

        return search(shape, shipped, run, timer)

    monkeypatch.setenv("VLMFAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "search", searching)
    return timed


def test_first_row_that_is_large_enough_wins():
    assert launched() == [SHIPPED]
    assert launched(SHAPE._replace(plain=False)) == [MASKED]
    assert launched(SHAPE._replace(rows=257)) == [MASKED]
    assert launched(SHAPE._replace(columns=80)) == [MASKED]


def test_shape_beyond_every_row_is_refused():
    with pytest.raises(NotImplementedError, match=r"no launch configuration for .*columns=256"):
        launched(SHAPE._replace(columns=256))


@pytest.mark.parametrize(
    ("arch", "served_by"),
    [(80, 80), (86, 86), (89, 86), (90, 90), (103, 100), (121, 120), (75, 80)],
)
def test_architectures_between_the_listed_ones(arch, served_by):
    assert launch.table_architecture(arch) == served_by


def test_override_holds_for_its_block():
    other = Launch(16, 16, 4, 1)
    with launch.override(kernel=other):
        assert launched() == [other]
        with launch.override(kernel=None), pytest.raises(NotImplementedError):
            launched()
        assert launched() == [other]
    assert launched() == [SHIPPED]


@pytest.mark.parametrize(
    ("kernel", "table"), [pair for family in FAMILIES for pair in tables_of(family).items()]
)
def test_no_row_hides_behind_an_earlier_one(kernel, table):
    for (arch, precision), rows in table.items():
        for i, row in enumerate(rows):
            hidden_by = [
                earlier
                for earlier in rows[:i]
                if earlier.columns >= row.columns
                and earlier.rows >= row.rows
                and (row.plain_only or not earlier.plain_only)
            ]
            assert not hidden_by, f"{kernel}, sm_{arch}, {precision}: {row}"


def test_autotuning_is_off_by_default(monkeypatch):
    monkeypatch.setattr(launch, "search", lambda *_: pytest.fail("searched"))
    assert launched() == [SHIPPED]
    monkeypatch.setenv("VLMFAST_AUTOTUNE", "0")
    assert launched() == [SHIPPED]


def test_autotuning_takes_the_fastest_candidate_and_keeps_it(monkeypatch, capsys):
    fastest = Launch(128, 32, 8, 3)
    timed = use_timer(monkeypatch, lambda found: 1.0 if found == fastest else 2.0)
    assert launched()[-1] == fastest
    assert set(timed) == set(launch.candidates(SHIPPED))
    assert len(timed) == len(set(timed))
    found = Row(64, 197, fastest, plain_only=True)
    assert launch.searched == {(90, SHAPE): found}
    assert repr(found) in capsys.readouterr().out

    timed.clear()
    assert launched() == [fastest]
    assert timed == []


def test_autotuning_keeps_the_shipped_launch_where_nothing_is_faster(monkeypatch):
    use_timer(monkeypatch, lambda found: 1.0)
    assert launched()[-1] == SHIPPED


def test_autotuning_leaves_out_what_does_not_fit_on_the_device(monkeypatch):
    def seconds(found):
        if found.block_m > 64:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0 / found.block_m / found.num_stages

    use_timer(monkeypatch, seconds)
    assert launched()[-1][::3] == (64, 3)


def test_autotuning_respects_overrides(monkeypatch):
    timed = use_timer(monkeypatch, lambda found: 1.0)
    with launch.override(kernel=MASKED):
        assert launched() == [MASKED]
    assert timed == []


def test_candidates_are_near_the_shipped_launch_and_differ():
    found = list(launch.candidates(SHIPPED))
    assert found[0] == SHIPPED
    assert len(found) == len(set(found)) == 3 * 3 * 2 * 3
    assert all(16 <= c.block_m <= 128 and 16 <= c.block_n <= 128 for c in found)
    # A kernel without one of the blocks has it at 0.
    assert {c.block_n for c in launch.candidates(Launch(64, 0, 4, 1))} == {0}


def test_numbers_of_blocks_are_triton_s_own():
    for length in range(70):
        assert launch.next_power_of_2(length) == max(triton.next_power_of_2(length), 1)
        for block in (1, 16, 48, 64):
            assert launch.ceil_div(length, block) == triton.cdiv(length, block)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 1, 5, 8), (2, 3, 0, 8), (0, 3, 5, 0)])
def test_dense_tensors_keep_the_order_of_dimensions_without_gaps(shape):
    batch, heads, rows, columns = shape
    inside = torch.empty(batch, rows, heads, columns).transpose(1, 2)
    apart = torch.empty(2, 5, 4, 9)[:, :, :3].transpose(1, 2)  # heads inside rows, with gaps
    assert launch.dense_like(apart, shape).stride() == inside.stride()
    assert launch.dense_like(torch.empty(2, 3, 5, 8), shape).stride() == torch.empty(shape).stride()


def test_strides_of_one_layout_are_not_taken_for_those_of_another():
    x = torch.empty(2, 4, 16, 8)
    assert launch.strided(x, 8).strides == (64, 16, 1, 1)
    assert launch.strided(x).strides == (512, 128, 8, 1)
    assert launch.strided(x.transpose(1, 2), 8).strides == (64, 1, 16, 1)
    assert launch.strided(x[:1], 8).strides == (0, 16, 1, 1)
    assert launch.strided(x[:, :, :, :7]).strides == (512, 128, 8, 1)
    assert launch.stride_unit(x, x.transpose(1, 2), None) == 8
    assert launch.stride_unit(x, torch.empty(2, 4, 16, 7)) == 1
    assert launch.stride_unit(torch.empty(1, 1, 1, 7), None) == 8  # no row follows another


def test_what_is_asked_once_is_told_apart_by_its_arguments_and_problem():
    class Counting(launch.Problem):
        asked = 0

        @launch.once
        def double(self, number):
            self.asked += 1
            return 2 * number

    first, second = Counting(), Counting()
    assert [first.double(1), first.double(2), first.double(1), second.double(3)] == [2, 4, 2, 6]
    assert (first.asked, second.asked) == (2, 1)


def test_device_is_switched_where_another_is_current(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or "guard")
    assert launch.device_guard(torch.device("cuda", 1)) == "guard"
    assert entered == [torch.device("cuda", 1)]
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        with launch.device_guard(device):
            assert len(entered) == 1


def test_what_is_remembered_of_a_device_is_not_taken_for_another(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (8 + device.index, device.index)
    )
    launch.architecture.cache_clear()
    found = [launch.architecture(torch.device("cuda", i)) for i in (0, 1, 0)]
    launch.architecture.cache_clear()
    assert found == [80, 91, 80]
