"""The public functions of per-image cross-attention."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vlmfast
import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from vlmfast.reference.cross_attention import UNIFORM
from vlmfast.verify.cross_attention import image_case, visible_latents

BACKENDS = ["cpu", "reference"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def qkv(batch=2, heads=(4, 2), tokens=21, images=3, latents=6, dim=8, dtype=torch.float32):
    """Leaves laid out as a model's projections leave them."""
    query = torch.randn(batch, tokens, heads[0], dim).to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, images, latents, heads[1], dim).to(dtype).permute(0, 3, 1, 2, 4)
        for _ in range(2)
    )
    return [x.requires_grad_() for x in (query, key, value)]


def results(inputs, plan, backend=None, grad_out=None):
    """out, logsumexp and the gradients."""
    out, logsumexp = VF.image_cross_attention(*inputs, plan, return_lse=True, backend=backend)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    grads = torch.autograd.grad(out, inputs, grad_out)
    return [out.detach(), logsumexp.detach(), *grads]


def in_order(tokens=21, images=3, batch=2):
    return torch.randint(0, images + 1, (batch, tokens)).sort(-1).values


# --- image_index --------------------------------------------------------------------------------


def locations(tokens, *positions):
    media = torch.zeros(1, tokens, dtype=torch.bool)
    media[0, list(positions)] = True
    return media


def test_a_token_sees_the_last_image_before_it():
    phi = VF.image_index(locations(11, 4, 8))
    assert phi.dtype == torch.int32
    assert phi.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]


def test_a_token_sees_the_next_image():
    assert VF.image_index(locations(11, 4, 8), "next").tolist() == [
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    ]


def test_next_is_what_open_flamingo_computes():
    media = torch.rand(5, 30) < 0.2
    text_time = media.cumsum(dim=-1)
    text_time[~media] += 1
    text_time[text_time > media.sum(1, keepdim=True)] = 0
    assert torch.equal(VF.image_index(media, "next").long(), text_time)


def test_no_tokens_and_no_batch():
    assert VF.image_index(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    assert VF.image_index(torch.zeros(0, 5, dtype=torch.bool), "next").shape == (0, 5)


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_lists_hold_the_tokens_that_see_an_image(mode):
    phi = torch.randint(0, 6, (3, 40))
    plan = VF.cross_attention_plan(phi, 4, mode)
    assert plan.num_images == 4
    for b in range(3):
        for image in range(4):
            begin, middle, end = plan.segments[b, image].tolist()
            tokens = plan.order[b, begin:end].tolist()
            seen = phi[b] == image + 1 if mode == "last" else phi[b] > image
            assert middle == end
            assert tokens == seen.nonzero().flatten().tolist()


def test_numbers_beyond_int32_are_no_others():
    phi = torch.tensor([[0, 1, 2**31, 2**32 + 1, torch.iinfo(torch.int64).max]])
    assert VF.cross_attention_plan(phi, 2).image_index.tolist() == [[0, 1, 0, 0, 0]]
    uniform = VF.cross_attention_plan(phi, 2, overflow="uniform").image_index
    assert uniform.tolist() == [[0, 1, UNIFORM, UNIFORM, UNIFORM]]
    seen = VF.cross_attention_plan(phi, 2, mode="all_previous").visible
    assert seen.sum(-1).tolist() == [[0, 1, 2, 2, 2]]
    lengths = VF.cross_attention_plan(phi, 2, image_lengths=torch.tensor([[2**32, 3]]))
    assert lengths.image_lengths.tolist() == [[2**31 - 1, 3]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint64], ids=str)
