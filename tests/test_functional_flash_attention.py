"""scaled_dot_product_attention: torch's call, and inside PyTorch what torch's own does."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import vlmfast
import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from tools.flash_attention import normal, packed, qkv
from tools.gradients import assert_same
from vlmfast.verify.flash_attention import dense_case, normal_bias, random_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]
sdpa = VF.scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


# --- scaled_dot_product_attention: torch's call -------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_leading_dimensions(leading, is_causal, backend):
    inputs = qkv(*leading, value_dim=6)
    ours = sdpa(*inputs, is_causal=is_causal, backend=backend)
    assert_same(ours, F.scaled_dot_product_attention(*inputs, is_causal=is_causal), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "query, key, value",
    [
        ((2, 3), (1, 3), (1, 3)),
        ((1, 3), (2, 3), (2, 3)),
        ((2, 3), (2, 1), (2, 1)),
        ((2, 1), (2, 3), (2, 3)),
        ((2, 3), (2, 3), (2, 1)),
        ((2, 3), (3,), (3,)),
        ((7, 7), (7,), (7,)),  # as many keys as heads as batch elements
        ((2, 3), (), ()),
        ((3,), (2, 3), (2, 3)),
        ((4, 1, 3), (2, 3), (1, 2, 1)),
    ],
)
def test_leading_dimensions_broadcast(query, key, value, backend):
    inputs = [normal(*query, 5, 8), normal(*key, 7, 8), normal(*value, 7, 6)]
    inputs = [x.requires_grad_() for x in inputs]
    assert_same(sdpa(*inputs, backend=backend), F.scaled_dot_product_attention(*inputs), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "query, key, value",
    [
        ((2, 6), (2, 3), (2, 3)),
        ((2, 6), (2, 3), (2, 2)),
        ((6,), (2,), (2,)),
        ((2, 6), (1, 1), (1, 1)),
        ((2, 2, 6), (2, 2, 3), (2, 2, 3)),
    ],
)
def test_grouped_heads(query, key, value, backend):
    inputs = [normal(*query, 5, 8), normal(*key, 7, 8), normal(*value, 7, 6)]
    inputs = [x.requires_grad_() for x in inputs]
    theirs = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    assert_same(sdpa(*inputs, enable_gqa=True, backend=backend), theirs, inputs)


MASK_SHAPES = [
    (7,),
    (1,),
    (),
    (5, 7),
    (5, 1),
    (1, 7),
    (3, 5, 7),
    (1, 1, 1),
    (2, 1, 5, 7),
    (2, 3, 1, 7),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_any_shape_with_and_without_causality(kind, shape, is_causal, backend):
    inputs = qkv(2, 3)
    visible = torch.ones(5, 7, dtype=torch.bool).tril() if is_causal else torch.tensor(True)
    if kind == "bool":
        mask = torch.rand(shape) < 0.7
        equivalent = mask & visible
    else:
        mask = normal(*shape).requires_grad_()
        inputs.append(mask)
        equivalent = mask.masked_fill(~visible, -math.inf)
    # torch takes at least two dimensions, and a mask or causality but not both
    equivalent = equivalent.expand(2, 3, 5, 7)
    theirs = F.scaled_dot_product_attention(*inputs[:3], equivalent)
    ours = sdpa(*inputs[:3], mask, is_causal=is_causal, backend=backend)
    assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("leading", [(2, 1, 3), (2, 4, 3)])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (4, 1, 5, 7), (2, 1, 1, 1, 7)], ids=str)
def test_masks_of_inputs_with_more_dimensions(leading, shape):
    if shape[:-3] and shape[-4] != 1 and leading[1] != shape[-4]:
        leading = (2, shape[-4], 3)
    inputs = [*qkv(*leading), normal(*shape).requires_grad_()]
    theirs = F.scaled_dot_product_attention(*inputs[:3], inputs[3].expand(*leading, 5, 7))
    assert_same(sdpa(*inputs), theirs, inputs)


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_may_differ_in_dtype(dtype, mask_dtype):
    inputs = qkv(2, 3, dtype=dtype)
    mask = normal(1, 3, 5, 7, dtype=mask_dtype).requires_grad_()
    out = sdpa(*inputs, mask)
    assert out.dtype == dtype
    (gradient,) = torch.autograd.grad(out.sum(), mask)
    assert gradient.dtype == mask_dtype and gradient.shape == mask.shape


@pytest.mark.parametrize("scale", [None, 0.0, 1, -0.5])
def test_scale(scale):
    inputs = qkv(2, 3)
    assert_same(
        sdpa(*inputs, scale=scale), F.scaled_dot_product_attention(*inputs, scale=scale), inputs
    )


def test_arguments_in_torch_order():
    inputs = qkv(2, 3)
    mask = torch.rand(5, 7) < 0.8
    theirs = F.scaled_dot_product_attention(*inputs, mask, 0.0, False, scale=0.2)
    assert_close(sdpa(*inputs, mask, 0.0, False, 0.2, False), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "leading, rows, columns",
    [((0, 3), 5, 7), ((2, 0), 5, 7), ((2, 3), 0, 7), ((2, 3), 5, 0), ((2, 3), 0, 0), ((0,), 5, 7)],
)
def test_empty_sizes_give_what_torch_gives(leading, rows, columns, backend):
    inputs = qkv(*leading, rows=rows, columns=columns)
    for mask in (None, torch.ones(rows, columns, dtype=torch.bool), torch.zeros(rows, columns)):
        ours = sdpa(*inputs, mask, backend=backend)
        assert_same(ours, F.scaled_dot_product_attention(*inputs, mask), inputs)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_fully_masked_rows_are_as_torch_gives_them(kind):
    inputs = qkv(2, 3)
    mask = torch.rand(5, 7) < 0.6
    mask[1] = mask[4] = False
    if kind == torch.float32:
        mask = torch.zeros(5, 7).masked_fill(~mask, -math.inf).requires_grad_()
        inputs.append(mask)
    ours = sdpa(*inputs[:3], mask)
    assert not ours[:, :, 1].any()
    assert_same(ours, F.scaled_dot_product_attention(*inputs[:3], mask), inputs)


CASES = [
    dense_case("strided", (2, 3, 70, 72)),
    dense_case("masked", (2, 2, 30, 40), mask=random_mask(30, 30)),
    dense_case("biased", (2, 2, 30, 40), mask=normal_bias(2, 30, 30)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_function_keeps_the_budget(case, dtype):
    def kernel(inputs):
        packed = torch.stack([inputs[name] for name in ("query", "key", "value")], 2)
        query, key, value = packed.unbind(2)  # strides of a packed projection
        return {"out": sdpa(query, key, value, inputs.get("attn_mask"))}

    assert_keeps_budget(case, dtype, kernel=kernel)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_that_torch_takes(data):
    draw = data.draw
    leading = draw(st.lists(st.integers(1, 3), max_size=3))

    def subset():
        kept = [draw(st.sampled_from([1, size])) for size in leading]
        return kept[draw(st.integers(0, len(kept))) :]

    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dim, value_dim = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    query = normal(*leading, rows, dim).requires_grad_()
    key, value = normal(*subset(), columns, dim), normal(*subset(), columns, value_dim)
    inputs = [query, key.requires_grad_(), value.requires_grad_()]
    mask, is_causal = None, draw(st.booleans())
    if not is_causal:
        # at least (L, S): torch takes no less
        shape = [*subset(), draw(st.sampled_from([1, rows])), draw(st.sampled_from([1, columns]))]
        mask = draw(st.sampled_from([None, torch.rand(shape) < 0.7, normal(*shape)]))
    ours = sdpa(*inputs, mask, is_causal=is_causal)
    assert_same(ours, F.scaled_dot_product_attention(*inputs, mask, is_causal=is_causal), inputs)


def test_causal_bias_of_torch():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    inputs = qkv(2, 3)
    for make in (causal_lower_right, causal_upper_left):
        bias = make(5, 7)
        theirs = F.scaled_dot_product_attention(*inputs, bias)
        assert_same(sdpa(*inputs, bias), theirs, inputs)
    with pytest.raises(ValueError, match="attn_mask: expected a CausalBias of 5 x 7"):
        sdpa(*inputs, causal_lower_right(5, 6))
    with pytest.raises(ValueError, match="is_causal"):
        sdpa(*inputs, causal_lower_right(5, 7), is_causal=True)


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_repeats_from_the_generator_and_matches_the_reference():
    inputs = qkv(2, 3, rows=20, columns=30)

    def compute(backend, seed):
        torch.manual_seed(seed)
        out = sdpa(*inputs, dropout_p=0.3, backend=backend)
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    first = compute("cpu", 1)
    for x, y in zip(compute("cpu", 1), first, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(compute("reference", 1), first, strict=True):
        assert_close(x, y)
    assert not torch.equal(compute("cpu", 2)[0], first[0])
    assert not torch.equal(sdpa(*inputs, dropout_p=0.3), sdpa(*inputs, dropout_p=0.3))


def test_dropout_keeps_the_expectation():
    query, key = normal(4, 8, 32, 16), normal(4, 8, 32, 16)
    ones = torch.ones(4, 8, 32, 16)
    p = 0.4
    out = sdpa(query, key, ones, dropout_p=p)[..., 0]
    weights = (query @ key.transpose(-2, -1) / 4).softmax(-1)
    # each row sums weight x Bernoulli / (1 - p): mean 1, known variance
    deviation = (weights.square().sum() * p / (1 - p)).sqrt() / out.numel()
    assert abs(out.mean() - 1.0) < 5 * deviation


def test_no_dropout_draws_no_random_number():
    inputs = qkv(2, 3)
    state = torch.get_rng_state()
    sdpa(*inputs, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not sdpa(*inputs, dropout_p=1.0).any()


# --- inside PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = qkv(2, 3)
    bias = normal(3, 5, 7).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = sdpa(*inputs, bias)
        assert out.dtype == F.scaled_dot_product_attention(*inputs).dtype == dtype
        mixed = sdpa(inputs[0], inputs[1].to(dtype), inputs[2].half())
        assert mixed.dtype == dtype
        assert sdpa(*(x.double() for x in inputs)).dtype == torch.float64
        by_reference = sdpa(*inputs, bias, backend="reference")
    # the bias is not rounded, the logits are of rounded inputs only
    rounded = [x.detach().to(dtype).double() for x in inputs]
    exact = sdpa(*rounded, bias.detach().double())
    assert torch.equal(by_reference, exact.to(dtype))
    gradients = torch.autograd.grad(out.sum(), [*inputs, bias])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    varlen_inputs, lengths = packed()
    with torch.autocast("cpu", dtype):
        assert VF.varlen_attention(*varlen_inputs, *lengths).dtype == dtype
        x = torch.zeros(2, 5, 4, 8)
        assert VF.memory_efficient_attention(x, x, x).dtype == dtype


def test_float64_runs_by_the_reference():
    inputs = [x.detach().double().requires_grad_() for x in qkv(2, 3)]
    assert_same(sdpa(*inputs), F.scaled_dot_product_attention(*inputs), inputs)


def test_meta_tensors():
    inputs = [x.detach().to("meta") for x in qkv(2, 3, value_dim=6)]
    out = sdpa(*inputs)
    assert out.device.type == "meta" and out.shape == (2, 3, 5, 6)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in qkv(2, 3, value_dim=6)]
        out = sdpa(*inputs, is_causal=True)
        assert out.shape == (2, 3, 5, 6) and out.device.type == "cpu"
        out.sum().backward()
        cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        x = torch.zeros(5, 2, 8)
        assert VF.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 3, 3).shape == (5, 2, 8)


def test_inference_mode():
    inputs = qkv(2, 3)
    with torch.inference_mode():
        out = sdpa(*inputs)
    assert out.is_inference()
    assert_close(out.clone(), F.scaled_dot_product_attention(*inputs).detach())


def test_parameters_and_subclasses_of_tensors():
    class Tagged(torch.Tensor):
        pass

    inputs = qkv(2, 3)
    parameters = [torch.nn.Parameter(x.detach()) for x in inputs]
    assert torch.equal(sdpa(*parameters), sdpa(*inputs))
    tagged = sdpa(*(x.detach().as_subclass(Tagged) for x in inputs))
    assert torch.equal(torch.Tensor(tagged), sdpa(*inputs))


def compile_fully(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


COMPILED = {
    "plain": lambda q, k, v: sdpa(q, k, v),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "mask": lambda q, k, v: sdpa(q, k, v, q[..., :1] > 0),
    "bias": lambda q, k, v: sdpa(q, k, v, q[..., :1] + k[..., 0][:, :, None]),
    "grouped": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
    "5-D": lambda q, k, v: sdpa(q[:, None], k[:, None], v[:, None]),
    "3-D": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "xformers": lambda q, k, v: VF.memory_efficient_attention(q, k, v, p=0.0),
    "reference": lambda q, k, v: sdpa(q, k, v, backend="reference"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks(name, dynamic):
    function = COMPILED[name]
    compiled = compile_fully(function, dynamic=dynamic)
    for rows, columns in ((5, 7), (9, 11)):
        inputs = qkv(2, 2, rows=rows, columns=rows if name == "xformers" else columns)
        assert_same(compiled(*inputs), function(*inputs), inputs)


def test_compile_with_dynamic_shapes_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_fully(lambda q, k, v: sdpa(q, k, v), backend=counter, dynamic=True)
    compiled(*qkv(2, 3, rows=5, columns=10))
    first = counter.frame_count
    for rows in (9, 17, 33):
        compiled(*qkv(2, 3, rows=rows, columns=2 * rows))
    assert counter.frame_count == first


def test_compile_with_inductor():
    def block(x, weight):
        query, key, value = (x @ weight).unflatten(-1, (3, 2, 8)).unbind(2)
        query, key, value = (t.transpose(1, 2) for t in (query.sin(), key, value))
        return sdpa(query, key, value, is_causal=True).transpose(1, 2).flatten(2).cos()

    inputs = [normal(2, 6, 16).requires_grad_(), normal(16, 48).requires_grad_()]
    compiled = compile_fully(block, backend="inductor")
    assert_same(compiled(*inputs), block(*inputs), inputs)


def test_compile_dropout_and_varlen():
    compiled = compile_fully(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5))
    inputs = qkv(2, 3)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(compiled(*inputs))
    assert torch.equal(*outs)
    outs[0].sum().backward()
    tensors, lengths = packed()
    compiled = compile_fully(lambda *args: VF.varlen_attention(*args, is_causal=True), dynamic=True)
    expected = VF.varlen_attention(*tensors, *lengths, is_causal=True)
    assert_same(compiled(*tensors, *lengths), expected, tensors)


def test_compile_sees_use_backend():
    compiled = compile_fully(lambda q, k, v: sdpa(q, k, v))
    inputs = [x.detach() for x in qkv(2, 3)]
    plain = compiled(*inputs)
    with vlmfast.use_backend("reference"):
        assert_close(compiled(*inputs), plain)
    with (
        vlmfast.use_backend("cuda"),
        pytest.raises(torch._dynamo.exc.TorchDynamoException, match="cannot run this call"),
    ):
        compiled(*inputs)

    def inside(query, key, value):
        with vlmfast.use_backend("reference"):
            return sdpa(query, key, value)

    assert_close(compile_fully(inside)(*inputs), plain)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return sdpa(query, key, value, is_causal=True)

    inputs = [x.detach() for x in qkv(2, 3, rows=7)]
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length},) * 3
    program = torch.export.export(Attention(), tuple(inputs), dynamic_shapes=shapes, strict=strict)
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.vlmfast.flash_attention_cpu.default in operators
    longer = [x.detach() for x in qkv(2, 3, rows=12, columns=12)]
    assert_close(program.module()(*longer), sdpa(*longer, is_causal=True))


def test_functional_transforms():
    query, key, value = (x.detach() for x in qkv(2, 3))
    assert_close(torch.vmap(sdpa)(query, key, value), sdpa(query, key, value))
    ours = torch.vmap(torch.func.grad(lambda *x: sdpa(*x).sin().sum()))(query, key, value)
    theirs = torch.func.grad(lambda *x: F.scaled_dot_product_attention(*x).sin().sum())
    assert_close(ours, theirs(query, key, value))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda *x: sdpa(*x, dropout_p=0.5))(query, key, value)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: sdpa(x, key, value), (query,), (query,))


def test_second_derivatives():
    inputs = qkv(2, 3)
    (gradient,) = torch.autograd.grad(sdpa(*inputs).sin().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()
    out = sdpa(*inputs, backend="reference").sin().sum()
    (gradient,) = torch.autograd.grad(out, inputs[0], create_graph=True)
    gradient.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_activation_checkpointing_with_dropout():
    from torch.utils.checkpoint import checkpoint

    inputs = qkv(2, 3)
    gradients = []
    for run in (lambda f: f(*inputs), lambda f: checkpoint(f, *inputs, use_reentrant=False)):
        torch.manual_seed(1)
        out = run(lambda *x: sdpa(*x, dropout_p=0.5).sin())
        gradients.append(torch.autograd.grad(out.sum(), inputs))
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)
