"""The operators, and through them the CPU kernels, in every instruction set of this machine."""

import itertools
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tools.budget import assert_keeps_budget
from tools.guard_pages import guarded, run_alone
from tools.memory import peak_memory
from vlmfast.functional.cross_attention import cross_attention_plan
from vlmfast.ops import cross_attention as ops
from vlmfast.reference.cross_attention import cross_attention as reference
from vlmfast.verify.cross_attention import CASES, image_case, random_bits, shuffled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORWARD, BACKWARD = ops.FORWARD["cpu"], ops.BACKWARD["cpu"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


PLANS = {
    "last": lambda phi: cross_attention_plan(phi, 3),
    "uniform": lambda phi: cross_attention_plan(phi, 3, "last", "uniform", "uniform"),
    "all previous": lambda phi: cross_attention_plan(phi, 3, "all_previous"),
    "dense, lengths": lambda phi: cross_attention_plan(
        phi, 3, empty_rows="dense", image_lengths=torch.tensor([[6, 0, 2], [1, 6, 9]])
    ),
}


def sample(plan, requires_grad=False):
    """Small inputs with heads inside tokens and latents, grouped heads and a value dim of its own.

    Returns the operator's arguments, in order.
    """
    query = normal(2, 7, 4, 8).transpose(1, 2)
    key = normal(2, 3, 6, 2, 8).permute(0, 3, 1, 2, 4)
    value = normal(2, 2, 3, 6, 5)
    tensors = [x.requires_grad_(requires_grad) for x in (query, key, value)]
    return (*tensors, *PLANS[plan](torch.randint(0, 5, (2, 7))), 0.3)


def backward_arguments(args, grad_out, grad_logsumexp=None, wanted=(True, True)):
    query, key, value, *rest = args
    out, logsumexp = FORWARD(*args)
    return (grad_out, grad_logsumexp, query, key, value, out, logsumexp, *rest, *wanted)


# --- what torch asks of an operator -------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_opcheck_forward(plan, requires_grad):
    torch.library.opcheck(FORWARD, sample(plan, requires_grad))


@pytest.mark.parametrize("plan", PLANS)
def test_opcheck_backward(plan):
    args = sample(plan)
    out, logsumexp = FORWARD(*args)
    grad_out, grad_logsumexp = torch.randn_like(out), torch.randn_like(logsumexp)
    torch.library.opcheck(BACKWARD, backward_arguments(args, grad_out, grad_logsumexp))
    torch.library.opcheck(BACKWARD, backward_arguments(args, grad_out, None, (False, True)))
    torch.library.opcheck(BACKWARD, backward_arguments(args, grad_out, None, (True, False)))


def test_gradients_not_asked_for_are_empty():
    args = sample("last")
    grad_out = torch.randn_like(FORWARD(*args)[0])
    sizes = [x.shape for x in BACKWARD(*backward_arguments(args, grad_out, None, (False, True)))]
    assert sizes == [(0,), args[1].shape, args[2].shape]
    sizes = [x.shape for x in BACKWARD(*backward_arguments(args, grad_out, None, (True, False)))]
    assert sizes == [args[0].shape, (0,), (0,)]


def test_double_backward_says_that_there_is_none():
    args = sample("last", requires_grad=True)
    out, _ = FORWARD(*args)
    (grad,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()


def test_flops_are_those_of_the_pairs_attended_to():
    phi = torch.tensor([[0, 0, 1, 1, 3]])
    plan = cross_attention_plan(phi, 3)
    query, key = normal(1, 4, 5, 8).requires_grad_(), normal(1, 2, 3, 6, 8)
    with FlopCounterMode(display=False) as counter:
        out, _ = FORWARD(query, key, key, *plan, 1.0)
    assert counter.get_total_flops() == 2 * 4 * 3 * 6 * (8 + 8)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 3 * 6 * (8 + 8 + 8)


# --- layouts ------------------------------------------------------------------------------------


def in_layout(layout, *shape, heads_at=1):
    """A tensor whose memory is laid out in one of several ways, `heads_at` the heads' dimension."""
    if layout == "dense":
        return normal(*shape)
    if layout == "sliced":
        return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "reversed":
        return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return normal(1, 1, *shape[2:]).expand(shape)
    inside = [*range(heads_at), *range(heads_at + 1, len(shape) - 1), heads_at, len(shape) - 1]
    x = normal(*(shape[i] for i in inside))
    return x.permute(*(inside.index(i) for i in range(len(shape))))


@pytest.mark.parametrize("layout", ["dense", "heads inside", "sliced", "reversed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_are_free_and_results_dense(layout, dtype, cpu_isa):
    query, key, value = (
        in_layout(layout, *shape).to(dtype)
        for shape in ((2, 4, 21, 20), (2, 2, 3, 10, 20), (2, 2, 3, 10, 12))
    )
    plan = cross_attention_plan(torch.randint(0, 5, (2, 21)), 3)
    dense = [x.contiguous() for x in (query, key, value)]
    out, logsumexp = FORWARD(query, key, value, *plan, 0.3)
    expected, expected_logsumexp = FORWARD(*dense, *plan, 0.3)
    assert torch.equal(out, expected)
    assert torch.equal(logsumexp, expected_logsumexp)
    grad_out = in_layout(layout, *out.shape).to(dtype)
    gradients = BACKWARD(*backward_arguments((query, key, value, *plan, 0.3), grad_out))
    wanted = BACKWARD(*backward_arguments((*dense, *plan, 0.3), grad_out.contiguous()))
    for gradient, other in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient, other)

    assert logsumexp.is_contiguous()
    for result, like in ((out, query), (gradients[0], query)):
        inside = like.stride(1) < like.stride(2)
        assert (result.transpose(1, 2) if inside else result).is_contiguous()
    for result, like in ((gradients[1], key), (gradients[2], value)):
        inside = like.stride(1) < like.stride(3)
        assert (result.permute(0, 2, 3, 1, 4) if inside else result).is_contiguous()


def far_apart(x, dim):
    """The same numbers, 2**30 elements apart along a dimension; most of that memory is not used."""
    strides = [*x.contiguous().stride()]
    strides[dim] = 1 << 30
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    memory = mmap.mmap(-1, size * x.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize(
    "name, dim", [("query", i) for i in range(4)] + [("key", i) for i in range(5)]
)
def test_offsets_beyond_32_bits(name, dim, cpu_isa):
    query, key = normal(3, 3, 3, 3).bfloat16(), normal(3, 3, 3, 3, 3).bfloat16()
    plan = cross_attention_plan(torch.tensor([[1, 1, 1], [0, 2, 3], [3, 3, 1]]), 3)
    far = [
        far_apart(x, dim) if name in names else x
        for x, names in ((query, "query"), (key, "key"), (key, "key"))
    ]
    found, expected = (
        (
            *FORWARD(*inputs, *plan, 0.3),
            *BACKWARD(*backward_arguments((*inputs, *plan, 0.3), inputs[0])),
        )
        for inputs in (far, (query, key, key))
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_stride_0():
    args = sample("last", requires_grad=True)
    out, _ = FORWARD(*args)
    leaves = args[:3]
    from_sum = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    from_ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for a, b in zip(from_sum, from_ones, strict=True):
        assert torch.equal(a, b)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype)


# Between them they take every path through the kernels.
ISA_CASES = [
    image_case("no order, uniform rows, lengths", (1, 4, 75, 40), (2, 3, 37), 21,
               phi=shuffled(1, 75, 4), lengths=(37, 0, 5), empty_rows="uniform"),
    image_case("several images, dense rows, lengths", (1, 2, 50, 64), (1, 3, 64),
               phi=random_bits(1, 50, 3), lengths=(64, 9, 20), empty_rows="dense"),
    image_case("long images, large logits", (1, 2, 40, 17), (1, 1, 150), scale=5.0),
    image_case("one token", (1, 2, 1, 33), (2, 2, 50)),
    image_case("one token, all previous", (2, 4, 1, 64), (4, 5, 64), mode="all_previous"),
    image_case("one latent", (2, 4, 40, 64), (4, 5, 1)),
    image_case("few tokens, long images", (1, 2, 5, 64), (1, 2, 200)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ISA_CASES, ids=lambda case: case.name)
def test_every_instruction_set_keeps_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


# Tokens by the tile, by the one, and, of 257 that are cut into runs, one for a run of its own.
SCALED_SHAPES = {
    "tiles": ((1, 2, 50, 24), (1, 3, 30), "last"),
    "few tokens": ((1, 2, 3, 24), (1, 3, 150), "last"),
    "a last run of one": ((1, 1, 257, 9), (1, 2, 10), "all_previous"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-3.0, -0.1, 0.0, 0.5, 1e-30])
@pytest.mark.parametrize("shape", SCALED_SHAPES)
def test_any_scale_keeps_the_budget(shape, scale, dtype, cpu_isa):
    query_shape, key_shape, mode = SCALED_SHAPES[shape]
    case = image_case(shape, query_shape, key_shape, mode=mode, scale=scale)
    assert_keeps_budget(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["last", "all_previous"])
@pytest.mark.parametrize("scale", [1e8, -1e9, 1e12, 1e30, -1e37])
@pytest.mark.parametrize("tokens", [3, 40])
def test_huge_logits_choose_one_latent(tokens, scale, mode, dtype, cpu_isa):
    query, key = torch.randn(1, 2, tokens, 16).to(dtype), torch.randn(1, 2, 2, 70, 16).to(dtype)
    plan = cross_attention_plan(torch.arange(tokens)[None] % 3, 2, mode=mode)
    inputs = [x.requires_grad_() for x in (query, key, torch.randn_like(key))]
    out, _ = FORWARD(*inputs, *plan, scale)
    exact, _ = reference(*(x.detach().double() for x in inputs), *plan, scale)
    assert torch.equal(out, exact.to(dtype))
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_finite_logits_of_huge_factors_stay_finite(tokens, cpu_isa):
    """Of a query times the scale, which is beyond float32 where the logits are not."""
    query, key = torch.randn(1, 1, tokens, 16) * 1e20, torch.randn(1, 1, 1, 20, 16) * 1e-38
    plan = cross_attention_plan(torch.ones(1, tokens, dtype=torch.int32), 1)
    inputs = (query, key, torch.randn(1, 1, 1, 20, 16), *plan)
    for scale in (1e19, -1e19):
        out, logsumexp = FORWARD(*inputs, scale)
        exact, exact_logsumexp = reference(*(x.double() for x in inputs[:3]), *plan, scale)
        assert_close(out, exact.float())
        assert_close(logsumexp, exact_logsumexp.float())


MORE_CASES = [
    image_case("nine latents", (2, 2, 40, 32), (2, 3, 9)),
    image_case("one image of 2000", (1, 1, 20, 64), (1, 1, 2000)),
    image_case("head dims 9 and 130", (1, 2, 37, 9), (1, 3, 50), 130),
    image_case("large logits", (1, 2, 50, 64), (2, 3, 64), scale=5.0),
    image_case("large logits, long images", (1, 2, 50, 64), (1, 2, 200), scale=5.0),
    image_case(
        "large logits, several images", (1, 2, 50, 64), (1, 3, 64), mode="all_previous", scale=5.0
    ),
    image_case("few tokens of several heads", (1, 6, 5, 40), (3, 9, 33), phi=shuffled(1, 5, 9)),
    image_case("bits, many tokens", (1, 2, 300, 32), (1, 4, 20), phi=random_bits(1, 300, 4)),
]


@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_cases(case, dtype):
    assert_keeps_budget(case, dtype)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_agrees_with_the_reference(data):
    def number(least, most):
        return data.draw(st.integers(least, most))

    batch, key_heads, group = number(0, 2), number(1, 2), number(1, 3)
    tokens, images, latents = number(0, 70), number(0, 5), number(0, 140)
    dim, value_dim = number(1, 70), number(1, 70)
    torch.manual_seed(number(0, 1000))
    bits = data.draw(st.booleans())
    index = torch.randint(0, images + 3, (batch, tokens))
    if bits:
        index = torch.rand(batch, tokens, images) < 0.5
    lengths = torch.randint(0, latents + 2, (batch, images)) if data.draw(st.booleans()) else None
    plan = cross_attention_plan(
        index,
        images,
        "last" if bits else data.draw(st.sampled_from(["last", "all_previous"])),
        data.draw(st.sampled_from(["zero", "uniform", "dense"])),
        data.draw(st.sampled_from(["zero", "uniform"])),
        lengths,
    )
    leaves = [
        normal(batch, key_heads * group, tokens, dim),
        normal(batch, key_heads, images, latents, dim),
        normal(batch, key_heads, images, latents, value_dim),
    ]
    results = []
    grads = None
    for compute, dtype in ((reference, torch.float64), (FORWARD, torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        out, logsumexp = compute(*inputs, *plan, 0.2)
        finite = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        grads = grads or (torch.randn_like(out), torch.randn_like(finite))
        wanted = [x.to(dtype) for x in grads]
        gradients = torch.autograd.grad((out, finite), inputs, wanted)
        results.append([x.double() for x in (out, logsumexp, *gradients)])
    for actual, truth in zip(results[1], results[0], strict=True):
        assert_close(actual, truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("plan", ["uniform", "dense, lengths"])
def test_repeats_bitwise_whatever_the_threads(plan):
    args = sample(plan, requires_grad=True)
    threads = torch.get_num_threads()

    def results():
        out, _ = FORWARD(*args)
        return out, *torch.autograd.grad(out.square().sum(), args[:3])

    try:
        first = results()
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            for a, b in zip(first, results(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_one_head_is_shared_among_threads():
    case = image_case("", (1, 2, 300, 32), (1, 5, 64), mode="all_previous")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert_keeps_budget(case, torch.float32)
    finally:
        torch.set_num_threads(threads)


MEMORY_SETUP = """
import torch
from vlmfast.functional import cross_attention_plan, image_cross_attention
tokens, images, latents = 8192, 128, 64  # scores would be 8192 x 8192 floats a head, 256 MiB
query = torch.randn(1, 2, tokens, 32, requires_grad=True)
key = torch.randn(1, 2, images, latents, 32, requires_grad=True)
plan = cross_attention_plan(torch.randint(0, images, (1, tokens)).sort()[0], images, MODE)
"""


@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_memory_does_not_hold_the_scores(mode):
    setup = MEMORY_SETUP.replace("MODE", repr(mode))
    assert peak_memory(setup, "image_cross_attention(query, key, key, plan).sum().backward()") < 64


# --- memory beyond the inputs --------------------------------------------------------------------

# Around the ends of blocks of latents, with last blocks of all sizes below that of a product.
LATENTS = [*range(1, 10), *range(127, 138), *range(255, 266), 1025]


def attend_beside_guard_pages():
    """Few and many tokens on images that end at an inaccessible page."""
    torch.set_num_threads(1)
    for tokens, mode in itertools.product((1, 5, 40), ("last", "all_previous")):
        phi = torch.ones(1, tokens, dtype=torch.int32)
        plan = [x if x is None else guarded(x) for x in cross_attention_plan(phi, 1, mode)]
        for dtype, dim, latents in itertools.product(DTYPES, (16, 20), LATENTS):
            print(tokens, mode, dtype, dim, latents, flush=True)
            shapes = ((1, 2, tokens, dim), (1, 2, 1, latents, dim), (1, 2, 1, latents, dim))
            inputs = [guarded(torch.ones(shape, dtype=dtype)) for shape in shapes]
            results = [guarded(x) for x in FORWARD(*inputs, *plan, 0.3)]
            grad_out = guarded(torch.ones_like(results[0]))
            BACKWARD(grad_out, None, *inputs, *results, *plan, 0.3, True, True)


def test_nothing_beyond_the_inputs_is_read(cpu_isa):
    run_alone(attend_beside_guard_pages)


@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_products_of_heads_are_not_cut_to_32_bits(mode):
    def attend(heads, value_dim):
        """No tokens, but a gradient of zeros for the latents."""
        query, key = torch.ones(1, 1, 0, 1).expand(1, heads, 0, 1), torch.ones(1, 1, 2, 1, 1)
        plan = cross_attention_plan(torch.ones(1, 0, dtype=torch.int32), 2, mode)
        args = (query, key, torch.ones(1, 1, 2, 1, value_dim), *plan, 0.3)
        return BACKWARD(*backward_arguments(args, torch.ones(1).expand(1, heads, 0, value_dim)))

    # Of one token the heads' results would be 2**32 floats, statistics included.
    for gradient in attend(1 << 16, (1 << 16) - 2):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    with pytest.raises(RuntimeError, match="heads of at most"):
        attend(1 << 32, 1)


# --- wrong arguments ----------------------------------------------------------------------------


IMAGE_INDEX, ORDER, SEGMENTS = 3, 5, 6  # positions among the operator's arguments


@pytest.mark.parametrize(
    "position, number, message",
    [
        (ORDER, 7, "order"),
        (ORDER, -1, "order"),
        (ORDER, 2, "order"),  # the same token again and again
        (SEGMENTS, 99, "segments"),
        (SEGMENTS, -1, "segments"),
        (IMAGE_INDEX, 4, "image_index"),
        (IMAGE_INDEX, -3, "image_index"),
    ],
)
def test_a_broken_plan_touches_no_foreign_memory(position, number, message):
    args = list(sample("last"))
    phi = torch.tensor([[1, 1, 1, 2, 2, 3, 3]]).expand(2, -1)
    args[IMAGE_INDEX : SEGMENTS + 1] = cross_attention_plan(phi, 3)[:4]
    args[position] = torch.full_like(args[position], number)
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*args)
