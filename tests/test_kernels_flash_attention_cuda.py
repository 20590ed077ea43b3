"""The Triton kernels of flash_attention on a GPU: what only a GPU can show."""

import dataclasses
import itertools

import pytest
import torch

import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from vlmfast.reference.common import dropout_keep_mask
from vlmfast.verify.flash_attention import CASES, dense_case, normal_bias, random_mask

launch = pytest.importorskip("vlmfast.kernels.launch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend(query, key, value, **options):
    return VF.scaled_dot_product_attention(query, key, value, backend="triton", **options)


def heads(*shape, dtype=torch.bfloat16, requires_grad=True):
    """Query, key and value."""
    tensors = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(3))
    return [x.requires_grad_(requires_grad) for x in tensors]


def forward_and_gradients(inputs, grad_out, **options):
    out = attend(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def assert_same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")


def test_tf32_keeps_the_budget_of_torch_s_tf32(monkeypatch):
    def written_out(inputs):
        weights = inputs["query"] @ inputs["key"].mT * inputs["query"].shape[-1] ** -0.5
        return {"out": weights.softmax(-1) @ inputs["value"]}

    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    case = dataclasses.replace(dense_case("577 x 64", (2, 2, 577, 64)), torch=written_out)
    assert_keeps_budget(case, torch.float32, backend="triton", device="cuda")


@pytest.mark.parametrize("dim", [64, 128])
def test_repeats_bitwise(dim):
    inputs = [
        torch.randn(2, h, 577, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for h in (8, 2, 2)
    ]
    bias = torch.randn(1, 8, 577, 577, device="cuda", requires_grad=True)
    grad_out = torch.randn(2, 8, 577, dim, dtype=torch.bfloat16, device="cuda")

    def run():
        out = attend(*inputs, attn_mask=bias, enable_gqa=True)
        return torch.autograd.grad(out, (*inputs, bias), grad_out)

    first = run()
    for _ in range(3):
        assert_same_bits(run(), first)


def test_dropout_mask_is_the_reference_s():
    query, key = torch.randn(2, 2, 2, 70, 64, device="cuda")
    value = torch.eye(70, device="cuda").expand(2, 2, 70, 70)  # the output is the weights
    seed = torch.tensor([1 << 40 | 5], device="cuda")
    arguments = (None, None, None, 0, 0, 0, 0.1, 0.5, seed)
    weights, _ = torch.ops.vlmfast.flash_attention_triton(query, key, value, *arguments)
    assert torch.equal(weights != 0, dropout_keep_mask(2, 2, 70, 70, 0.5, seed))


def test_runs_on_the_current_stream():
    inputs, later = heads(4, 8, 197, 64), heads(4, 8, 197, 64, requires_grad=False)
    grad_out = torch.randn_like(inputs[0])
    expected = forward_and_gradients([x.clone().requires_grad_() for x in later], grad_out)
    attend(*inputs)  # compiles, which would wait for the GPU
    torch.autograd.grad(attend(*inputs), inputs, grad_out)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on any other stream would not wait for this
        with torch.no_grad():
            for x, y in zip(inputs, later, strict=True):
                x.copy_(y)
        actual = forward_and_gradients(inputs, grad_out)
    stream.synchronize()
    assert_same_bits(actual, expected)


def test_runs_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = heads(2, 2, 77, 64)
    grad_out = torch.randn_like(inputs[0])
    elsewhere = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    with torch.cuda.device(0):
        actual = forward_and_gradients(elsewhere, grad_out.to("cuda:1"))
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert_same_bits([x.to("cuda:0") for x in actual], forward_and_gradients(inputs, grad_out))


def test_does_not_synchronise():
    inputs = heads(2, 4, 197, 64)
    grad_out = torch.randn_like(inputs[0])
    options = {"is_causal": True, "dropout_p": 0.1}
    forward_and_gradients(inputs, grad_out, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_gradients(inputs, grad_out, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run):
    """A graph of run() and its results, which a replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("length", [77, 577])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_cuda_graph_replays_forward_and_backward(length, biased):
    inputs, later = heads(2, 4, length, 64), heads(2, 4, length, 64, requires_grad=False)
    grad_out = torch.randn_like(inputs[0])
    options = {"attn_mask": torch.randn(1, 4, length, length, device="cuda")} if biased else {}
    graph, results = capture(lambda: forward_and_gradients(inputs, grad_out, **options))
    with torch.no_grad():
        for x, y in zip(inputs, later, strict=True):
            x.copy_(y)
    graph.replay()
    assert_same_bits(results, forward_and_gradients(inputs, grad_out, **options))


def test_cuda_graph_replays_with_other_packed_lengths():
    inputs = [torch.randn(300, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    starts = torch.tensor([0, 100, 200, 300], dtype=torch.int32, device="cuda")

    def run():
        return [VF.varlen_attention(*inputs, starts, starts, 256, 256, backend="triton")]

    graph, results = capture(run)
    starts.copy_(torch.tensor([0, 7, 7, 263], dtype=torch.int32))
    graph.replay()
    assert_same_bits(results, run())
    assert results[0][263:].count_nonzero() == 0


def test_cuda_graph_draws_other_dropout_at_each_replay():
    inputs = heads(2, 4, 77, 64, requires_grad=False)
    graph, results = capture(lambda: [attend(*inputs, dropout_p=0.5)])
    graph.replay()
    first = results[0].clone()
    graph.replay()
    assert not torch.equal(results[0], first)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic):
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for length in (197, 257):
        inputs = heads(2, 4, length, 64)
        grad_out = torch.randn_like(inputs[0])
        expected = forward_and_gradients(inputs, grad_out)
        out = compiled(*inputs)
        actual = [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]
        assert_same_bits(actual, expected)


def test_torch_compile_with_cuda_graphs():
    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    inputs = heads(2, 4, 197, 64, requires_grad=False)
    expected = attend(*inputs)
    for _ in range(4):  # the third call replays a graph
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(*inputs).clone(), expected)


def test_memory_is_linear_in_the_length():
    inputs = heads(1, 1, 32768, 64)
    grad_out = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = forward_and_gradients(inputs, grad_out)
    kept = sum(x.numel() * x.element_size() for x in results)
    assert torch.cuda.max_memory_allocated() - before - kept <= 256 * 2**20


def test_elements_beyond_two_to_the_31():
    far = 2**31  # elements between the batch entries
    needed = 2 * (far + 64 * 64)
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed} bytes of GPU memory")
    storage = torch.empty(far + 64 * 64, dtype=torch.bfloat16, device="cuda")
    inputs = heads(2, 1, 64, 64, requires_grad=False)
    query = storage.as_strided((2, 1, 64, 64), (far, 64 * 64, 64, 1))
    query.copy_(inputs[0])
    assert torch.equal(attend(query, *inputs[1:]), attend(*inputs))


def test_autotune_gives_the_same_numbers(monkeypatch):
    monkeypatch.setenv("VLMFAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "searched", {})
    near = launch.candidates
    monkeypatch.setattr(launch, "candidates", lambda shipped: itertools.islice(near(shipped), 6))
    case = dense_case("197 x 64", (2, 4, 197, 64))
    assert_keeps_budget(case, torch.bfloat16, backend="triton", device="cuda")
    assert {shape.kernel for _, shape in launch.searched} >= {"flash_attention_fwd"}


# As many heads as fill a GPU, for the kernel that takes a head as a whole.
BATCH, HEADS = 24, 4
SHAPES = [
    *itertools.product((50, 77, 197, 257, 577), (64, 72, 80, 88, 104, 128, 256), (torch.bfloat16,)),
    *itertools.product((577,), (64, 128, 256), (torch.float16, torch.float32)),
]


@pytest.mark.parametrize(("length", "dim", "dtype"), SHAPES, ids=str)
def test_shapes_of_vision_transformers(length, dim, dtype):
    case = dense_case(f"{length} x {dim}", (BATCH, HEADS, length, dim))
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")


@pytest.mark.parametrize("feature", ["causal", "dropout", "bool mask", "bias", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("length", [77, 257])
def test_features(length, dim, dtype, feature):
    options = {
        "causal": {"is_causal": True},
        "dropout": {"dropout_p": 0.2},
        "bool mask": {"mask": random_mask(BATCH, 1, length, length)},
        "bias": {"mask": normal_bias(1, HEADS, length, length)},
        "all": {"mask": normal_bias(BATCH, 1, 1, length), "is_causal": True, "dropout_p": 0.2},
    }
    case = dense_case(feature, (BATCH, HEADS, length, dim), **options[feature])
    assert_keeps_budget(case, dtype, backend="triton", device="cuda")
