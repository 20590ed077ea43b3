"""The public function: its arguments, its errors, and how it behaves inside PyTorch."""

import math

import pytest
import torch
from torch.testing import assert_close

import vlmfast
import vlmfast.functional as VF
from tools.gradients import assert_same
from vlmfast.reference.window_attention import window_attention as reference

BACKENDS = ["cpu", "reference"]
attend = VF.shifted_window_attention

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def tensors(size=(2, 6, 7), heads=2, dim=8, window=(3, 4), dtype=torch.float32):
    """qkv, bias and pad_value that require gradients."""
    tokens = window[0] * window[1]
    qkv = normal(*size, 3 * heads * dim, dtype=dtype)
    bias, pad = normal(heads, tokens, tokens), normal(3 * heads * dim)
    return [x.requires_grad_() for x in (qkv, bias, pad)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrap", ["padded", "unpadded"])
@pytest.mark.parametrize("cosine", [False, True])
def test_arguments_mean_what_the_reference_says(cosine, wrap, backend):
    qkv, bias, pad = inputs = tensors()
    logit_scale = None
    if cosine:
        logit_scale = (1 + torch.rand(2)).requires_grad_()
        inputs.append(logit_scale)
    ours = attend(
        qkv,
        2,
        (3, 4),
        (1, 2),
        bias,
        logit_scale=logit_scale,
        scale=0.4,
        mask_value=-3.0,
        pad_value=pad,
        wrap=wrap,
        backend=backend,
    )
    args = (qkv, None, None, bias, logit_scale, pad, 2, 3, 4, 1, 2, wrap == "padded", 0.4, -3.0)
    assert_same(ours, reference(*args)[0], inputs)
    assert ours.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults(backend):
    qkv, _, _ = tensors()
    ours = attend(qkv, 2, (3, 4), backend=backend)
    expected, _ = reference(qkv, *[None] * 5, 2, 3, 4, scale=1 / math.sqrt(8))
    assert_same(ours, expected, [qkv])
    shifted = attend(qkv, 2, [3, 4], [1, 2], backend=backend)
    expected, _ = reference(qkv, *[None] * 5, 2, 3, 4, 1, 2, scale=1 / math.sqrt(8))
    assert_same(shifted, expected, [qkv])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tuple_of_three_tensors(backend):
    qkv, bias, pad = tensors()
    parts = [x.detach().clone().requires_grad_() for x in qkv.chunk(3, -1)]
    options = {"pad_value": pad, "backend": backend}
    ours = attend(tuple(parts), 2, (3, 4), (1, 2), bias, **options)
    packed = attend(qkv, 2, (3, 4), (1, 2), bias, **options)
    assert_close(ours, packed)
    grad = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, parts, grad)
    assert_close(torch.cat(gradients, -1), torch.autograd.grad(packed, qkv, grad)[0])


def test_shift_is_obeyed_where_one_window_covers_the_map():
    qkv, _, _ = tensors(size=(1, 3, 4))
    shifted = attend(qkv, 2, (3, 4), (1, 2))
    assert not torch.allclose(shifted, attend(qkv, 2, (3, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 6, 7), (2, 0, 7), (2, 6, 0)])
def test_empty_sizes(size, backend):
    inputs = tensors(size=size)
    qkv, bias, pad = inputs
    out = attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad, backend=backend)
    assert out.shape == (*size, 16)
    for x, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_float64_beside_narrower_qkv_is_narrowed_and_gets_its_gradient():
    qkv, bias, pad = tensors(dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (bias, pad)]
    out = attend(qkv, 2, (3, 4), (1, 2), wide[0], pad_value=wide[1])
    assert torch.equal(out, attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad))
    assert all(x.dtype == torch.float64 for x in torch.autograd.grad(out.sum(), wide))


