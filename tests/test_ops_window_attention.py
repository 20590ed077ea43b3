"""The operators, and through them the CPU kernels, in every instruction set of this machine."""

import math
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tools.budget import assert_keeps_budget
from tools.memory import ROOT, peak_memory
from tools.window_attention import with_lengths
from vlmfast.functional import shifted_window_attention
from vlmfast.ops import window_attention as ops
from vlmfast.reference.window_attention import window_attention as reference
from vlmfast.verify.window_attention import CASES, window_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORWARD, BACKWARD = ops.FORWARD["cpu"], ops.BACKWARD["cpu"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def sample(
    size=(2, 5, 7),
    heads=2,
    dim=8,
    window=(3, 4),
    shift=(1, 2),
    packed=True,
    cosine=False,
    dtype=torch.float32,
    requires_grad=False,
    **options,
):
    """The operator's arguments, in order: every tensor that there can be."""
    channels, tokens = heads * dim, window[0] * window[1]
    if packed:
        tensors = [normal(*size, 3 * channels, dtype=dtype), None, None]
    else:
        tensors = [normal(*size, channels, dtype=dtype) for _ in range(3)]
    tensors += [
        normal(heads, tokens, tokens),
        1.0 + torch.rand(heads) if cosine else None,
        normal(3 * channels),
    ]
    tensors = [None if x is None else x.requires_grad_(requires_grad) for x in tensors]
    defaults = {"wrap_padded": True, "scale": 0.3, "mask_value": -100.0, "dropout_p": 0.0}
    seed = torch.tensor([11]) if "dropout_p" in options else None
    return (*tensors, heads, *window, *shift, *{**defaults, **options}.values(), seed)


def leaves(args):
    return [x for x in args[:6] if x is not None]


def backward_arguments(args, grad_out, wanted=(True, True, True, True)):
    out, logsumexp = FORWARD(*args)
    return (grad_out, *args[:6], out, logsumexp, *args[6:], *wanted)


def compute(args, grad_out):
    """Results and gradients, without those that nobody has asked for."""
    results = (*FORWARD(*args), *BACKWARD(*backward_arguments(args, grad_out)))
    return [x for x in results if x.shape != (0,)]


VARIANTS = {
    "packed": {},
    "three tensors": {"packed": False},
    "cosine": {"cosine": True},
    "before padding": {"wrap_padded": False},
    "dropout": {"dropout_p": 0.4},
}


# --- what torch asks of an operator -------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_forward(variant, requires_grad):
    torch.library.opcheck(FORWARD, sample(requires_grad=requires_grad, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_backward(variant):
    args = sample(**VARIANTS[variant])
    grad_out = normal(2, 5, 7, 16)
    torch.library.opcheck(BACKWARD, backward_arguments(args, grad_out))


def test_opcheck_without_what_is_optional():
    args = (normal(2, 5, 7, 48), *[None] * 5, *sample()[6:])
    torch.library.opcheck(FORWARD, args)
    torch.library.opcheck(BACKWARD, backward_arguments(args, normal(2, 5, 7, 16)))


def test_gradients_that_are_not_wanted_are_empty():
    args = sample(cosine=True, packed=False)
    grad_out = normal(2, 5, 7, 16)
    full = BACKWARD(*backward_arguments(args, grad_out))
    for at in range(4):
        wanted = tuple(i == at for i in range(4))
        gradients = BACKWARD(*backward_arguments(args, grad_out, wanted))
        flags = (wanted[0],) * 3 + wanted[1:]
        for gradient, whole, flag in zip(gradients, full, flags, strict=True):
            if flag:
                assert torch.equal(gradient, whole)
            else:
                assert gradient.shape == (0,) and gradient.dtype == whole.dtype


def test_gradient_of_packed_qkv_comes_in_one_piece():
    args = sample(requires_grad=True)
    out, _ = FORWARD(*args)
    gradients = BACKWARD(*backward_arguments(args, torch.ones_like(out)))
    assert gradients[0].shape == args[0].shape and gradients[0].is_contiguous()
    assert gradients[1].shape == gradients[2].shape == (0,)


def test_nothing_is_saved_without_gradients():
    args = sample(requires_grad=True)
    with torch.no_grad():
        assert FORWARD(*args)[0].grad_fn is None
    with torch.inference_mode():
        assert FORWARD(*args)[0].is_inference()
    assert FORWARD(*sample())[0].grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        FORWARD(*args)
    assert len(saved) == 5  # qkv, bias, pad_value, out, logsumexp; and no M x M weights


def test_logsumexp_is_not_differentiable():
    out, logsumexp = FORWARD(*sample(requires_grad=True))
    assert out.requires_grad and not logsumexp.requires_grad


def test_second_derivatives_fail_clearly_and_first_ones_with_create_graph_do_not():
    args = sample(requires_grad=True)
    (gradient,) = torch.autograd.grad(FORWARD(*args)[0].sin().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.sum().backward()


def test_forward_mode_fails_clearly():
    qkv, *rest = sample()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: FORWARD(x, *rest)[0], (qkv,), (qkv,))


@pytest.mark.filterwarnings("error")
def test_functional_transforms():
    _, *rest = sample()
    qkv = normal(3, 2, 5, 7, 48)

    def loss(qkv):
        return FORWARD(qkv, *rest)[0].sin().sum()

    def exact(qkv):
        return reference(qkv, *rest)[0].sin().sum()

    assert_close(torch.vmap(loss)(qkv), torch.vmap(exact)(qkv))
    gradients = torch.vmap(torch.func.grad(loss))(qkv)
    assert_close(gradients, torch.vmap(torch.func.grad(exact))(qkv))


def test_flops_count_products_of_whole_windows():
    args = sample(requires_grad=True)
    pairs = 2 * (2 * 2) * 2 * 12**2  # batch, windows, heads, tokens
    with FlopCounterMode(display=False) as counter:
        out, _ = FORWARD(*args)
    assert counter.get_total_flops() == 2 * 2 * pairs * 8
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 5 * pairs * 8
    with FlopCounterMode(display=False) as counter:
        reference(*args)
    assert counter.get_total_flops() == 2 * 2 * pairs * 8


def test_meta_tensors():
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in sample()]
    out, logsumexp = FORWARD(*args)
    assert out.shape == (2, 5, 7, 16) and logsumexp.shape == (2, 4, 2, 12)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_keep_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


# Windows around the tiles of every variant, and head dims of every kind.
SHAPES = [
    window_case("one token", (2, 2, 3), 2, 8, (1, 1)),
    window_case("4 x 4", (1, 8, 8), 2, 16, (4, 4), (2, 2)),
    window_case("5 x 5", (1, 9, 10), 2, 40, (5, 5), (2, 2)),
    window_case("9 x 9", (1, 9, 18), 1, 32, (9, 9), (4, 4)),
    window_case("11 x 3", (1, 11, 6), 2, 8, (11, 3), (10, 1)),
    window_case("12 x 12", (1, 24, 12), 1, 32, (12, 12), (6, 6)),
    window_case("16 x 16", (1, 16, 16), 1, 32, (16, 16), cosine=True),
    window_case("24 x 24", (1, 24, 24), 1, 32, (24, 24)),
    window_case("head dim 5", (1, 7, 7), 2, 5, (7, 7), packed=False),
    window_case("head dim 72", (1, 7, 14), 1, 72, (7, 7), (3, 3), cosine=True),
    window_case("head dim 128", (1, 8, 8), 1, 128, (8, 8), (4, 4)),
    window_case("shift of nearly a window", (1, 7, 10), 2, 16, (4, 5), (3, 4), wrap_padded=False),
    window_case("shift above the map", (1, 3, 4), 2, 16, (7, 7), (5, 6), wrap_padded=False),
    window_case("no bias", (1, 14, 7), 2, 32, (7, 7), (3, 0), bias_std=None, pad_value=False),
    window_case("scale 0", (1, 7, 7), 2, 32, (7, 7), scale=0.0),
    window_case("negative scale", (1, 7, 7), 2, 32, (7, 7), scale=-0.2),
    window_case("mask of 0", (1, 14, 14), 2, 16, (7, 7), (3, 3), mask_value=0.0),
    window_case("many windows", (2, 56, 56), 1, 8, (7, 7), (3, 3)),
    window_case("cosine, dropout", (1, 12, 10), 2, 16, (7, 7), (3, 3), cosine=True, dropout_p=0.5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_odd_shapes_keep_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


EXTREMES = [
    # Far beyond what exp takes: the softmax is one-hot.
    window_case("huge logits", (1, 14, 14), 1, 16, (7, 7), scale=100.0),
    window_case("huge negative scale", (1, 14, 14), 1, 16, (7, 7), scale=-100.0),
    window_case("logits of 1e9", (1, 7, 7), 1, 16, (7, 7), scale=1e9),
    window_case("logits of -1e36", (1, 8, 8), 1, 16, (8, 8), scale=-1e36),
    # A maximum taken over padding of zeros would lose every weight.
    window_case("all logits far below 0", (1, 14, 14), 1, 16, (7, 7), (3, 3), bias_mean=-1e4),
    window_case("all logits far above 0", (1, 14, 14), 1, 16, (7, 7), (3, 3), bias_mean=1e4),
    window_case("mask below every bias", (1, 14, 14), 1, 16, (7, 7), (3, 3), mask_value=-1e9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EXTREMES, ids=lambda case: case.name)
def test_extreme_logits_keep_the_budget(case, dtype, cpu_isa):
    if cpu_isa == "base" and dtype == torch.float32 and "huge" in case.name:
        pytest.skip("torch fuses multiply and add; without, a logit of hundreds is rounded twice")
    assert_keeps_budget(case, dtype)


# Most keys are equal, so are their terms in every sum over keys, and so is what rounding takes.
PADDED = [
    window_case("zeros", (1, 5, 5), 2, 32, (10, 16), cosine=True, bias_std=None, pad_value=False),
    window_case("values", (1, 2, 5), 2, 32, (10, 16), cosine=True, bias_std=None),
    window_case("one token", (1, 1, 1), 2, 32, (7, 7)),
    window_case("one token, cosine", (1, 1, 1), 2, 32, (12, 12), cosine=True, bias_std=None),
]


@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.name)
def test_windows_that_are_mostly_padding_keep_the_budget(case, cpu_isa):
    assert_keeps_budget(case, torch.float32)


COSINES = [
    window_case("with a last query", (1, 7, 9), 2, 24, (7, 7), (3, 3), cosine=True),
    window_case("in tiles", (1, 5, 9), 1, 32, (8, 6), (3, 3), cosine=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COSINES, ids=lambda case: case.name)
def test_cosines_do_not_depend_on_lengths(case, dtype, cpu_isa):
    """Powers of two change no digit of a cosine, however little of their squares float32 holds."""
    half = [(12, 12), (-10, 12)]
    exponents = [(60, 60), (100, 100), (120, 120), (120, -30), (0, 120), (-30, -30)]
    for longer in half if dtype == torch.float16 else exponents:
        assert_keeps_budget(case, dtype, kernel=with_lengths(case, *longer, "cpu"))


def test_logit_scale_keeps_its_sign(cpu_isa):
    case = window_case("", (1, 7, 7), 1, 16, (7, 7), cosine=True)
    signs = torch.tensor([-1.0, 1.0, 1.0]).repeat_interleave(16)

    def negative(inputs):
        flipped = {"query": inputs["query"] * signs, "logit_scale": -inputs["logit_scale"]}
        flipped["pad_value"] = inputs["pad_value"] * signs
        return case.kernel({**inputs, **flipped}, "cpu")

    assert_keeps_budget(case, torch.float32, kernel=negative)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_row_of_the_lowest_bias_is_a_mean(sign, cpu_isa):
    case = window_case("", (1, 7, 7), 2, 16, (7, 7), bias_std=None, pad_value=False)
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32, "cpu")
    inputs["bias"] = torch.zeros(2, 49, 49)
    inputs["bias"][:, 5] = sign * torch.finfo(torch.float32).max
    out = case.kernel(inputs, "cpu")["out"]
    values = inputs["query"][0, :, :, 64:]
    assert_close(out[0, 0, 5], values.mean((0, 1)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry(data):
    """Every window, shift, size and number of channels, forward and each gradient."""
    draw = data.draw
    window = (draw(st.integers(1, 13)), draw(st.integers(1, 13)))
    shift = tuple(draw(st.integers(0, by - 1)) for by in window)
    size = (draw(st.integers(1, 2)), draw(st.integers(1, 25)), draw(st.integers(1, 25)))
    args = sample(
        size=size,
        heads=draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 40)),
        window=window,
        shift=shift,
        packed=draw(st.booleans()),
        wrap_padded=draw(st.booleans()),
        requires_grad=True,
    )
    out, _ = FORWARD(*args)
    exact = [x.detach().double().requires_grad_() for x in leaves(args)]
    left = iter(exact)
    tensors = [None if x is None else next(left) for x in args[:6]]
    truth, _ = reference(*tensors, *args[6:])
    grad = normal(*out.shape)
    assert_close(out, truth.float(), rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(out, leaves(args), grad)
    theirs = torch.autograd.grad(truth, exact, grad.double(), materialize_grads=True)
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y.float(), rtol=1e-3, atol=1e-4)


def strided(shape, strides, dtype):
    """A random tensor of a shape whose memory is laid out in one of several ways."""
    batch, height, width, channels = shape
    if strides == "expanded":
        return normal(batch, 1, width, channels, dtype=dtype).expand(shape)
    if strides == "channels first":
        return normal(batch, channels, height, width, dtype=dtype).permute(0, 2, 3, 1)
    if strides == "steps":
        return normal(*(2 * size for size in shape), dtype=dtype)[::2, ::2, ::2, ::2]
    if strides == "offset":
        return normal(*(size + 3 for size in shape), dtype=dtype)[1:-2, 2:-1, 1:-2, 2:-1]
    if strides == "columns first":
        return normal(batch, width, height, channels, dtype=dtype).transpose(1, 2)
    return normal(*shape, dtype=dtype)


STRIDES = ["expanded", "channels first", "steps", "offset", "columns first"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("packed", [True, False])
def test_any_strides(packed, strides, dtype):
    """Whatever the layout, forward and backward are bit for bit those of the dense copy."""
    args = sample(packed=packed, dtype=dtype)
    qkv = [None if x is None else strided(x.shape, strides, dtype) for x in args[:3]]
    bias = normal(12, 2, 12).permute(1, 2, 0)
    grad_out = strided((2, 5, 7, 16), strides, dtype)
    ours = compute((*qkv, bias, *args[4:]), grad_out)
    dense = [None if x is None else x.contiguous().clone() for x in qkv]
    expected = compute((*dense, bias.contiguous(), *args[4:]), grad_out.contiguous().clone())
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_plain_sum(dtype, cpu_isa):
    """out.sum().backward() hands over a gradient of strides 0."""
    args = sample(dtype=dtype, requires_grad=True)
    out, _ = FORWARD(*args)
    expanded = torch.autograd.grad(out.sum(), leaves(args), retain_graph=True)
    dense = torch.autograd.grad(out, leaves(args), torch.ones_like(out).contiguous())
    for x, y in zip(expanded, dense, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("beside", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_beside_qkv_keep_their_dtype(dtype, beside):
    args = sample(cosine=True, dtype=dtype)
    args = (*args[:3], *(x.to(beside) for x in args[3:6]), *args[6:])
    gradients = BACKWARD(*backward_arguments(args, normal(2, 5, 7, 16, dtype=dtype)))
    assert gradients[0].dtype == dtype
    assert all(x.dtype == beside for x in gradients[3:])


def test_float32_bias_is_not_rounded_beside_half_precision(cpu_isa):
    """Differences of 2^-12 around 1, which bfloat16 does not have, move the weights."""
    args = list(sample(dtype=torch.bfloat16, size=(1, 3, 4), shift=(0, 0)))
    args[0] = torch.zeros_like(args[0])
    args[0][..., 32:] = normal(1, 3, 4, 16)
    args[3] = 8.0 + torch.rand(2, 12, 12) / 64
    _, logsumexp = FORWARD(*args)
    assert_close(logsumexp[0, 0], args[3].logsumexp(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_sizes(size, cpu_isa):
    args = sample(size=size, cosine=True, requires_grad=True)
    out, logsumexp = FORWARD(*args)
    assert out.shape == (*size, 16) and logsumexp.numel() == 0
    for gradient, x in zip(torch.autograd.grad(out.sum(), leaves(args)), leaves(args), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_nan_stays_in_its_window_head_and_image(cpu_isa):
    args = sample(size=(2, 14, 14), heads=3, window=(7, 7), shift=(3, 3))
    args = (*args[:5], None, *args[6:])
    grad_out = normal(2, 14, 14, 24)
    clean, clean_gradient = FORWARD(*args)[0], BACKWARD(*backward_arguments(args, grad_out))[0]
    for part in range(3):
        dirty = args[0].clone()
        # place (5, 6) of image 1 lies in window (0, 0) of the shifted map: rows and columns 3 to 9
        dirty[1, 5, 6, part * 24 + 8] = math.nan  # head 1
        spoilt = (dirty, *args[1:])
        out, _ = FORWARD(*spoilt)
        gradient = BACKWARD(*backward_arguments(spoilt, grad_out))[0]
        assert out[1, 3:10, 3:10, 8:16].isnan().any()
        for result, expected in ((out, clean), (gradient, clean_gradient)):
            heads = result.unflatten(-1, (-1, 3, 8)).clone()
            heads[1, 3:10, 3:10, :, 1] = 0.0
            truth = expected.unflatten(-1, (-1, 3, 8)).clone()
            truth[1, 3:10, 3:10, :, 1] = 0.0
            assert torch.equal(heads, truth)


def test_bits_repeat_from_run_to_run(cpu_isa):
    args = sample(
        size=(3, 30, 25), heads=3, dim=16, window=(7, 7), shift=(3, 3), cosine=True, dropout_p=0.2
    )
    grad_out = normal(3, 30, 25, 48)
    first = compute(args, grad_out)
    for _ in range(4):
        for x, y in zip(compute(args, grad_out), first, strict=True):
            # rows of padded queries are anything in logsumexp, but the same in every run
            assert torch.equal(x, y)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_mask_is_that_of_the_reference(p, cpu_isa):
    """With one-hot values the output is the dropped weights themselves."""
    args = sample(size=(1, 7, 7), heads=1, dim=49, window=(7, 7), shift=(0, 0), dropout_p=p)
    args[0].view(49, -1)[:, 98:] = torch.eye(49)
    weights, expected = FORWARD(*args)[0], reference(*args)[0]
    assert torch.equal(weights == 0, expected == 0)
    assert_close(weights, expected)


def test_gradient_of_pad_value_does_not_round_with_every_token(cpu_isa):
    """Thousands of padded tokens add the same to it; to round each time would lean one way."""
    qkv, pad_value = torch.zeros(64, 33, 33, 24), torch.zeros(24, requires_grad=True)
    grad = torch.full((64, 33, 33, 8), 0.1)
    exact = pad_value.detach().double().requires_grad_()
    gradients = []
    for x, pad in ((qkv, pad_value), (qkv.double(), exact)):
        out = shifted_window_attention(x, 1, (4, 4), (0, 0), pad_value=pad)
        gradients += torch.autograd.grad(out, pad, grad.to(x.dtype))
    assert gradients[1][16:].min() > 100
    rounding = torch.finfo(torch.float32).eps
    assert_close(gradients[0].double(), gradients[1], rtol=4 * rounding, atol=0)


def test_rows_of_length_zero_have_cosine_zero(cpu_isa):
    args = sample(cosine=True, requires_grad=True)
    with torch.no_grad():
        args[0][0, 1:3, :, :32] = 0.0
    out, _ = FORWARD(*args)
    exact = [x.detach().double().requires_grad_() for x in leaves(args)]
    qkv, bias, logit_scale, pad = exact
    truth, _ = reference(qkv, None, None, bias, logit_scale, pad, *args[6:])
    assert_close(out, truth.float())
    grad = normal(*out.shape)
    ours = torch.autograd.grad(out, leaves(args), grad)
    theirs = torch.autograd.grad(truth, exact, grad.double())
    # 1 / 1e-12 multiplies what there is no norm for
    zero = args[0].detach() == 0
    assert_close(ours[0][~zero], theirs[0].float()[~zero], rtol=1e-4, atol=1e-5)
    assert_close(ours[0][zero] / 1e12, theirs[0].float()[zero] / 1e12, rtol=1e-4, atol=1e-6)
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        assert_close(x, y.float(), rtol=1e-4, atol=1e-5)


MEMORY_SETUP = """
import torch
from vlmfast.functional import shifted_window_attention

def run(side):
    qkv = torch.randn(1, side, side, 96, requires_grad=True)
    shifted_window_attention(qkv, 4, (side, side)).sum().backward()

run(8)
"""


def test_memory_of_a_large_window_without_bias():
    """The logits of one head, or a bias of zeros, would be 64 MiB."""
    assert peak_memory(MEMORY_SETUP, "run(64)") < 48


MANY_WINDOWS = """
import signal
import torch
from vlmfast.ops.window_attention import BACKWARD

signal.signal(signal.SIGALRM, signal.SIG_DFL)
torch.set_num_threads(1)
qkv, grad = (torch.zeros(channels).expand(1, 65536, 65536, -1) for channels in (3, 1))
args = grad, qkv, None, None, None, torch.ones(1), None, grad, grad
signal.setitimer(signal.ITIMER_REAL, 0.3)
BACKWARD["cpu"](*args, 1, 1, 1, 0, 0, True, 1.0, 0.0, 0.0, None, False, False, True, False)
"""


def test_more_windows_than_32_bits_count():
    """2^32 of them would take an hour: the alarm must find the process alive."""
    child = subprocess.run(
        [sys.executable, "-c", MANY_WINDOWS], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert child.returncode == -signal.SIGALRM, child.stderr


def test_operators_guard_memory_against_any_caller():
    args = sample()
    bad = {
        0: normal(2, 5, 7, 47),
        1: normal(2, 5, 7, 16),
        3: normal(2, 12, 11),
        4: normal(3),
        5: normal(47),
        6: 5,
        7: 0,
        8: 1 << 40,
        9: 3,
        10: -1,
        13 + 1: 2.0,
    }
    for at, value in bad.items():
        wrong = list(args)
        wrong[at] = value
        with pytest.raises(RuntimeError):
            FORWARD(*wrong)
    for grad_out in (normal(2, 5, 7, 15), normal(2, 5, 6, 16), normal(2, 5, 7, 16).bfloat16()):
        with pytest.raises(RuntimeError):
            BACKWARD(*backward_arguments(args, grad_out))
