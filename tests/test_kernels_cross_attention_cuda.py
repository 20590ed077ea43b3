"""The Triton kernels of cross_attention on a GPU, against float64."""

import pytest
import torch

import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from vlmfast.verify.cross_attention import CASES, image_case, shuffled

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODEL_CASES = [
    image_case("Flamingo, one image", (2, 8, 512, 64), (8, 1, 64)),
    image_case("Flamingo, 33 images", (1, 8, 2048, 64), (8, 33, 64), phi=shuffled(1, 2048, 33)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case.name)
def test_sizes_of_models(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")


def packed(device="cuda", tokens=300, images=5, latents=64):
    """Query, key and value, the plan of a text with its images in no order, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, tokens, 64), (2, 4, images, latents, 64), (2, 4, images, latents, 64))
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    phi = torch.randint(0, images + 1, (2, tokens), generator=generator).to(device)
    plan = VF.cross_attention_plan(phi, images)
    return [x.requires_grad_() for x in tensors], plan, torch.randn_like(tensors[0])


def forward_and_gradients(inputs, plan, grad_out, backend="triton"):
    out = VF.image_cross_attention(*inputs, plan, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def test_bits_repeat_and_the_host_never_waits():
    arguments = packed()
    first = forward_and_gradients(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = forward_and_gradients(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)


def test_cuda_graph_replays_forward_and_backward():
    inputs, plan, grad_out = packed()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_gradients(inputs, plan, grad_out)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_and_gradients(inputs, plan, grad_out)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for x, y in zip(results, forward_and_gradients(inputs, plan, grad_out), strict=True):
        assert torch.equal(x, y)
