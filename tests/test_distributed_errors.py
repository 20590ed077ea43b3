"""Contrastive losses across gloo processes: what goes wrong on one rank is said on all of them."""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn
from tools.processes import Processes
from tools.ranks import by_exchange
from vlmfast.distributed import Ring


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
