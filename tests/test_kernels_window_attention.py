"""The Triton kernels of window_attention, interpreted, against float64.

Every launch runs under the guard: memory beyond the arguments, races between programs, undefined
lanes and the order of programs all show.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.budget import assert_keeps_budget
from vlmfast.ops import window_attention as ops
from vlmfast.reference import window_attention as reference
from vlmfast.reference.common import dropout_keep_mask
from vlmfast.verify.common import Case, Inputs, Tensors

pytestmark = pytest.mark.interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value", "bias", "logit_scale", "pad_value")
SEED = torch.tensor([123456789012345])


@pytest.fixture(autouse=True)
def watch():
    from tools.guard import guarded

    with guarded(seed=3):
        yield


def arguments(inputs: Inputs) -> list:
    return [inputs.get(name) for name in TENSORS] + list(inputs["numbers"])


def in_windows(inputs: Inputs, grad_out: Tensor | None = None) -> dict:
    """query, key, value and grad_out as (B, windows, heads, M, D), and what belongs to them."""
    heads, height, width, *shift, wrap_padded = inputs["numbers"][:6]
    query, key, value = (inputs.get(name) for name in TENSORS[:3])
    if key is None:
        query, key, value = query.chunk(3, -1)
    pads = (None,) * 3
    if inputs.get("pad_value") is not None:
        pads = inputs["pad_value"].to(query.dtype).chunk(3)
    size = [-(-n // w) * w for n, w in zip(query.shape[1:3], (height, width), strict=True)]
    back = (-shift[0], -shift[1])

    def cut(tokens: Tensor, pad: Tensor | None) -> Tensor:
        if not wrap_padded:
            tokens = tokens.roll(back, (1, 2))
        tokens = reference._pad(tokens, *size, pad)
        if wrap_padded:
            tokens = tokens.roll(back, (1, 2))
        return reference._partition(tokens, height, width, heads)

    parts = dict(zip(TENSORS, map(cut, (query, key, value), pads), strict=False))
    parts["is_map"] = cut(torch.ones_like(query), None)[:, :, :, :, :1]
    if grad_out is not None:
        parts["grad_out"] = cut(grad_out, None)
    regions = reference._regions(*size, tuple(shift), query.device)
    regions = reference._partition(regions[None, :, :, None], height, width, 1)[0, :, :, :, 0]
    parts["other"] = regions[..., :, None] != regions[..., None, :]
    parts["size"], parts["window"], parts["shift"] = size, (height, width), tuple(shift)
    return parts


def weights_by_torch(inputs: Inputs, parts: dict) -> tuple[Tensor, Tensor]:
    """Weights before dropout, and the products or cosines they come from, in the inputs' dtype."""
    scale, mask_value = inputs["numbers"][6:8]
    query, key = parts["query"], parts["key"]
    if inputs.get("logit_scale") is None:
        products = query @ key.transpose(-2, -1)
        logits = products * scale
    else:
        products = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        logits = products * inputs["logit_scale"][:, None, None]
    if inputs.get("bias") is not None:
        logits = logits + inputs["bias"]
    logits = logits + mask_value * parts["other"].to(logits.dtype)
    return logits.softmax(-1), products


def by_torch(inputs: Inputs) -> Tensors:
    parts = in_windows(inputs)
    weights, _ = weights_by_torch(inputs, parts)
    dropout_p = inputs["numbers"][8]
    if dropout_p > 0.0:
        batch, windows, heads, tokens, _ = weights.shape
        keep = dropout_keep_mask(
            batch * windows, heads, tokens, tokens, dropout_p, inputs["numbers"][9]
        )
        weights = weights * keep.unflatten(0, (batch, windows)) / (1.0 - dropout_p)
    out = weights.to(parts["value"].dtype) @ parts["value"]
    out = reference._reverse(out, *parts["size"], *parts["window"])
    height, width = inputs["query"].shape[1:3]
    if inputs["numbers"][5]:
        return {"out": out.roll(parts["shift"], (1, 2))[:, :height, :width]}
    return {"out": out[:, :height, :width].roll(parts["shift"], (1, 2))}


