"""The Triton kernels of the contrastive losses on a GPU: what only a GPU can show."""

import pytest
import torch
import torch.nn.functional as F

import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from vlmfast.verify.contrastive_loss import (
    CASES,
    aligned_pairs,
    blip2_case,
    clip_case,
    query_pairs,
    random_pairs,
    siglip_case,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(n, dim, dtype=torch.bfloat16):
    features = (F.normalize(torch.randn(n, dim, device="cuda"), dim=-1) for _ in range(2))
    scale = torch.tensor(100.0, device="cuda", requires_grad=True)
    return (*(x.to(dtype).requires_grad_() for x in features), scale)


def loss_and_gradients(tensors):
    loss = VF.clip_loss(*tensors, backend="triton")
    return loss.detach(), *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")


MODELS = [
    clip_case("CLIP ViT-B", aligned_pairs(2000, 512, 0.0, 0.6)),
    clip_case("CLIP RN50x4", random_pairs(1023, 640)),
    clip_case("ragged", random_pairs(513, 500)),
    siglip_case("SigLIP so400m", aligned_pairs(1000, 1152, 0.0, 0.6)),
    blip2_case("BLIP-2", query_pairs(100, 32, 256), label_smoothing=0.1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_sizes_of_models(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")


def test_bits_repeat_and_the_host_never_waits():
    tensors = inputs(3000, 512)
    first = loss_and_gradients(tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = loss_and_gradients(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)


def test_memory_of_a_large_batch():
    """A matrix of logits would take 2 GiB in bfloat16."""
    loss_and_gradients(inputs(256, 512))
    tensors = inputs(32768, 512)
    gradients = sum(x.numel() * x.element_size() for x in tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradients(tensors)
    assert torch.cuda.max_memory_allocated() - before - gradients <= 256 << 20
