"""Contrastive losses across gloo processes, against one process that has the whole batch."""

import contextlib
import ctypes
import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn
from bench.memory import peak
from tools.processes import Processes
from vlmfast.distributed import Ring
from vlmfast.ops import contrastive_loss as ops
from vlmfast.verify.common import SEEDS, budget, relative_error

MOST = 4


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with Processes(MOST, str(tmp_path_factory.mktemp("group") / "rendezvous")) as processes:
        yield processes


# --- The losses: ours on a group, and densely in plain PyTorch ---


def cross_entropy(logits, targets=None, **options):
    targets = torch.arange(logits.shape[0]) if targets is None else targets
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, **options)


def dense_clip(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def dense_siglip(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(image.shape[0], dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / image.shape[0]


def dense_ntxent(image, text, scale, bias):
    z = F.normalize(torch.cat((image, text)), dim=-1)
    n = image.shape[0]
    logits = (scale / 10 * z @ z.T).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, torch.arange(2 * n).roll(n))


def queue(like, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(6, like.shape[1], generator=generator, dtype=torch.float64)
    return F.normalize(entries, dim=-1).to(like.dtype)


def momentum(features):
    return F.normalize(features.detach().double().roll(1, -1) + features.detach(), dim=-1).to(
        features.dtype
    )


def dense_itc(image, text, scale, bias):
    image_keys = torch.cat((momentum(image), queue(image, 1)))
    text_keys = torch.cat((momentum(text), queue(text, 2)))
    loss = 0.0
    for features, target, keys in (
        (image, momentum(image), text_keys),
        (text, momentum(text), image_keys),
    ):
        with torch.no_grad():
            soft = (scale * target @ keys.T).softmax(-1)
            targets = 0.4 * soft + 0.6 * torch.eye(*soft.shape, dtype=soft.dtype)
        targets = targets.to(scale.dtype)
        loss = loss + cross_entropy(scale * features @ keys.T, targets, label_smoothing=0.1) / 2
    return loss


def dense_smoothed(image, text, scale, bias):
    logits = scale * image @ text.T
    return sum(cross_entropy(x, label_smoothing=0.1) for x in (logits, logits.T)) / 2


def ours_itc(image, text, scale, bias, **options):
    return VF.itc_loss(
        image,
        text,
        scale,
        image_momentum=momentum(image),
        text_momentum=momentum(text),
        image_queue=queue(image, 1),
        text_queue=queue(text, 2),
        alpha=0.4,
        label_smoothing=0.1,
        **options,
    )


LOSSES = {
    "clip": (VF.clip_loss, dense_clip),
    "siglip": (VF.siglip_loss, dense_siglip),
    "ntxent": (
        lambda image, text, scale, bias, **options: VF.ntxent_loss(
            image, text, 10 / scale, **options
        ),
        dense_ntxent,
    ),
    "itc": (ours_itc, dense_itc),
    "itc of features": (
        lambda image, text, scale, bias, **options: VF.itc_loss(
            image, text, scale, label_smoothing=0.1, **options
        ),
        dense_smoothed,
    ),
}
TENSORS = ("loss", "image", "text", "scale", "bias")


def make_inputs(seed, n, dtype, dim=24):
    """Pairs that resemble each other, as in training."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    text = image + 2 * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    features = (F.normalize(x, dim=-1).to(dtype) for x in (image, text))
    wide = dtype if dtype == torch.float64 else torch.float32
    return (*features, torch.tensor(20.0, dtype=wide), torch.tensor(-10.0, dtype=wide))


def measure(loss, inputs, **options):
    """The loss and its gradients, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    value.backward()
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return dict(zip(TENSORS, (value.detach(), *gradients), strict=True))


def own_rows(group, sizes):
    rank = dist.get_rank(group)
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def by_exchange(group, exchange):
    return Ring(group) if exchange == "ring" else group


def run_one_rank(group, name, exchange, sizes, dtype, backend, options):
    rows = own_rows(group, sizes)
    image, text, scale, bias = make_inputs(0, sum(sizes), dtype)
    return measure(
        LOSSES[name][0],
        (image[rows], text[rows], scale, bias),
        group=by_exchange(group, exchange),
        backend=backend,
        **options,
    )


def after_averaging(results):
    """What DistributedDataParallel makes of the ranks' gradients, for the whole batch."""
    joined = {
        name: torch.cat([result[name].double() for result in results]) / len(results)
        for name in ("image", "text")
    }
    means = {
        name: torch.stack([result[name].double() for result in results]).mean(0)
        for name in ("loss", "scale", "bias")
    }
    return joined | means


def assert_within_budget(ours, dense, n, dtype):
    """Every tensor errs at most as its budget allows; `dense` gives truth and torch's errors."""
    errors = {name: [] for name in ours}
    for seed in SEEDS:
        inputs = make_inputs(seed, n, dtype)
        exact = measure(dense, [x.double() for x in inputs])
        theirs = measure(dense, inputs)
        for name in ours:
            errors[name].append(
                relative_error(theirs[name], exact[name], terms(name, exact, inputs))
            )
        if seed == 0:
            truth = {name: (exact[name], terms(name, exact, inputs)) for name in ours}
    for name, tensor in ours.items():
        error = relative_error(tensor, *truth[name])
        allowed = budget(errors[name], dtype if name in ("image", "text") else torch.float32)
        assert error <= allowed, f"{name}: error {error:.3e}, budget {allowed:.3e}"


def terms(name, exact, inputs):
    """The norm of what the gradients to scale and bias sum, a term for each row."""
    if name == "scale":
        return ((inputs[0].double() * exact["image"]).sum(-1) / inputs[2].double()).norm().item()
    return 0.0


# --- Like one process ---


CALLS = [(name, "gather") for name in LOSSES]
# Queues and soft targets need all keys at once.
CALLS += [(name, "ring") for name in LOSSES if name != "itc"]


@pytest.mark.parametrize(("name", "exchange"), CALLS)
@pytest.mark.parametrize("world", range(1, MOST + 1))
def test_averaged_gradients_are_those_of_one_process(processes, world, name, exchange):
    even, uneven = [9] * world, [8 + 4 * rank for rank in range(world)]
    for sizes, dtype, backend in (
        (even, torch.float32, None),
        (even, torch.float32, "reference"),
        (uneven, torch.float32, None),
        (uneven, torch.bfloat16, None),
        (uneven, torch.bfloat16, "reference"),
    ):
        results = processes.run(
            run_one_rank, name, exchange, sizes, dtype, backend, {}, ranks=range(world)
        )
        ours = after_averaging(results)
        if name != "siglip":
            assert ours.pop("bias") == 0.0
        assert_within_budget(ours, LOSSES[name][1], sum(sizes), dtype)


def twice(group, *arguments):
    first, second = (run_one_rank(group, *arguments) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in TENSORS)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_results_repeat_to_the_bit(processes, exchange):
    arguments = (exchange, [40, 33, 50, 41], torch.bfloat16, None, {})
    for name in ("clip", "siglip", "ntxent"):
        assert all(processes.run(twice, name, *arguments))


def test_a_group_of_some_ranks(processes):
    """Ranks of the group are not those of the world."""
    for exchange in ("gather", "ring"):
        arguments = ("clip", exchange, [7, 4], torch.float32, None, {})
        ours = after_averaging(processes.run(run_one_rank, *arguments, ranks=(1, 3)))
        del ours["bias"]
        assert_within_budget(ours, dense_clip, 11, torch.float32)


def stale_after_collectives(group):
    """How far layers that keep results are off after a collective has written to their inputs."""
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    linear = torch.nn.Sequential(torch.nn.Linear(16, 16)).eval()
    vlmfast.patch(linear, inference=True)
    layer = vnn.MaskedCrossAttention(dim=16, dim_head=8, heads=2).eval()
    x, media = torch.randn(1, 3, 16), torch.randn(1, 2, 4, 16)
    locations = torch.tensor([[True, False, rank == 0]])
    errors = []
    with torch.no_grad():
        for writes in (dist.broadcast, dist.all_reduce):
            linear(x), layer(x, media, locations)
            for tensor in (*linear.parameters(), *layer.parameters(), media):
                arguments = (0,) if writes is dist.broadcast else ()
                writes(tensor, *arguments, group=group)
            dist.broadcast(locations, 0, group=group)
            wanted = F.linear(x, linear[0].weight, linear[0].bias)
            errors.append(relative_error(linear(x), wanted))
            out = layer(x, media, locations)
            layer.forget_media()
            errors.append(relative_error(out, layer(x, media.clone(), locations.clone())))
    return errors


def test_what_layers_keep_notices_collectives(processes):
    for errors in processes.run(stale_after_collectives, ranks=(0, 1)):
        assert max(errors) < 1e-6


def backward_by_the_reference(group):
    image, text, scale, _ = make_inputs(0, 9, torch.float32, 8)
    image.requires_grad_()
    with vlmfast.use_backend("reference"):
        loss = VF.clip_loss(image, text, scale, group=Ring(group))
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(ops, "BACKWARD", {})  # no kernel may run
        loss.backward()
    return image.grad.isfinite().all()


def test_backward_in_a_ring_runs_the_backend_of_forward(processes):
    assert all(processes.run(backward_by_the_reference, ranks=(0, 1)))


def narrow_queries(group, rows_of):
    rank = dist.get_rank(group)
    rows = slice(*rows_of[rank])
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(10, 3, 8, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(10, 8, generator=generator, dtype=torch.float64), dim=-1)
    image, text = (x[rows].requires_grad_() for x in (image, text))
    loss = VF.itc_loss(image, text, 20.0, group=group, label_smoothing=0.1)
    loss.backward()
    return loss.item(), image.grad, text.grad


def test_several_queries(processes):
    (_, image, text), *_ = processes.run(narrow_queries, [(0, 10)], ranks=(2,))
    parts = processes.run(narrow_queries, [(0, 4), (4, 10)], ranks=(0, 1))
    for index, truth in ((1, image), (2, text)):
        joined = torch.cat([part[index] for part in parts]) / 2
        assert relative_error(joined, truth) < 16 * torch.finfo(torch.float64).eps


# --- Like open_clip ---


def open_clip_loss():
    """open_clip's module of losses, without the rest of open_clip."""
    package = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors_of(loss, exact_loss, dtype, weight):
    """Errors of loss and gradients on this rank, for eight seeds."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for seed in SEEDS:
        image, text, scale, bias = make_inputs(seed, 8 * world, dtype)
        rows = slice(8 * rank, 8 * rank + 8)
        inputs = (image[rows], text[rows], scale, bias)
        measured = measure(lambda *args: weight * loss(*args), inputs)
        exact = measure(lambda *args: weight * exact_loss(*args), [x.double() for x in inputs])
        found.append(
            {
                name: relative_error(measured[name], exact[name], terms(name, exact, inputs))
                for name in ("loss", "image", "text", "scale")
            }
        )
    return found


def compare_with_open_clip(group, name, options, weighted):
    rank, world = dist.get_rank(), dist.get_world_size()
    where = {"rank": rank, "world_size": world}
    theirs = getattr(open_clip_loss(), name)(**options, **where)
    ours = getattr(vnn, name)(**options, **where)
    weight = 1.0 + rank if weighted else 1.0
    torch_errors = errors_of(theirs, theirs, torch.float32, weight)
    return [
        f"{tensor}: {error:.3e}, open_clip's at most {allowed:.3e}"
        for tensor, error in errors_of(ours, theirs, torch.float32, weight)[0].items()
        if error > (allowed := budget([errors[tensor] for errors in torch_errors], torch.float32))
        # Only the mean over ranks is promised of it, and no collective is spent on more.
        and not (tensor == "scale" and options == {"local_loss": True, "gather_with_grad": True})
    ]


@pytest.mark.parametrize("gather_with_grad", [True, False])
@pytest.mark.parametrize("local_loss", [True, False])
def test_open_clips_combinations(processes, local_loss, gather_with_grad):
    """On each rank by itself, before any averaging."""
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    for failures in processes.run(compare_with_open_clip, "ClipLoss", options, local_loss):
        assert not failures, failures


@pytest.mark.parametrize("dist_impl", [None, "bidir", "shift", "reduce", "gather"])
def test_open_clips_siglip(processes, dist_impl):
    options = {"dist_impl": dist_impl}
    for failures in processes.run(compare_with_open_clip, "SigLipLoss", options, False):
        assert not failures, failures


# --- What goes wrong ---


def pairs(dtype=torch.float32, n=3, dim=8):
    generator = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, n, dim, generator=generator), dim=-1).to(dtype)
    return image, text


def good_call(group):
    return VF.clip_loss(*pairs(), 10.0, group=group)


def wrong_shapes(group):
    image, text = pairs()
    return VF.clip_loss(image, text[:2], 10.0, group=group)


def three_dimensions(group):
    return VF.clip_loss(pairs()[0][None], pairs()[1], 10.0, group=group)


def integers(group):
    return VF.clip_loss(pairs()[0].long(), pairs()[1], 10.0, group=group)


def no_pairs(group):
    return VF.clip_loss(*pairs(n=0), 10.0, group=group)


def unknown_backend(group):
    return VF.clip_loss(*pairs(), 10.0, group=group, backend="tpu")


def refusing_backend(group):
    return VF.clip_loss(*pairs(), 10.0, group=group, backend="cuda")


def another_dim(group):
    return VF.clip_loss(*pairs(dim=9), 10.0, group=group)


def another_dtype(group):
    return VF.clip_loss(*pairs(torch.bfloat16), 10.0, group=group)


def another_contract(group):
    return VF.clip_loss(*pairs(), 10.0, group=group, local_loss=False)


def another_exchange(group):
    return VF.clip_loss(*pairs(), 10.0, group=Ring(group))


def another_loss(group):
    return VF.siglip_loss(*pairs(), 10.0, None, group=group)


def another_scale(group):
    return VF.clip_loss(*pairs(), 10.5, group=group)


def another_scale_in_a_tensor(group):
    return VF.clip_loss(*pairs(), torch.tensor(10.001), group=group)


def another_bias(group):
    return VF.siglip_loss(*pairs(), 10.0, -9.0, group=group)


def siglip_call(group):
    return VF.siglip_loss(*pairs(), 10.0, -10.0, group=group)


def another_temperature(group):
    return VF.ntxent_loss(*pairs(), 0.25, group=group)


def ntxent_call(group):
    return VF.ntxent_loss(*pairs(), 0.5, group=group)


def another_scale_in_a_ring(group):
    return VF.clip_loss(*pairs(), 11.0, group=Ring(group))


def ring_call(group):
    return VF.clip_loss(*pairs(), 10.0, group=Ring(group))


def another_alpha(group):
    return VF.itc_loss(*pairs(), 10.0, alpha=0.5, group=group)


def itc_call(group):
    return VF.itc_loss(*pairs(), 10.0, alpha=0.25, group=group)


def another_backend(group):
    return VF.clip_loss(*pairs(), 10.0, group=group, backend="reference")


def another_backend_around(group):
    with vlmfast.use_backend("reference"):
        return VF.ntxent_loss(*pairs(), 0.5, group=group)


def no_flag(group):
    return VF.clip_loss(*pairs(), 10.0, group=group, local_loss="yes")


def with_gradient(group):
    image, text = pairs()
    return VF.clip_loss(image.requires_grad_(), text, 10.0, group=group)


def bad_temperature(group):
    return VF.ntxent_loss(*pairs(), -0.5, group=group)


def outcome(group, call_on, other_call):
    """What each rank raises where one of them makes a bad call; then a good one must work."""
    call = call_on if dist.get_rank(group) == 1 else other_call
    try:
        call(group)
    except (TypeError, ValueError, NotImplementedError) as error:
        raised = type(error).__name__, str(error)
    else:
        raised = "nothing", ""
    return *raised, good_call(group).item()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("bad_call", "type_there", "says"),
    [
        (wrong_shapes, "ValueError", "text_features: expected the shape"),
        (three_dimensions, "ValueError", r"image_features: expected shape \(N, D\)"),
        (integers, "TypeError", "image_features: expected a floating dtype"),
        (no_pairs, "ValueError", "image_features: expected shape"),
        (unknown_backend, "ValueError", "backend: expected one of"),
        (refusing_backend, "NotImplementedError", "cuda"),
        (bad_temperature, "ValueError", "temperature: expected a positive number"),
        (no_flag, "TypeError", "local_loss: expected True or False"),
        (another_dim, "ValueError", r"group: expected the same call.*rank 1: .*'N', 9"),
        (another_dtype, "ValueError", r"group: expected the same call.*rank 1: .*bfloat16"),
        (another_contract, "ValueError", "group: expected the same call.*rank 1: .*False"),
        (another_exchange, "ValueError", "group: expected the same call.*rank 1: .*ring"),
        (another_loss, "ValueError", "group: expected the same call.*rank 1: siglip_loss"),
        (with_gradient, "ValueError", "group: expected the same call.*rank 1: .*with gradient"),
    ],
)
def test_a_bad_call_on_one_rank_ends_on_every_rank(processes, world, bad_call, type_there, says):
    results = processes.run(outcome, bad_call, good_call, ranks=range(world))
    assert [kind for kind, *_ in results] == ["ValueError", type_there, "ValueError"][:world]
    assert all(re.search(says, message, re.DOTALL) for _, message, _ in results), results
    assert len({loss for *_, loss in results}) == 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("call", "other_call", "says"),
    [
        (another_scale, good_call, "10.5"),
        (another_scale_in_a_tensor, good_call, "10.001"),
        (another_bias, siglip_call, "-9.0"),
        (another_temperature, ntxent_call, "4.0"),
        (another_scale_in_a_ring, ring_call, "11.0"),
        (another_alpha, itc_call, "0.5"),
        (another_backend, good_call, "backend=reference"),
        (another_backend_around, ntxent_call, "backend=reference"),
    ],
)
def test_ranks_that_compute_other_losses_are_refused_on_every_rank(
    processes, world, call, other_call, says
):
    results = processes.run(outcome, call, other_call, ranks=range(world))
    for kind, message, _ in results:
        assert kind == "ValueError"
        assert re.search(f"group: expected the same call.*rank 1: .*{says}", message, re.DOTALL)
    assert len({loss for *_, loss in results}) == 1


def call_with_wrong_groups(group):
    for wrong, error, says in (
        ("world", TypeError, "group: expected a torch.distributed.ProcessGroup"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "group: expected a group that this"),
    ):
        for call in (wrong, Ring(wrong)):
            with pytest.raises(error, match=says):
                VF.clip_loss(*pairs(), 10.0, group=call)
    with pytest.raises(ValueError, match="group: expected one for meta tensors"):
        VF.clip_loss(*(x.to("meta") for x in pairs()), 10.0, group=group)
    with pytest.raises(NotImplementedError, match=r"group: .*got a Ring"):
        VF.itc_loss(*pairs(), 10.0, alpha=0.5, group=Ring(group))
    with pytest.raises(ValueError, match="world_size: expected 2, as in the process group, got 3"):
        loss = vnn.ClipLoss(rank=dist.get_rank(group), world_size=3)
        loss.group = group
        loss(*pairs(), 10.0)
    with pytest.raises(ValueError, match="rank: expected"):
        loss = vnn.SigLipLoss(rank=1 - dist.get_rank(group), world_size=2)
        loss.group = group
        loss(*pairs(), 10.0)


def test_wrong_groups(processes):
    processes.run(call_with_wrong_groups, ranks=(0, 1))


def test_no_process_group():
    with pytest.raises(ValueError, match=r"unless torch\.distributed\.init_process_group"):
        VF.clip_loss(*pairs(), 10.0, group=Ring())
    with pytest.raises(ValueError, match=r"unless torch\.distributed\.init_process_group"):
        vnn.ClipLoss(world_size=2)(*pairs(), 10.0)


def stay_away(group, when, exchange):
    """Rank 1 stops; what rank 0 raises, and after how many seconds."""
    image, text = (x.requires_grad_() for x in pairs())
    loss = None
    if when == "backward":
        loss = VF.clip_loss(image, text, 10.0, group=by_exchange(group, exchange))
    if dist.get_rank(group) == 1:
        return None
    start = time.monotonic()
    try:
        if loss is None:
            VF.clip_loss(image, text, 10.0, group=by_exchange(group, exchange))
        else:
            loss.backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start, image.grad
    return "nothing was raised", 0.0, None


@pytest.mark.parametrize(
    ("when", "exchange"), [("forward", "gather"), ("backward", "gather"), ("backward", "ring")]
)
def test_a_rank_that_stays_away(tmp_path, when, exchange):
    with Processes(2, str(tmp_path / "rendezvous"), timeout=4.0) as processes:
        (message, seconds, gradient), _ = processes.run(stay_away, when, exchange)
    assert message != "nothing was raised" and gradient is None
    assert seconds < 30, message


def die(group):
    if dist.get_rank(group) == 1:
        os._exit(1)
    image, text = (x.requires_grad_() for x in pairs())
    try:
        VF.clip_loss(image, text, 10.0, group=group).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_that_dies(tmp_path):
    with Processes(2, str(tmp_path / "rendezvous"), timeout=20.0) as processes:
        assert processes.run(die, lost=(1,))[0] != "nothing was raised"


# --- Training ---


class TwoTowers(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.towers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(12, 16), torch.nn.GELU(), torch.nn.Linear(16, 8, bias=False)
            )
            for _ in range(2)
        )
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        features = [
            F.normalize(t(x), dim=-1) for t, x in zip(self.towers, (image, text), strict=True)
        ]
        return *features, self.logit_scale.exp()


STEPS, TOTAL, MICROBATCHES = 4, 12, 2


def training_data(seed):
    """(steps, microbatches, pairs, width) of each tower."""
    generator = torch.Generator().manual_seed(100 + seed)
    image = torch.randn(STEPS, MICROBATCHES, TOTAL, 12, generator=generator)
    return image, image.roll(1, -1) + torch.randn(image.shape, generator=generator)


def train(model, call, loss, data, rows):
    """All parameters, and the loss, after each step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    path = []
    for step in range(STEPS):
        optimiser.zero_grad()
        total = 0.0
        for index in range(MICROBATCHES):
            last = index == MICROBATCHES - 1
            with contextlib.nullcontext() if last or call is model else call.no_sync():
                value = loss(*call(*(x[step, index, rows] for x in data))) / MICROBATCHES
                value.backward()
            total += value.detach()
        optimiser.step()
        parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        path.append((total.double(), parameters.double()))
    return path


def train_on_ranks(group, exchange, sizes, options):
    model = TwoTowers(0)
    parallel = DistributedDataParallel(model, process_group=group)

    def loss(*features):
        return VF.clip_loss(*features, group=by_exchange(group, exchange), **options)

    return train(model, parallel, loss, training_data(0), own_rows(group, sizes))


@pytest.mark.parametrize(
    ("exchange", "sizes", "options"),
    [
        ("gather", [6, 6], {}),
        ("ring", [4, 4, 4], {}),
        ("gather", [5, 4, 3], {}),
        ("gather", [3, 3, 3, 3], {"local_loss": False}),
    ],
    ids=str,
)
def test_ddp_follows_one_process(processes, exchange, sizes, options):
    def dense(image, text, scale):
        return dense_clip(image, text, scale, 0.0)

    torch_errors = [[], []]
    for seed in SEEDS:
        data, everything = training_data(seed), slice(None)
        model, exact = TwoTowers(seed), TwoTowers(seed).double()
        path = train(model, model, dense, data, everything)
        truth = train(exact, exact, dense, [x.double() for x in data], everything)
        if seed == 0:
            exact_path = truth
        for index in range(2):
            torch_errors[index].append(
                [relative_error(a[index], b[index]) for a, b in zip(path, truth, strict=True)]
            )
    paths = processes.run(train_on_ranks, exchange, sizes, options, ranks=range(len(sizes)))
    for step in range(STEPS):
        parameters = [path[step][1] for path in paths]
        assert all(torch.equal(parameters[0], other) for other in parameters)
        mean_loss = torch.stack([path[step][0] for path in paths]).mean()
        for index, ours in enumerate((mean_loss, parameters[0])):
            error = relative_error(ours, exact_path[step][index])
            allowed = budget([errors[step] for errors in torch_errors[index]], torch.float32)
            assert error <= allowed, f"step {step}: error {error:.3e}, budget {allowed:.3e}"


def compiled(group):
    inputs = make_inputs(0, 5, torch.float32)
    measured = []
    for compile_it in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        loss = compile_it(lambda *args: VF.clip_loss(*args, group=group))
        measured.append(measure(loss, inputs))
    with pytest.raises(Exception, match="run outside of compiled graphs"):
        whole = torch.compile(
            lambda *args: VF.clip_loss(*args, group=group), backend="eager", fullgraph=True
        )
        whole(*inputs)
    return all(relative_error(measured[1][name], measured[0][name]) < 1e-6 for name in TENSORS)


def test_compiled_code_breaks_its_graph_around_the_ranks(processes):
    assert all(processes.run(compiled, ranks=(0, 1)))


# --- What it costs: docs/scaling.md ---

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