@pytest.mark.parametrize("argument", ["relative_position_bias", "logit_scale", "pad_value"])
def test_float64_beyond_float32_is_refused_where_it_would_be_narrowed(argument):
    shape = {"relative_position_bias": (2, 12, 12), "logit_scale": (2,), "pad_value": (48,)}
    wide = torch.full(shape[argument], -1e39, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{argument}: expected values that float32 holds"):
        attend(normal(1, 3, 4, 48), 2, (3, 4), **{argument: wide})
    attend(normal(1, 3, 4, 48), 2, (3, 4), **{argument: torch.full_like(wide, 1e38)})
    attend(normal(1, 3, 4, 48).double(), 2, (3, 4), **{argument: wide})


def test_float64_runs_by_the_reference():
    qkv, bias, _ = (x.detach().double() for x in tensors())
    assert vlmfast.explain(attend, qkv, 2, (3, 4), (1, 2), bias).backend == "reference"
    assert attend(qkv, 2, (3, 4), (1, 2), bias).dtype == torch.float64
    with pytest.raises(NotImplementedError, match=r"computes in float32, bfloat16 or float16"):
        attend(qkv, 2, (3, 4), backend="cpu")


def test_explanation_names_what_runs():
    qkv, bias, _ = tensors()
    explanation = vlmfast.explain(attend, qkv, 2, (3, 4), (1, 2), bias)
    assert explanation.family == "window_attention" and explanation.backend == "cpu"
    assert {"triton", "cuda"} <= set(explanation.refusals)


def test_windows_beyond_the_kernels_run_on_the_reference():
    qkv, _, _ = tensors()
    explanation = vlmfast.explain(attend, qkv, 2, (1, 1 << 14))
    assert explanation.backend == "cpu"
    assert "takes windows of up to 1024 tokens, got 1 x 16384" in explanation.refusals["triton"]
    explanation = vlmfast.explain(attend, qkv, 2, (129, 128))
    assert explanation.backend == "reference"
    assert "takes windows of up to 16384 tokens, got 129 x 128" in explanation.refusals["cpu"]


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_repeats_from_the_generator_and_matches_the_reference():
    qkv, bias, pad = inputs = tensors()

    def compute(backend, seed):
        torch.manual_seed(seed)
        out = attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad, dropout_p=0.3, backend=backend)
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    first = compute("cpu", 1)
    for x, y in zip(compute("cpu", 1), first, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(compute("reference", 1), first, strict=True):
        assert_close(x, y)
    assert not torch.equal(compute("cpu", 2)[0], first[0])


def test_no_dropout_draws_no_random_number():
    qkv, _, _ = tensors()
    state = torch.get_rng_state()
    attend(qkv, 2, (3, 4), dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not attend(qkv, 2, (3, 4), dropout_p=1.0).any()


# --- errors -------------------------------------------------------------------------------------

QKV, PART = torch.zeros(2, 6, 7, 48), torch.zeros(2, 6, 7, 16)


def bad(*args, **options):
    defaults = (QKV, 2, (3, 4), (1, 2))
    return lambda: attend(*args, *defaults[len(args) :], **options)


BAD_CALLS = [
    (TypeError, "qkv: expected a tensor or a tuple of three, got str", bad("x")),
    (TypeError, "qkv: expected a floating dtype, got torch.int64", bad(QKV.long())),
    (ValueError, r"qkv: expected shape \(batch, height, width, 3", bad(torch.tensor(1.0))),
    (ValueError, r"qkv: expected shape \(batch, height, width, 3", bad(QKV[0])),
    (ValueError, r"qkv: expected shape .* got \(2, 6, 7, 47\)", bad(QKV[..., :47])),
    (ValueError, "qkv: expected a tensor or a tuple of three, got a tuple of 2", bad((PART, PART))),
    (TypeError, r"qkv\[1\]: expected a tensor", bad((PART, None, PART))),
    (TypeError, r"qkv\[2\]: expected the dtype of qkv\[0\]", bad((PART, PART, PART.half()))),
    (ValueError, r"qkv\[1\]: expected the device", bad((PART, PART.to("meta"), PART))),
    (ValueError, r"qkv\[1\]: expected the shape", bad((PART, PART[:1], PART))),
    (ValueError, r"qkv\[0\]: expected shape", bad((PART[0], PART[0], PART[0]))),
    (ValueError, "num_heads: expected a number that divides the 16 channels, got 3", bad(QKV, 3)),
    (ValueError, "num_heads: expected at least 1, got 0", bad(QKV, 0)),
    (ValueError, "num_heads: expected at least 1, got -2", bad(QKV, -2)),
    (TypeError, "num_heads: expected an int, got float", bad(QKV, 2.0)),
    (TypeError, "window_size: expected a pair of ints, got int", bad(QKV, 2, 7)),
    (ValueError, "window_size: expected a pair of ints", bad(QKV, 2, (7, 7, 7))),
    (TypeError, "window_size: expected an int, got float", bad(QKV, 2, (7.0, 7))),
    (ValueError, r"window_size: expected at least 1 token .*\(0, 4\)", bad(QKV, 2, (0, 4))),
    (ValueError, r"window_size: expected at least 1 token .*\(3, -1\)", bad(QKV, 2, (3, -1))),
    (
        ValueError,
        r"shift_size: expected at least 0 and below.*\(3, 0\)",
        bad(QKV, 2, (3, 4), (3, 0)),
    ),
    (ValueError, "shift_size: expected at least 0 and below", bad(QKV, 2, (3, 4), (0, 9))),
    (ValueError, "shift_size: expected at least 0 and below", bad(QKV, 2, (3, 4), (-1, 0))),
    (
        ValueError,
        r"relative_position_bias: expected shape \(2, 12, 12\), got \(2, 12, 11\)",
        bad(QKV, 2, (3, 4), (1, 2), torch.zeros(2, 12, 11)),
    ),
    (
        TypeError,
        "relative_position_bias: expected a floating dtype",
        bad(QKV, 2, (3, 4), (1, 2), torch.zeros(2, 12, 12).int()),
    ),
    (
        ValueError,
        "relative_position_bias: expected the device",
        bad(QKV, 2, (3, 4), (1, 2), torch.zeros(2, 12, 12, device="meta")),
    ),
    (ValueError, r"logit_scale: expected shape \(2,\)", bad(logit_scale=torch.ones(2, 1, 1))),
    (TypeError, "logit_scale: expected a tensor", bad(logit_scale=10.0)),
    (ValueError, r"pad_value: expected shape \(48,\), got \(16,\)", bad(pad_value=torch.ones(16))),
    (TypeError, "scale: expected a number or None", bad(scale="1")),
    (TypeError, "mask_value: expected a number", bad(mask_value=None)),
    (ValueError, "mask_value: expected a finite number, .* got -inf", bad(mask_value=-math.inf)),
    (ValueError, "mask_value: expected a finite number", bad(mask_value=-1e39)),
    (ValueError, "scale: expected a finite number, .* got 1e.39", bad(scale=1e39)),
    (ValueError, "window_size: expected at most", bad(QKV, 2, (2**63, 7))),
    (ValueError, "num_heads: expected at most", bad(QKV, 2**63)),
    (
        ValueError,
        "qkv: expected at most 1073741824 rows, got 2147483648",
        bad(QKV[:, :1].expand(-1, 2**31, -1, -1), 2),
    ),
    (TypeError, "num_heads: expected an int, got bool", bad(QKV, True)),
    (ValueError, "wrap: expected 'padded' or 'unpadded', got 'both'", bad(wrap="both")),
    (ValueError, "dropout_p: expected a probability", bad(dropout_p=1.5)),
    (ValueError, "backend: expected one of 'cpu'.*got 'gpu'", bad(backend="gpu")),
]


@pytest.mark.parametrize(
    "error, message, call", BAD_CALLS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- inside PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    qkv, bias, pad = inputs = tensors()
    with torch.autocast("cpu", dtype):
        out = attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad)
        assert out.dtype == dtype
        assert attend(qkv.double(), 2, (3, 4)).dtype == torch.float64
        by_reference = attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad, backend="reference")
    # only qkv is rounded
    exact = attend(qkv.to(dtype).double(), 2, (3, 4), (1, 2), bias.double(), pad_value=pad.double())
    assert_close(by_reference, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = tensors()
    out = attend(inputs[0].detach().to("meta"), 2, (3, 4), (1, 2))
    assert out.device.type == "meta" and out.shape == (2, 6, 7, 16)
    with FakeTensorMode() as mode:
        qkv, bias, pad = (mode.from_tensor(x) for x in inputs)
        out = attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad)
        assert out.shape == (2, 6, 7, 16)
        out.sum().backward()


def test_inference_mode():
    qkv, bias, pad = tensors()
    with torch.inference_mode():
        out = attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad)
    assert out.is_inference()
    assert torch.equal(out, attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad))