def terms(inputs: Inputs, grads: Tensors) -> dict[str, float]:
    """Norms of the terms that are summed; those of the softmax's backward are P dP."""
    parts = in_windows(inputs, grads["out"])
    weights, products = weights_by_torch(inputs, parts)
    query, key, value, grad_out = (parts[name] for name in (*TENSORS[:3], "grad_out"))
    scores = weights * (grad_out @ value.transpose(-2, -1))
    scale = query.new_full((query.shape[2],), inputs["numbers"][6])
    query_norm, key_norm = torch.ones_like(query[..., :1]), torch.ones_like(key[..., :1])
    if inputs.get("logit_scale") is not None:
        scale = inputs["logit_scale"]
        query_norm, key_norm = (x.norm(dim=-1, keepdim=True) for x in (query, key))
        query, key = query / query_norm, key / key_norm
    scores, weights = scores.square(), weights.square()
    scale = scale[:, None, None].square()
    of_query = scale * (scores @ key.square()) / query_norm.square()
    of_key = scale * (scores.transpose(-2, -1) @ query.square()) / key_norm.square()
    of_value = weights.transpose(-2, -1) @ grad_out.square()
    on_map, off_map = parts["is_map"], 1.0 - parts["is_map"]

    def norm(*squares: Tensor) -> float:
        return sum(x.sum() for x in squares).sqrt().item()

    packed = inputs.get("key") is None
    separate = [norm(x * on_map) for x in (of_query, of_key, of_value)]
    together = norm(*(x * on_map for x in (of_query, of_key, of_value)))
    return {
        "out": norm(weights @ value.square()),
        "grad_query": together if packed else separate[0],
        "grad_key": separate[1],
        "grad_value": separate[2],
        "grad_bias": norm(scores),
        "grad_logit_scale": norm(scores * products.square()),
        "grad_pad_value": norm(of_key * off_map, of_value * off_map),
    }