def test_numbers_of_any_integer_dtype(dtype):
    phi, lengths = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4, 5]])
    expected = VF.cross_attention_plan(phi, 2, image_lengths=lengths)
    plan = VF.cross_attention_plan(phi.to(dtype), 2, image_lengths=lengths.to(dtype))
    for ours, theirs in zip(plan, expected, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_vmap_over_phi():
    query, key = torch.randn(3, 2, 2, 6, 16), torch.randn(3, 2, 2, 2, 5, 16)
    phi = torch.randint(0, 3, (3, 2, 6))
    out = torch.vmap(VF.image_cross_attention)(query, key, key, phi)
    one_by_one = map(VF.image_cross_attention, query, key, key, phi)
    assert torch.equal(out, torch.stack([*one_by_one]))


def test_a_plan_holds_no_tensor_of_the_caller():
    phi, lengths = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[4, 5]]).int()
    plan = VF.cross_attention_plan(phi, 2, image_lengths=lengths)
    phi.zero_(), lengths.zero_()
    assert plan.image_index.tolist() == [[1, 2]] and plan.image_lengths.tolist() == [[4, 5]]


def test_tokens_of_an_image_stand_together_where_images_are_in_order():
    plan = VF.cross_attention_plan(in_order(tokens=60), 3)
    for b in range(2):
        for begin, _, end in plan.segments[b].tolist():
            tokens = plan.order[b, begin:end]
            assert torch.equal(tokens, torch.arange(end - begin, dtype=torch.int32) + tokens[:1])