COMPILED = {
    "packed": lambda qkv, bias, pad: attend(qkv, 2, (3, 4), (1, 2), bias, pad_value=pad),
    "unpadded": lambda qkv, bias, pad: attend(
        qkv, 2, (3, 4), (1, 2), bias, pad_value=pad, wrap="unpadded"
    ),
    "three": lambda qkv, bias, pad: attend(
        qkv.chunk(3, -1), 2, (3, 4), (1, 2), bias, pad_value=pad
    ),
    "cosine": lambda qkv, bias, pad: attend(
        qkv, 2, (3, 4), (1, 2), bias, logit_scale=bias[:, 0, 0].exp(), pad_value=pad
    ),
    "window of the map": lambda qkv, bias, pad: attend(
        qkv, 2, (min(qkv.shape[1], 3), 4), (0, 0), bias, pad_value=pad
    ),
    "reference": lambda qkv, bias, pad: attend(
        qkv, 2, (3, 4), (1, 2), bias, pad_value=pad, backend="reference"
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks(name, dynamic):
    function = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 6, 7), (3, 9, 11)):
        inputs = tensors(size=size)
        assert_same(compiled(*inputs), function(*inputs), inputs)


def test_compile_with_dynamic_shapes_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED["packed"], fullgraph=True, backend=counter, dynamic=True)
    # a batch of 2 would pass for the number of heads, and be taken to be that constant
    compiled(*tensors(size=(5, 6, 7)))
    first = counter.frame_count
    for size in ((3, 9, 11), (4, 13, 5)):
        compiled(*tensors(size=size))
    assert counter.frame_count == first


