"""What contrastive losses cost across gloo processes is what docs/scaling.md says."""

import contextlib
import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import vlmfast.functional as VF
from bench.memory import peak
from tools.ranks import MOST, by_exchange, make_inputs

SCALING = Path(__file__).parent.parent / "docs" / "scaling.md"


def formulas():
    """The functions in the document."""
    found = {}
    for code in re.findall(r"```python\n(.*?)```", SCALING.read_text(), re.DOTALL):
        if code.startswith("def "):
            exec(code, found)
    return found


def human(value, unit=""):
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError(value)


def table():
    """The table of the document, by its own formulas."""
    cost = formulas()
    header = "N | W | FLOP | memory: gather | ring | sent: gather | ring"
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    for n in (2**15, 2**18, 2**20, 2**22):
        for world in (1, 8, 64, 256, 1024):
            arguments = (n, 512, world, 2)
            cells = [f"{n:,}", f"{world:,}", human(cost["flops"](*arguments[:3]), "FLOP")]
            for name in ("memory_gather", "memory_ring", "wire_gather", "wire_ring"):
                cells.append(human(cost[name](*arguments), "B"))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_table_is_what_the_formulas_give():
    assert table() in SCALING.read_text(), f"docs/scaling.md needs this table:\n{table()}"


@contextlib.contextmanager
def bytes_sent(group):
    """Counts what this rank sends in collectives, as rings and pairwise exchange send it."""
    world, sent = dist.get_world_size(group), [0]
    gather, reduce_scatter = (
        f"{what}_single" if hasattr(dist, f"{what}_single") else before
        for what, before in (
            ("all_gather", "all_gather_into_tensor"),
            ("reduce_scatter", "reduce_scatter_tensor"),
        )
    )
    originals = {
        name: getattr(dist, name) for name in (gather, "all_to_all_single", "batch_isend_irecv")
    }
    refused = ("all_reduce", reduce_scatter, "all_gather_object", "all_gather")

    def all_gather(output, own, group):
        sent[0] += (world - 1) * own.nbytes
        return originals[gather](output, own, group=group)

    def all_to_all_single(output, parts, output_split_sizes, input_split_sizes, group):
        row = parts.nbytes // parts.shape[0]
        sent[0] += parts.nbytes - row * input_split_sizes[dist.get_rank(group)]
        splits = (output_split_sizes, input_split_sizes)
        return originals["all_to_all_single"](output, parts, *splits, group=group)

    def batch_isend_irecv(operations):
        sent[0] += sum(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return originals["batch_isend_irecv"](operations)

    def uncounted(*args, **kwargs):
        raise AssertionError("a collective that the formulas do not know")

    counting = (all_gather, all_to_all_single, batch_isend_irecv)
    with pytest.MonkeyPatch.context() as patcher:
        for name, function in zip(originals, counting, strict=True):
            patcher.setattr(dist, name, function)
        for name in refused:
            patcher.setattr(dist, name, uncounted)
        yield sent


def count(group, loss, exchange, n, dim, dtype, frozen):
    image, text, scale, bias = make_inputs(0, n, dtype, dim)
    image.requires_grad_(frozen != "image")
    text.requires_grad_(frozen != "text")
    with bytes_sent(group) as sent:
        function = {"clip": VF.clip_loss, "siglip": VF.siglip_loss}[loss]
        function(image, text, scale, bias, group=by_exchange(group, exchange)).backward()
    return sent[0]


@pytest.mark.parametrize("world", range(1, MOST + 1))
def test_bytes_on_the_wire(processes, world):
    cost, n, dim = formulas(), 8, 16
    for exchange in ("gather", "ring"):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = (exchange, n, dim, dtype, None)
            counts = processes.run(count, "clip", *arguments, ranks=range(world))
            expected = cost[f"wire_{exchange}"](n * world, dim, world, dtype.itemsize)
            assert counts == [expected] * world
            counts = processes.run(count, "siglip", *arguments, ranks=range(world))
            statistics = (world - 1) * n * 16 + (exchange == "ring" and world > 1) * n * 8
            assert counts == [expected - statistics] * world


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_sends_no_gradients(processes, frozen):
    world, n, dim = 3, 8, 16
    arguments = ("clip", "gather", n, dim, torch.float32, frozen)
    counts = processes.run(count, *arguments, ranks=range(world))
    assert counts == [(world - 1) * (n * dim * 4 + n * 16 + 24)] * world


def peak_memory(group, exchange, pairs_here, dim, dtype):
    """The most that this process holds during a step, beyond the features."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is gone

    def step(n, dim):
        features = [torch.randn(n, dim).to(dtype).requires_grad_() for _ in range(2)]
        return peak(
            lambda: VF.clip_loss(*features, 1e-3, group=by_exchange(group, exchange)).backward(),
            "cpu",
        )

    step(8, 16)  # whatever is set up once
    return step(pairs_here, dim)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("world", "exchange", "dtype"),
    [
        (1, "gather", torch.float32),
        (1, "ring", torch.bfloat16),
        (2, "gather", torch.float32),
        (3, "gather", torch.bfloat16),
        (4, "gather", torch.float32),
        (2, "ring", torch.bfloat16),
        (3, "ring", torch.float32),
        (4, "ring", torch.bfloat16),
    ],
)
def test_memory(processes, world, exchange, dtype):
    n, dim = 1536, 4096
    expected = formulas()[f"memory_{exchange}"](n, dim, world, dtype.itemsize)
    arguments = (exchange, n // world, dim, dtype)
    for measured in processes.run(peak_memory, *arguments, ranks=range(world)):
        # From above by no more than a kernel's tiles, from below because it is a bound.
        assert 0.7 * expected < measured < expected + 2**23