def test_segments_are_the_blocks_of_xformers_mask():
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    phi = torch.tensor([[1] * 4 + [2] * 7 + [3] * 2])
    lengths = torch.tensor([[5, 2, 6]])
    plan = VF.cross_attention_plan(phi, 3, image_lengths=lengths)
    mask = attn_bias.BlockDiagonalMask.from_seqlens([4, 7, 2], lengths[0].tolist())
    dense = mask.materialize((13, 13)) == 0
    exists = (torch.arange(6) < lengths[0][:, None]).flatten()
    assert torch.equal(visible_latents(plan, 6)[0][:, exists], dense)

    inputs = qkv(batch=1, tokens=13)
    out = VF.image_cross_attention(*inputs, plan)
    key, value = (x.flatten(2, 3)[:, :, exists] for x in inputs[1:])
    assert_close(out, F.scaled_dot_product_attention(inputs[0], key, value, dense, enable_gqa=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_serves_every_layer_and_phi_makes_one(backend):
    phi = torch.randint(0, 5, (2, 21))
    plan = VF.cross_attention_plan(phi, 3)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = qkv(dtype=dtype)
        with_plan = VF.image_cross_attention(*inputs, plan, backend=backend)
        assert torch.equal(with_plan, VF.image_cross_attention(*inputs, phi, backend=backend))
    bits = torch.rand(2, 21, 3) < 0.5
    out = VF.image_cross_attention(*inputs, bits, backend=backend)
    plan = VF.cross_attention_plan(bits, 3)
    assert torch.equal(out, VF.image_cross_attention(*inputs, plan, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_integer_dtype_and_strides_of_phi(dtype, backend):
    inputs, phi = qkv(), torch.randint(0, 5, (21, 2)).t()
    expected = VF.image_cross_attention(*inputs, phi.contiguous(), backend=backend)
    assert torch.equal(VF.image_cross_attention(*inputs, phi.to(dtype), backend=backend), expected)


# --- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["last", "all_previous", "bits"])
def test_is_torch_attention_under_a_mask(mode, backend):
    phi = torch.rand(2, 21, 3) < 0.5 if mode == "bits" else torch.randint(0, 4, (2, 21))
    plan = VF.cross_attention_plan(phi, 3, "last" if mode == "bits" else mode)
    inputs = qkv()
    mask = visible_latents(plan, 6)[:, None]
    query, key, value = inputs[0], inputs[1].flatten(2, 3), inputs[2].flatten(2, 3)
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    expected = expected.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    assert_close(VF.image_cross_attention(*inputs, plan, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_are_zero_uniform_or_dense(backend):
    inputs = qkv()
    phi = torch.zeros(2, 21, dtype=torch.long)
    lengths = torch.tensor([[6, 0, 3], [1, 1, 1]])  # which uniform and dense rows ignore
    query, key, value = inputs[0], inputs[1].flatten(2, 3), inputs[2].flatten(2, 3)
    everything = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    mean = value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(query)
    expected = {"zero": torch.zeros_like(query), "uniform": mean, "dense": everything}
    for empty_rows, wanted in expected.items():
        plan = VF.cross_attention_plan(phi, 3, empty_rows=empty_rows, image_lengths=lengths)
        ours = results(inputs, plan, backend)
        # What does not depend on an input has a gradient of 0.
        grads = torch.autograd.grad(wanted.sum() + 0 * sum(x.sum() for x in inputs), inputs)
        assert_close(ours[0], wanted.detach())
        for actual, grad in zip(ours[2:], grads, strict=True):
            assert_close(actual, grad)
        if empty_rows == "uniform":
            assert_close(ours[1], torch.full((2, 4, 21), 18.0).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp_merges_two_halves_of_the_images(backend):
    inputs = qkv(images=4)
    everything = torch.ones(2, 21, 4, dtype=torch.bool)
    whole = VF.image_cross_attention(*inputs, everything, return_lse=True, backend=backend)
    parts = [
        VF.image_cross_attention(
            inputs[0],
            *(x[:, :, half] for x in inputs[1:]),
            everything[..., half],
            return_lse=True,
            backend=backend,
        )
        for half in (slice(0, 1), slice(1, 4))
    ]
    logsumexp = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(out * (lse - logsumexp).exp()[..., None] for out, lse in parts)
    assert_close(whole[0], out)
    assert_close(whole[1], logsumexp)
    grads = [
        torch.autograd.grad(x.square().sum(), inputs[:2], retain_graph=True)
        for x in (whole[1], logsumexp)
    ]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["last", "all_previous"])
@pytest.mark.parametrize("ordered", [True, False])
def test_changing_an_image_changes_only_those_who_see_it(ordered, mode, backend):
    inputs = qkv(tokens=70)
    phi = in_order(70) if ordered else torch.randint(0, 4, (2, 70))
    plan = VF.cross_attention_plan(phi, 3, mode)
    before = VF.image_cross_attention(*inputs, plan, backend=backend)
    for image in range(3):
        changed = [x.detach().clone() for x in inputs]
        changed[1][:, :, image] += 1.0
        changed[2][:, :, image] -= 1.0
        after = VF.image_cross_attention(*changed, plan, backend=backend)
        differs = (before != after).any(-1).any(1)
        assert torch.equal(differs, phi == image + 1 if mode == "last" else phi > image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_batch_permutes_the_result(backend):
    inputs, phi = qkv(batch=4), torch.randint(0, 4, (4, 21))
    order = torch.tensor([2, 0, 3, 1])
    out = VF.image_cross_attention(*inputs, phi, backend=backend)
    permuted = VF.image_cross_attention(*(x[order] for x in inputs), phi[order], backend=backend)
    assert torch.equal(permuted, out[order])


@pytest.mark.parametrize("mode", ["last", "all_previous", "dense"])
def test_one_token_at_a_time_gives_what_all_give(mode):
    inputs, phi = qkv(tokens=30, latents=40, dim=24), in_order(30)
    options = {"empty_rows": "dense"} if mode == "dense" else {"mode": mode}
    whole = VF.image_cross_attention(*inputs, VF.cross_attention_plan(phi, 3, **options))
    for t in range(30):
        plan = VF.cross_attention_plan(phi[:, t : t + 1], 3, **options)
        step = VF.image_cross_attention(inputs[0][:, :, t : t + 1], *inputs[1:], plan)
        assert_close(step, whole[:, :, t : t + 1])


# --- what an image holds does not leak ----------------------------------------------------------

LENGTHS = torch.tensor([[6, 0, 2], [1, 6, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("empty_rows", ["zero", "dense"])
@pytest.mark.parametrize("mode", ["last", "all_previous", "bits"])
def test_nan_in_an_image_stays_with_those_who_see_it(mode, empty_rows, lengths, backend):
    phi = torch.rand(2, 70, 3) < 0.4 if mode == "bits" else torch.randint(0, 5, (2, 70))
    plan = VF.cross_attention_plan(
        phi, 3, "last" if mode == "bits" else mode, empty_rows, image_lengths=lengths
    )
    inputs = qkv(tokens=70)
    grad_out = torch.randn_like(inputs[0])
    clean = results(inputs, plan, backend, grad_out)
    poisoned = [x.detach().clone() for x in inputs]
    poisoned[1][:, :, 1] = torch.nan
    poisoned[2][:, :, 1, ::2] = torch.inf
    poisoned[2][:, :, 1, 0] = torch.nan
    poisoned = [x.requires_grad_() for x in poisoned]
    after = results(poisoned, plan, backend, grad_out)

    sees = visible_latents(plan, 6).unflatten(-1, (3, 6))[:, :, 1].any(-1)
    blind = ~sees[:, None].expand(2, 4, 70)
    assert 0 < blind.sum() < blind.numel()
    for name, a, b in zip(("out", "logsumexp", "grad_query"), clean, after, strict=False):
        assert torch.equal(a[blind], b[blind]), name
    assert after[0][~blind].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_nan_in_a_token_reaches_only_its_images(mode, backend):
    phi = torch.full((1, 40), 3)
    phi[:, :20], phi[:, 7] = 1, 2
    plan = VF.cross_attention_plan(phi, 4, mode)
    inputs = qkv(batch=1, tokens=40, images=4)
    grad_out = torch.randn_like(inputs[0])
    clean = results(inputs, plan, backend, grad_out)
    poisoned = [x.detach().clone() for x in inputs]
    poisoned[0][:, :, 7] = torch.nan
    grad_out[:, :, 7] = torch.nan
    after = results([x.requires_grad_() for x in poisoned], plan, backend, grad_out)
    others = torch.arange(40) != 7
    assert torch.equal(clean[0][:, :, others], after[0][:, :, others])
    unseen = [0, 2, 3] if mode == "last" else [2, 3]
    for a, b in zip(clean[3:], after[3:], strict=True):
        assert torch.equal(a[:, :, unseen], b[:, :, unseen])
        assert b[:, :, 1].isnan().all()
    if mode == "last":
        assert torch.equal(clean[2][:, :, others], after[2][:, :, others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_latents_are_never_read(backend):
    phi = torch.randint(0, 4, (2, 30))
    plan = VF.cross_attention_plan(phi, 3, image_lengths=LENGTHS)
    inputs = qkv(tokens=30)
    clean = results(inputs, plan, backend)
    hidden = (torch.arange(6) >= LENGTHS[..., None])[:, None].expand(2, 2, 3, 6)
    poisoned = [x.detach().clone() for x in inputs]
    for x in poisoned[1:]:
        x[hidden] = torch.nan
    after = results([x.requires_grad_() for x in poisoned], plan, backend)
    for a, b in zip(clean, after, strict=True):
        assert torch.equal(a, b)
    for grad in after[3:]:
        assert torch.equal(grad[hidden], torch.zeros_like(grad[hidden]))


# --- nothing at all -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "dense"])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"heads": (0, 2)}, {"tokens": 0}, {"images": 0}, {"latents": 0}],
    ids=str,
)
def test_empty_tensors(sizes, empty_rows, backend):
    inputs = qkv(**sizes)
    batch, _, tokens, _ = inputs[0].shape
    phi = torch.randint(0, 3, (batch, tokens))
    plan = VF.cross_attention_plan(phi, inputs[1].shape[2], empty_rows=empty_rows)
    out, logsumexp, *grads = results(inputs, plan, backend)
    assert out.shape == inputs[0].shape
    nothing_to_see = "images" in sizes or "latents" in sizes or "heads" in sizes
    for x in (out, *grads) if nothing_to_see else (out,):
        assert torch.equal(x, torch.zeros_like(x))
    assert (logsumexp == -torch.inf).all()


# --- inside PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend, dynamic", [("cpu", False), ("cpu", True), ("reference", False)])
def test_compiles_whole_with_its_plan(backend, dynamic):
    def layers(query, key, value, media):
        phi = VF.image_index(media)
        plan = VF.cross_attention_plan(phi, key.shape[2], empty_rows="uniform")
        out = VF.image_cross_attention(query, key, value, plan, backend=backend)
        return VF.image_cross_attention(out, key, value, plan, backend=backend)

    compiled = torch.compile(layers, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (21, 30):
        inputs, media = qkv(tokens=tokens), torch.rand(2, tokens) < 0.1
        outs = [function(*inputs, media) for function in (layers, compiled)]
        assert_close(outs[0], outs[1])
        grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
        for a, b in zip(*grads, strict=True):
            assert_close(a, b)


def test_a_plan_passes_into_a_compiled_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(query, key, value, plan):
        return VF.image_cross_attention(query, key, value, plan)

    inputs = qkv()
    for plan in (
        VF.cross_attention_plan(in_order(), 3),
        VF.cross_attention_plan(in_order(), 3, "all_previous", image_lengths=LENGTHS),
    ):
        assert_close(layer(*inputs, plan), VF.image_cross_attention(*inputs, plan))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_query_key_and_value(backend):
    inputs, phi = qkv(), in_order()
    with torch.autocast("cpu", torch.bfloat16):
        out = VF.image_cross_attention(*inputs, phi, backend=backend)
    expected = VF.image_cross_attention(*(x.bfloat16() for x in inputs), phi, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert inputs[0].grad.dtype == torch.float32


def test_saves_nothing_without_gradients():
    inputs = qkv()
    with torch.no_grad():
        out = VF.image_cross_attention(*inputs, PHI)
    with torch.inference_mode():
        assert torch.equal(VF.image_cross_attention(*inputs, PHI), out)
    assert out.grad_fn is None


def test_float64_runs_on_the_reference():
    inputs = [x.double() for x in qkv()]
    assert vlmfast.explain(VF.image_cross_attention, *inputs, in_order()).backend == "reference"
    with pytest.raises(NotImplementedError, match="computes in float32, bfloat16 or float16"):
        VF.image_cross_attention(*inputs, in_order(), backend="cpu")


def test_the_chosen_kernel_keeps_its_budget():
    assert vlmfast.explain(VF.image_cross_attention, *qkv(), in_order()).backend == "cpu"

    def kernel(inputs):
        tensors = (inputs["query"], inputs["key"], inputs["value"])
        out, logsumexp = VF.image_cross_attention(*tensors, inputs["plan"], return_lse=True)
        return {"out": out, "logsumexp": logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)}

    assert_keeps_budget(image_case("", (2, 4, 40, 16), (2, 3, 20)), torch.float32, kernel=kernel)


# --- wrong arguments ----------------------------------------------------------------------------

PHI = torch.ones(2, 21, dtype=torch.int32)
BITS = torch.ones(2, 21, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ([PHI.float(), 3], TypeError, "image_index: expected an integer dtype"),
        ([PHI.bool(), 3], TypeError, r"image_index: expected an integer dtype with \(B, T\)"),
        ([BITS.int(), 3], TypeError, r"image_index: expected dtype torch.bool with \(B, T, I\)"),
        ([PHI[0], 3], ValueError, r"image_index: expected shape \(B, T\)"),
        ([[1, 2], 3], TypeError, "image_index: expected a tensor, got list"),
        ([-PHI, 3], ValueError, "image_index: expected numbers of at least 0, got -1"),
        ([BITS, 4], ValueError, r"image_index: expected \(B, T, 4\)"),
        ([PHI, -1], ValueError, "num_images: expected at least 0, got -1"),
        ([PHI, 2**63], ValueError, "num_images: expected at most"),
        ([PHI.to(torch.float8_e5m2), 3], TypeError, "image_index: expected an integer dtype"),
        ([PHI.to_sparse(), 3], TypeError, "image_index: expected a strided tensor"),
        ([PHI, 3.0], TypeError, "num_images: expected an int, got float"),
        ([PHI[:0], 2**26, "all_previous"], ValueError, "num_images: expected at most 1073741824"),
        ([PHI, 3, "next"], ValueError, "mode: expected one of 'last', 'all_previous', got 'next'"),
        ([PHI, 3, None], TypeError, "mode: expected a string"),
        ([BITS, 3, "all_previous"], ValueError, "mode: expected 'last' where image_index is bool"),
        ([PHI, 3, "last", "none"], ValueError, "empty_rows: expected one of 'zero', 'uniform'"),
        ([PHI, 3, "last", "zero", "wrap"], ValueError, "overflow: expected one of 'zero'"),
        ([4 * PHI, 3, "last", "zero", "error"], ValueError, "image_index: expected at most"),
        ([4 * PHI, 3, "all_previous", "zero", "error"], ValueError, "image_index: expected at"),
    ],
)
def test_wrong_plans(arguments, error, message):
    with pytest.raises(error, match=message):
        VF.cross_attention_plan(*arguments)


@pytest.mark.parametrize(
    "lengths, error, message",
    [
        (torch.ones(2, 4, dtype=torch.long), ValueError, r"image_lengths: expected shape \(2, 3\)"),
        (torch.ones(2, 3), TypeError, "image_lengths: expected an integer dtype"),
        (torch.full((2, 3), -1), ValueError, "image_lengths: expected lengths of at least 0"),
        ([1, 2, 3], TypeError, "image_lengths: expected a tensor or None, got list"),
    ],
)
def test_wrong_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        VF.cross_attention_plan(PHI, 3, image_lengths=lengths)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ([torch.zeros(2, 5)], TypeError, "media_locations: expected dtype torch.bool"),
        ([torch.ones(2, 5).bool().to_sparse()], TypeError, "media_locations: expected a strided"),
        ([torch.zeros(5).bool()], ValueError, r"media_locations: expected shape \(B, T\)"),
        ([[True]], TypeError, "media_locations: expected a tensor"),
        ([torch.zeros(2, 5).bool(), "all_previous"], ValueError, "mode: expected one of 'last'"),
    ],
)
def test_wrong_media_locations(arguments, error, message):
    with pytest.raises(error, match=message):
        VF.image_index(*arguments)


NAMES = ("query", "key", "value", "plan_or_image_index")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("query", lambda x: x[0], ValueError, r"query: expected shape \(B, Hq, T, D\)"),
        ("key", lambda x: x.flatten(2, 3), ValueError, r"key: expected shape \(B, Hkv, I, L, D\)"),
        ("key", lambda x: x[..., :4], ValueError, "key: expected the head dim of query, 8"),
        ("key", lambda x: x[:1], ValueError, "key: expected the batch of query, 2"),
        ("value", lambda x: x[:, :, :2], ValueError, "value: expected batch, heads, images"),
        ("value", lambda x: x[..., :0], ValueError, "value: expected a head dim of at least 1"),
        ("value", lambda x: x.double(), TypeError, "value: expected the dtype of query"),
        ("query", lambda x: x[:, :3], ValueError, "key: expected a number of heads that divides"),
        ("query", lambda x: x.int(), TypeError, "query: expected a floating dtype"),
        ("query", lambda x: None, TypeError, "query: expected a tensor, got NoneType"),
        ("query", lambda x: x.to("meta"), ValueError, "key: expected the device of query"),
        ("plan_or_image_index", lambda x: x[:, :5], ValueError, "expected batch and tokens of"),
        ("plan_or_image_index", lambda x: x.float(), TypeError, "expected an integer dtype"),
        ("plan_or_image_index", lambda x: -x, ValueError, "expected numbers of at least 0"),
        ("plan_or_image_index", lambda x: BITS[..., :2], ValueError, "a bit for each of key's 3"),
        (
            "plan_or_image_index",
            lambda x: VF.cross_attention_plan(x, 4),
            ValueError,
            "plan_or_image_index: expected a plan for 3 images, as key has, got 4",
        ),
        (
            "plan_or_image_index",
            lambda x: VF.cross_attention_plan(x[:, :20], 3),
            ValueError,
            r"plan_or_image_index: expected a plan for \(2, 21\) tokens",
        ),
        ("plan_or_image_index", lambda x: None, TypeError, "expected a tensor, got NoneType"),
    ],
)
def test_wrong_arguments(name, change, error, message, backend):
    arguments = dict(zip(NAMES, (*qkv(), PHI), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        VF.image_cross_attention(*arguments.values(), backend=backend)


PLAN_OF_ONE = VF.cross_attention_plan(PHI, 3)
PLAN_OF_SEVERAL = VF.cross_attention_plan(BITS, 3, image_lengths=torch.full((2, 3), 6))


@pytest.mark.parametrize("plan", [PLAN_OF_ONE, PLAN_OF_SEVERAL])
@pytest.mark.parametrize("field", VF.CrossAttentionPlan._fields)
def test_plans_made_by_hand_are_refused_by_the_member_that_is_wrong(plan, field):
    good = getattr(plan, field)
    if good is None:
        good = torch.ones(2, 21, 3 if field == "visible" else 1, dtype=torch.int32)
    wrong = [1, good.to_sparse(), good.float(), good.long(), good[:1], good[None]]
    if field not in ("visible", "image_lengths"):
        wrong += [None, torch.full_like(good, -7)]
    for member in wrong:
        with pytest.raises(
            (TypeError, ValueError), match=rf"plan_or_image_index.*{field}|a plan f"
        ):
            VF.image_cross_attention(*qkv(), plan._replace(**{field: member}))


@pytest.mark.parametrize(
    "plan, field, place, number, message",
    [
        (PLAN_OF_ONE, "image_index", (1, 2), -3, "numbers from -2 to 3, got -3"),
        (PLAN_OF_ONE, "image_index", (1, 2), 4, "numbers from -2 to 3, got 4"),
        (PLAN_OF_SEVERAL, "image_index", (1, 2), -3, "numbers from -2 to 2147483647, got -3"),
        (PLAN_OF_ONE, "segments", (1, 0, 0), -1, "increasing positions of at most 21"),
        (PLAN_OF_ONE, "segments", (1, 2, 2), 22, "increasing positions of at most 21"),
        (PLAN_OF_SEVERAL, "segments", (0, 1, 1), 0, "increasing positions of at most 63"),
        (PLAN_OF_ONE, "segments", (0, 0, 1), 3, "one list for each image where visible is None"),
        (PLAN_OF_ONE, "order", (0, 3), 5, "an image's tokens to increase from 0 to 20"),
        (PLAN_OF_ONE, "order", (0, 0), -(2**31), "an image's tokens to increase from 0 to 20"),
        (PLAN_OF_SEVERAL, "order", (1, 20), 21, "an image's tokens to increase from 0 to 20"),
    ],
)
def test_wrong_numbers_in_plans_made_by_hand(plan, field, place, number, message):
    member = getattr(plan, field).clone()
    member[place] = number
    with pytest.raises(ValueError, match=f"plan_or_image_index.{field}: expected {message}"):
        VF.image_cross_attention(*qkv(), plan._replace(**{field: member}))


def test_numbers_of_images_beyond_int64_overflow():
    huge = torch.tensor([[0, 1, -(2**63)]]).view(torch.uint64)
    wanted = VF.cross_attention_plan(torch.tensor([[0, 1, 4]]), 3, overflow="uniform")
    for ours, theirs in zip(
        VF.cross_attention_plan(huge, 3, overflow="uniform"), wanted, strict=True
    ):
        assert ours is theirs or torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="image_index: expected at most num_images"):
        VF.cross_attention_plan(huge, 3, overflow="error")


def test_wrong_scale_and_backend():
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        VF.image_cross_attention(*qkv(), PLAN_OF_ONE, scale=1e39)
    with pytest.raises(TypeError, match="scale: expected a number"):
        VF.image_cross_attention(*qkv(), PHI, scale="1")
    with pytest.raises(ValueError, match="backend: expected one of"):
        VF.image_cross_attention(*qkv(), PHI, backend="opencl")


@pytest.mark.parametrize("which", ["out", "logsumexp", "both"])
def test_checkpoints_that_are_not_reentrant(which):
    tensors = [x.requires_grad_() for x in qkv()]

    def loss(query, key, value):
        out, logsumexp = VF.image_cross_attention(query, key, value, PHI, return_lse=True)
        visible = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        terms = {"out": out.sin(), "logsumexp": visible.sin()}
        return sum(x.sum() for name, x in terms.items() if which in (name, "both"))

    plain, again = (
        torch.autograd.grad(call(), tensors, allow_unused=True)
        for call in (
            lambda: loss(*tensors),
            lambda: checkpoint(loss, *tensors, use_reentrant=False),
        )
    )
    for x, y in zip(plain, again, strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("bits", [False, True])
def test_traced_calls_take_other_values(bits):
    def inputs():
        index = torch.rand(2, 21, 3) < 0.3 if bits else in_order()
        return [*(x.detach() for x in qkv()), index]

    traced = torch.jit.trace(VF.image_cross_attention, tuple(inputs()))
    others = inputs()
    assert_close(traced(*others), VF.image_cross_attention(*others))


def test_more_than_kernels_count_is_refused_by_them_alone():
    query, phi = torch.zeros(1, 1, 2, 8), torch.ones(1, 2, dtype=torch.int32)
    latents = torch.zeros(1, 1, 1, 1, 8).expand(1, 1, 1, 2**25, 8)
    with pytest.raises(ValueError, match="value: expected at most 16777216 latents, got 33554432"):
        VF.image_cross_attention(query, latents, latents, phi)
    wide = torch.zeros(1, 1, 1, 2, 2**17)
    out = VF.image_cross_attention(query, latents[:, :, :, :2], wide, phi, backend="reference")
    assert out.shape == (1, 1, 2, 2**17)


def test_a_backend_that_cannot_run_is_told_before_a_plan_that_is_wrong():
    query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 1, 3, 8)
    plan = VF.cross_attention_plan(torch.ones(1, 2, dtype=torch.int32), 1)
    wrong = plan._replace(order=plan.order + 9)
    with pytest.raises(NotImplementedError, match="cannot run this call"):
        VF.image_cross_attention(query, key, key, wrong, backend="cuda")
    with pytest.raises(ValueError, match=r"plan_or_image_index\.order") as failure:
        VF.image_cross_attention(query, key, key, wrong)
    assert failure.value.__context__ is None


def test_a_weight_on_the_only_latent_is_one(cpu_isa):
    """To the last bit, as in torch, though backward computes weights anew."""
    query = 3.0 * torch.randn(1, 2, 20, 64)
    key, value = (torch.randn(1, 2, 5, 1, 64) for _ in range(2))
    plan = VF.cross_attention_plan(torch.ones(1, 20, dtype=torch.int32), 5, mode="all_previous")
    out = VF.image_cross_attention(query, key, value.requires_grad_(), plan, backend="cpu")
    out.sum().backward()
    assert torch.equal(value.grad[:, :, 0], torch.full((1, 2, 1, 64), 20.0))
    assert value.grad[:, :, 1:].count_nonzero() == 0