def test_compile_with_inductor():
    def block(x, weight, bias):
        out = attend(x @ weight, 2, (3, 4), (1, 2), bias.sigmoid())
        return out.sin() * x

    inputs = [normal(2, 6, 7, 16), normal(16, 48) / 8, normal(2, 12, 12)]
    inputs = [x.requires_grad_() for x in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    assert_same(compiled(*inputs), block(*inputs), inputs)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, qkv, bias):
            return attend(qkv, 2, (3, 4), (1, 2), bias)

    qkv, bias, _ = (x.detach() for x in tensors())
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(
        Layer(), (qkv, bias), dynamic_shapes=({1: height, 2: width}, None)
    )
    larger = normal(2, 10, 9, 48)
    assert_close(program.module()(larger, bias), attend(larger, 2, (3, 4), (1, 2), bias))


def test_vmap():
    qkv, bias, pad = (x.detach() for x in tensors())
    many = torch.stack([qkv, 2 * qkv, qkv + 1])
    outs = torch.vmap(lambda x: attend(x, 2, (3, 4), (1, 2), bias, pad_value=pad))(many)
    for out, x in zip(outs, many, strict=True):
        assert torch.equal(out, attend(x, 2, (3, 4), (1, 2), bias, pad_value=pad))


def test_parameters_and_subclasses_of_tensors():
    class Tagged(torch.Tensor):
        pass

    qkv, bias, _ = tensors()
    expected = attend(qkv, 2, (3, 4), (1, 2), bias)
    assert torch.equal(attend(torch.nn.Parameter(qkv.detach()), 2, (3, 4), (1, 2), bias), expected)
    tagged = attend(qkv.detach().as_subclass(Tagged), 2, (3, 4), (1, 2), bias.detach())
    assert torch.equal(torch.Tensor(tagged), expected)
