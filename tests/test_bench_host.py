"""What a call costs the host, without a GPU: launches are counted, and a slow one shows."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench import host, measure  # noqa: E402
from vlmfast.kernels.launch import Launch, start  # noqa: E402


@triton.jit
def fill_kernel(x, value, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), value)


def fill_twice():
    x = torch.zeros(16)
    for value in (0.5, 0.25):
        start(fill_kernel, 1, Launch(16, 16, 4, 1), x=x, value=value, SIZE=16)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only where a test says so."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_launches_and_arguments_are_counted():
    with host.launches_go_nowhere() as launches:
        found = host.cost(fill_twice, repeats=1, samples=1)
    assert found.launches == 2
    assert launches == [("fill_kernel", 3)] * 6  # compiled, counted and timed


def test_slow_launch_shows_as_triton_s(clock, monkeypatch):
    def launch(self, *arguments):
        clock.now += 3e-6

    monkeypatch.setattr(host.NoDriver, "launch", launch)
    with host.launches_go_nowhere():
        found = host.cost(fill_twice, repeats=5)
    assert found.microseconds == pytest.approx(6.0)
    assert found.triton == pytest.approx(6.0)


def test_slow_python_shows_as_ours(clock):
    def slow():
        clock.now += 4e-6
        fill_twice()

    with host.launches_go_nowhere():
        found = host.cost(slow, repeats=5)
    assert found.microseconds == pytest.approx(4.0)
    assert found.triton == pytest.approx(0.0)


def test_nothing_is_left_behind():
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    before = driver._active, JITFunction.run
    with host.launches_go_nowhere():
        host.cost(fill_twice, repeats=1, samples=1)
    assert (driver._active, JITFunction.run) == before


@pytest.mark.parametrize("family", host.FAMILIES)
def test_every_family_launches_forward_and_backward(family):
    with host.launches_go_nowhere() as launches:
        for call in host.FAMILIES[family]("cpu"):
            launches.clear()
            call()
            assert launches and all(kernel.startswith(family) for kernel, _ in launches)


def test_table_has_a_line_for_each_direction(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "FAMILIES", {"fill": lambda device: (fill_twice, fill_twice)})
    assert host.main(["--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["fill", "forward"], ["fill", "backward"]]
    assert all(line.endswith(" 2") for line in lines[1:])