def case(
    name: str,
    size: tuple[int, int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    heads: int = 2,
    dim: int = 32,
    packed: bool = True,
    bias: float | None = 1.0,
    cosine: bool = False,
    pad_value: bool = False,
    wrap_padded: bool = True,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    added: torch.dtype | None = torch.float32,
) -> Case:
    """A call of the operator, and its peers.

    Args:
        size: (B, H, W).
        packed: query, key and value are one tensor.
        bias: its standard deviation.
        added: dtype of bias, logit_scale and pad_value; that of the map for None.
    """
    tokens, channels = window[0] * window[1], heads * dim

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        qkv = normal(*size, 3 * channels).to(dtype)
        inputs: Inputs = {"query": qkv}
        if not packed:
            inputs = dict(zip(TENSORS[:3], qkv.chunk(3, -1), strict=True))
        if bias is not None:
            inputs["bias"] = (bias * normal(heads, tokens, tokens)).to(added or dtype)
        if cosine:
            inputs["logit_scale"] = (10 + normal(heads)).to(added or dtype)
        if pad_value:
            inputs["pad_value"] = normal(3 * channels).to(added or dtype)
        scale = 0.0 if cosine else dim**-0.5
        seed = SEED.to(device) if dropout_p > 0.0 else None
        inputs["numbers"] = (
            *(heads, *window, *shift, wrap_padded, scale, mask_value, dropout_p, seed),
        )
        return inputs

    names = tuple(make(torch.Generator(), torch.float32, "cpu"))[:-1]
    return Case(
        name,
        make,
        names,
        lambda inputs, backend: {"out": ops.FORWARD[backend](*arguments(inputs))[0]},
        by_torch,
        lambda inputs: {"out": reference.window_attention(*arguments(inputs))[0]},
        terms,
    )


CASES = [
    case("shifted", (1, 8, 12), (4, 4), (2, 2)),
    case("w7, padded, shifted", (1, 10, 7), (7, 7), (3, 3), pad_value=True),
    case("cosine, padded", (1, 8, 5), (8, 8), (4, 0), heads=1, cosine=True, pad_value=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_dtype_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton")


HALF_CASES = [
    case("two windows a program", (3, 14, 14), (7, 7), (3, 3)),
    case("no bias", (1, 7, 14), (7, 7), (0, 3), bias=None),
    case("shift before padding", (1, 9, 10), (7, 7), (3, 2), pad_value=True, wrap_padded=False),
    case("padding of zeros", (1, 9, 10), (7, 7), (3, 3)),
    case("rectangular, apart", (2, 7, 11), (3, 5), (1, 2), packed=False, pad_value=True),
    case("window larger than the map", (1, 3, 5), (7, 7), (5, 6), pad_value=True),
    case("the same, before padding", (1, 3, 5), (7, 7), (5, 6), wrap_padded=False),
    case("w6", (1, 12, 6), (6, 6), (3, 3)),
    case("w10", (1, 10, 20), (10, 10), (5, 5), heads=1, pad_value=True),
    case("w12", (1, 12, 24), (12, 12), (6, 6), heads=1),
    case("w12, padded", (1, 13, 12), (12, 12), (6, 6), heads=1, pad_value=True),
    case("w16, cosine", (1, 16, 32), (16, 16), (8, 8), heads=1, cosine=True),
    case("w24", (1, 24, 24), (24, 24), (12, 12), heads=1),
    case("dropout", (1, 7, 14), (7, 7), (3, 3), dropout_p=0.3),
    case("w12, dropout", (1, 12, 12), (12, 12), heads=1, dropout_p=0.3),
    case("bias and padding in half precision", (1, 9, 7), (7, 7), pad_value=True, added=None),
    case("small mask value", (1, 8, 8), (8, 8), (4, 4), mask_value=-1.5),
    *(case(f"head dim {dim}", (1, 8, 5), (8, 5), (4, 2), dim=dim) for dim in (8, 24, 80, 128)),
]


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case):
    assert_keeps_budget(case, torch.bfloat16, backend="triton")


FLOAT_CASES = [
    case("large bias", (1, 8, 8), (8, 8), (4, 4), bias=20.0),
    case("large bias, by blocks", (1, 12, 12), (12, 12), (6, 6), heads=1, bias=20.0),
    case("cosine, by blocks", (1, 9, 9), (9, 9), (4, 4), heads=1, cosine=True),
]


@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda case: case.name)
def test_float32(case):
    assert_keeps_budget(case, torch.float32, backend="triton")


def operands(dtype: torch.dtype = torch.bfloat16, batch: int = 3) -> tuple[list, tuple]:
    qkv = torch.randn(batch, 9, 14, 3 * 64, dtype=dtype)
    tensors = [qkv, None, None, torch.randn(2, 49, 49), torch.rand(2) + 5, torch.randn(192)]
    return tensors, (2, 7, 7, 3, 3, True, 0.0, -100.0, 0.0, None)


def backward(tensors: list, numbers: tuple, grad_out: Tensor, *wanted: bool) -> tuple:
    out, logsumexp = ops.FORWARD["triton"](*tensors, *numbers)
    return ops.BACKWARD["triton"](grad_out, *tensors, out, logsumexp, *numbers, *wanted)


def test_repeats_bitwise():
    tensors, numbers = operands()
    grad_out = torch.randn(3, 9, 14, 64, dtype=torch.bfloat16)
    first, second = (backward(tensors, numbers, grad_out, *(True,) * 4) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [7, 12])
def test_gradients_alone_are_those_of_all(window):
    tensors, numbers = operands(batch=1)
    tensors[3] = torch.randn(2, window**2, window**2)
    numbers = (2, window, window, *numbers[3:])
    grad_out = torch.randn(1, 9, 14, 64, dtype=torch.bfloat16)
    together = backward(tensors, numbers, grad_out, *(True,) * 4)
    for i, place in enumerate((0, 3, 4, 5)):
        alone = backward(tensors, numbers, grad_out, *(j == i for j in range(4)))
        assert torch.equal(alone[place], together[place])
        assert all(x.shape == (0,) for j, x in enumerate(alone) if j != place)


def test_strides_make_no_difference():
    tensors, numbers = operands()
    qkv = tensors[0]
    grad_out = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand(3, 9, 14, 64)
    expected = backward(tensors, numbers, grad_out.contiguous(), *(True,) * 4)
    wide = torch.randn(3, 20, 14, 2, 3 * 64, dtype=torch.bfloat16)[:, ::2, :, 1][:, :9]
    wide.copy_(qkv)
    columns_first = qkv.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for strided in (wide, columns_first):
        tensors[0] = strided
        results = backward(tensors, numbers, grad_out, *(True,) * 4)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_logsumexp_is_the_reference_s():
    tensors, numbers = operands(torch.float32, batch=1)
    tensors[0] = tensors[0][:, :7].contiguous()  # no padded queries
    _, logsumexp = ops.FORWARD["triton"](*tensors, *numbers)
    _, expected = reference.window_attention(*tensors, *numbers)
    torch.testing.assert_close(logsumexp, expected)


def test_an_empty_batch_has_gradients_of_zero():
    tensors, numbers = operands(batch=0)
    grad_out = torch.randn(0, 9, 14, 64, dtype=torch.bfloat16)
    grad_qkv, _, _, *others = backward(tensors, numbers, grad_out, *(True,) * 4)
    assert grad_qkv.shape == (0, 9, 14, 192)
    for gradient, tensor in zip(others, tensors[3:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_other_windows_and_heads_do_not_leak():
    tensors, numbers = operands(torch.float32, batch=1)
    tensors[0] = tensors[0][:, :7].contiguous()
    numbers = (*numbers[:3], 0, 0, *numbers[5:])
    clean, _ = ops.FORWARD["triton"](*tensors, *numbers)
    tensors[0][:, :, 7:] = float("nan")  # the second window
    tensors[0][..., 64 + 32 : 128] = float("nan")  # the second head's keys
    out, _ = ops.FORWARD["triton"](*tensors, *numbers)
    assert torch.equal(out[:, :, :7, :32], clean[:, :, :7, :32])
