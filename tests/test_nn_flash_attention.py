"""vlmfast.nn.MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import vlmfast
import vlmfast.nn as vnn
from tools.models import assert_as_right_as, assert_drops_at_random, spy_on_attention

EMBED, HEADS, BATCH, QUERIES, KEYS = 48, 4, 3, 9, 13
CAUSAL = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)


def make_pair(training=False, **arguments):
    """The original and ours, with the same weights; biases that are not zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **arguments).train(training)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    ours = vnn.MultiheadAttention(EMBED, HEADS, **arguments).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def make_inputs(seed, batch_first=False, kdim=EMBED, vdim=EMBED, batch=BATCH, keys=KEYS, **masks):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count, width):
        shape = (batch, count, width) if batch_first else (count, batch, width)
        return torch.randn(shape if batch else (count, width), generator=generator)

    return {
        "query": tokens(QUERIES, EMBED),
        "key": tokens(keys, kdim),
        "value": tokens(keys, vdim),
        **{name: make(generator) for name, make in masks.items()},
    }


def call(module, inputs):
    return module(**inputs, need_weights=False)[0]


def self_attention(module, inputs):
    x = inputs["x"]
    return module(x, x, x, need_weights=False, **inputs.get("arguments", {}))[0]


def bool_mask(*shape):
    # The first key is never hidden: torch itself gives NaN for rows that see nothing.
    def make(generator):
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[..., 0] = False
        return mask

    return make


def float_mask(*shape):
    return lambda generator: torch.randn(shape, generator=generator)


MASKS = {
    "no mask": {},
    "bool padding": {"key_padding_mask": bool_mask(BATCH, KEYS)},
    "float padding": {"key_padding_mask": float_mask(BATCH, KEYS)},
    "bool 2-D": {"attn_mask": bool_mask(QUERIES, KEYS)},
    "float 2-D": {"attn_mask": float_mask(QUERIES, KEYS)},
    "bool 3-D": {"attn_mask": bool_mask(BATCH * HEADS, QUERIES, KEYS)},
    "float 3-D": {"attn_mask": float_mask(BATCH * HEADS, QUERIES, KEYS)},
    "bool both": {
        "key_padding_mask": bool_mask(BATCH, KEYS),
        "attn_mask": bool_mask(QUERIES, KEYS),
    },
    "float both": {
        "key_padding_mask": float_mask(BATCH, KEYS),
        "attn_mask": float_mask(BATCH * HEADS, QUERIES, KEYS),
    },
}

LAYERS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "own widths": {"kdim": 20, "vdim": 28},
    "own widths, no bias": {"kdim": 20, "vdim": 28, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "kdim": 20},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mask", ["no mask", "bool both", "float both"])
def test_every_layer(layer, mask):
    arguments = LAYERS[layer]
    widths = {
        name: arguments[name] for name in arguments if name in ("kdim", "vdim", "batch_first")
    }
    ours, theirs = make_pair(**arguments)
    assert_as_right_as(ours, theirs, lambda seed: make_inputs(seed, **widths, **MASKS[mask]), call)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_every_layer_under_a_causal_mask(layer, dtype):
    # The keys that bias_kv and zero_attn append stand beyond the mask: every query sees them.
    arguments = LAYERS[layer]
    widths = {
        name: arguments[name] for name in arguments if name in ("kdim", "vdim", "batch_first")
    }
    mask = CAUSAL
    if dtype != torch.bool:
        mask = torch.zeros(CAUSAL.shape).masked_fill(CAUSAL, float("-inf"))

    def run(module, inputs):  # with a mask that needs no gradient, which would hide its values
        return module(**inputs, attn_mask=mask, need_weights=False)[0]

    ours, theirs = make_pair(**arguments)
    assert_as_right_as(ours, theirs, lambda s: make_inputs(s, keys=QUERIES, **widths), run)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_mask(mask, batch_first):
    ours, theirs = make_pair(batch_first=batch_first)
    assert_as_right_as(
        ours,
        theirs,
        lambda seed: make_inputs(seed, batch_first=batch_first, **MASKS[mask]),
        call,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["no mask", "bool both", "float both"])
def test_narrow_dtypes(dtype, mask):
    ours, theirs = (module.to(dtype) for module in make_pair(batch_first=True))
    assert_as_right_as(
        ours, theirs, lambda seed: make_inputs(seed, batch_first=True, **MASKS[mask]), call
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "2-D and padding", "3-D"])
def test_unbatched(batch_first, masks):
    made = {
        "none": {},
        "2-D and padding": {
            "attn_mask": bool_mask(QUERIES, KEYS),
            "key_padding_mask": bool_mask(KEYS),
        },
        "3-D": {"attn_mask": float_mask(HEADS, QUERIES, KEYS)},
    }[masks]
    ours, theirs = make_pair(batch_first=batch_first)
    assert_as_right_as(ours, theirs, lambda seed: make_inputs(seed, batch=None, **made), call)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal_mask_reaches_the_kernel_as_a_flag(monkeypatch, batch_first, hint, kind):
    bias = torch.zeros(CAUSAL.shape).masked_fill(CAUSAL, float("-inf"))
    mask = CAUSAL if kind == "bool" else bias
    ours, theirs = make_pair(batch_first=batch_first)

    def inputs(seed):
        x = make_inputs(seed, batch_first=batch_first)["query"]
        return {"x": x, "arguments": {"attn_mask": mask, "is_causal": hint}}

    assert_as_right_as(ours, theirs, inputs, self_attention)
    calls = spy_on_attention(monkeypatch)
    self_attention(ours, inputs(0))
    assert [(c.is_causal, c.attn_mask) for c in calls] == [(True, None)]


def test_almost_causal_masks_stay_masks(monkeypatch):
    ours, theirs = make_pair()
    bias = torch.zeros(CAUSAL.shape).masked_fill(CAUSAL, float("-inf"))
    lower, upper, scaled, learned = (bias.clone() for _ in range(4))
    lower[5, 2] = 0.25
    upper[2, 5] = -1e4
    scaled[0, -1] = torch.finfo(torch.float32).min
    bool_lower = CAUSAL.clone()
    bool_lower[6, 3] = True
    calls = spy_on_attention(monkeypatch)
    for mask in (lower, upper, scaled, bool_lower, learned.requires_grad_()):
        x = make_inputs(0)["query"]
        out = ours(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(out, theirs(x, x, x, need_weights=False, attn_mask=mask)[0])
        assert not calls[-1].is_causal and calls[-1].attn_mask is not None


def test_causal_hint_and_padding_mask_the_union():
    ours, theirs = make_pair(batch_first=True)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1, 6:] = True

    def inputs(seed):
        arguments = {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": padding}
        return {"x": make_inputs(seed, batch_first=True)["query"], "arguments": arguments}

    assert_as_right_as(ours, theirs, inputs, self_attention)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_weights_are_those_of_torch(average, batch_first, grad):
    ours, theirs = make_pair(batch_first=batch_first)
    x = make_inputs(0, batch_first=batch_first)["query"]
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.set_grad_enabled(grad):
        results = [
            module(x, x, x, key_padding_mask=padding, average_attn_weights=average)
            for module in (ours, theirs)
        ]
    for mine, original in zip(*results, strict=True):
        assert torch.equal(mine, original)


def test_inference_does_not_bypass_the_kernels(monkeypatch):
    ours, theirs = make_pair(batch_first=True)
    calls = spy_on_attention(monkeypatch)
    x = make_inputs(0, batch_first=True)["query"]
    with torch.inference_mode():
        out = self_attention(ours, {"x": x})
        torch.testing.assert_close(out, self_attention(theirs, {"x": x}))
    assert len(calls) == 1


def test_nested_sequences_run_packed(monkeypatch):
    ours, theirs = make_pair(batch_first=True)
    lengths = (5, 1, 9)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randn(length, EMBED, generator=generator) for length in lengths]
    nested = torch.nested.as_nested_tensor(sequences)
    calls = spy_on_attention(monkeypatch)
    with torch.inference_mode():
        out = self_attention(ours, {"x": nested})
        expected = [self_attention(theirs, {"x": sequence}) for sequence in sequences]
    assert out.is_nested and [c.function for c in calls] == ["varlen_attention"]
    for mine, original in zip(out.unbind(), expected, strict=True):
        torch.testing.assert_close(mine, original)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_layouts(layout):
    ours, theirs = make_pair(batch_first=True)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randn(n, EMBED, generator=generator).requires_grad_() for n in (5, 1, 9)]
    nested = torch.nested.as_nested_tensor(sequences, layout=layout)
    out = self_attention(ours, {"x": nested})
    assert out.layout == layout
    (out + nested).to_padded_tensor(0.0).square().sum().backward()  # as a residual connection
    for sequence, mine in zip(sequences, out.unbind(), strict=True):
        again = sequence.detach().requires_grad_()
        expected = self_attention(theirs, {"x": again})
        torch.testing.assert_close(mine, expected)
        (expected + again).square().sum().backward()
        torch.testing.assert_close(sequence.grad, again.grad)


def test_nested_tensors_that_do_not_fit():
    ours, _ = make_pair(batch_first=True)
    assert self_attention(ours, {"x": torch.nested.nested_tensor([])}).size(0) == 0
    for sequence, error, message in (
        (torch.zeros(3, 7), ValueError, r"query: expected sequences of shape \(tokens, 48\)"),
        (torch.zeros(3, EMBED).long(), TypeError, "query: expected a floating dtype"),
        (torch.zeros(3, EMBED).double(), TypeError, "query: expected the dtype of the weights"),
    ):
        with pytest.raises(error, match=message):
            self_attention(ours, {"x": torch.nested.nested_tensor([sequence])})
    x = torch.nested.nested_tensor([torch.zeros(3, EMBED)])
    with pytest.raises(ValueError, match="nested tensors need self-attention"):
        ours(x, [1], x, need_weights=False)


def test_dropout_follows_the_generator_and_training():
    ours, _ = make_pair(dropout=0.5, training=True)
    x = make_inputs(0)["query"]
    assert_drops_at_random(lambda: self_attention(ours, {"x": x}))
    ours.eval()
    assert torch.equal(self_attention(ours, {"x": x}), self_attention(ours, {"x": x}))


def test_dropout_of_everything_leaves_the_bias():
    ours, theirs = make_pair(dropout=1.0, training=True)
    x = make_inputs(0)["query"]
    out = self_attention(ours, {"x": x})
    assert torch.equal(out, theirs.out_proj.bias.expand_as(out))


def test_dropout_keeps_the_mean():
    ours, theirs = make_pair(dropout=0.3, training=True, batch_first=True)
    x = make_inputs(0, batch_first=True)["query"]
    torch.manual_seed(0)
    samples = torch.stack([self_attention(ours, {"x": x}).detach() for _ in range(400)])
    expected = self_attention(theirs.eval(), {"x": x}).detach()
    deviation = (samples.mean(0) - expected) / (samples.std(0) / 400**0.5)
    # 1296 standard normal deviates: their mean square is 1 +- 0.04.
    assert 0.7 < deviation.square().mean() < 1.3


def test_same_constructor_and_state():
    assert inspect.signature(vnn.MultiheadAttention) == inspect.signature(nn.MultiheadAttention)
    assert inspect.signature(vnn.MultiheadAttention.forward).parameters.keys() == (
        inspect.signature(nn.MultiheadAttention.forward).parameters.keys()
    )
    for arguments in LAYERS.values():
        ours, theirs = make_pair(**arguments)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    ours, _ = make_pair()
    ours.backend = "reference"
    again = copied(ours)
    assert type(again) is vnn.MultiheadAttention and again.backend == "reference"
    inputs = make_inputs(0)
    assert torch.equal(call(again, inputs), call(ours, inputs))


def test_backend_is_forced(monkeypatch):
    ours, _ = make_pair()
    calls = spy_on_attention(monkeypatch)
    call(ours, make_inputs(0))
    ours.backend = "reference"
    call(ours, make_inputs(0))
    assert [c.backend for c in calls] == [None, "reference"]
    ours.backend = "abacus"
    with pytest.raises(ValueError, match="abacus"):
        call(ours, make_inputs(0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    torch._dynamo.reset()
    ours, _ = make_pair(batch_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for mask in (None, CAUSAL):
        x = make_inputs(0, batch_first=True)["query"].requires_grad_()
        expected = ours(x, x, x, need_weights=False, attn_mask=mask)[0]
        out = compiled(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)))


def test_vmap_over_masks():
    ours, _ = make_pair(batch_first=True)
    x = make_inputs(0, batch_first=True)["query"]
    masks = torch.stack([CAUSAL, torch.zeros_like(CAUSAL)])

    def attend(mask):
        return ours(x, x, x, need_weights=False, attn_mask=mask)[0]

    torch.testing.assert_close(
        torch.vmap(attend)(masks), torch.stack([attend(mask) for mask in masks])
    )


def test_autocast():
    ours, theirs = make_pair(batch_first=True)
    inputs = make_inputs(0, batch_first=True, **MASKS["float 2-D"])
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = call(ours, inputs), call(theirs, inputs)
    assert out.dtype == expected.dtype == torch.bfloat16
    truth = call(theirs, inputs)
    error = (out - truth).norm() / truth.norm()
    assert error <= 2 * (expected - truth).norm() / truth.norm() + torch.finfo(out.dtype).eps


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 4, EMBED)}, ValueError, "query: expected 2 or 3 dim"),
        ({"query": torch.zeros(QUERIES, BATCH, 7)}, ValueError, "query: expected .* size 48"),
        ({"key": torch.zeros(KEYS, BATCH, 7)}, ValueError, "key: expected .* size 48"),
        ({"key": torch.zeros(KEYS, EMBED)}, ValueError, "key: expected 3 dimensions"),
        ({"key": torch.zeros(5, BATCH, EMBED)}, ValueError, "value: expected key's leading"),
        ({"attn_mask": torch.zeros(4, 4)}, ValueError, "attn_mask: expected shape"),
        ({"key_padding_mask": torch.zeros(4, 4)}, ValueError, "key_padding_mask: expected shape"),
        (
            {"attn_mask": torch.zeros(QUERIES, KEYS, dtype=torch.int64)},
            TypeError,
            "attn_mask: expected a bool or floating dtype",
        ),
        ({"attn_mask": [1]}, TypeError, "attn_mask: expected a tensor or None, got list"),
        ({"key_padding_mask": [1]}, TypeError, "key_padding_mask: expected a tensor or None"),
        (
            {"attn_mask": torch.zeros(QUERIES, KEYS, device="meta")},
            ValueError,
            "attn_mask: expected the device of query, cpu, got meta",
        ),
        (
            {"key_padding_mask": torch.zeros(BATCH, KEYS, device="meta")},
            ValueError,
            "key_padding_mask: expected the device of query",
        ),
        ({"is_causal": True}, ValueError, "attn_mask: expected the causal mask"),
    ],
)
def test_bad_input(change, error, message):
    ours, _ = make_pair()
    with pytest.raises(error, match=message):
        call(ours, {**make_inputs(0), **change})


WRONG_TENSORS = {
    "not a tensor": (lambda x: x.tolist(), TypeError, "a tensor, got list"),
    "integers": (lambda x: x.long(), TypeError, "a floating dtype, got torch.int64"),
    "bfloat16": (lambda x: x.bfloat16(), TypeError, "the dtype of the weights, torch.float32"),
    "float64": (lambda x: x.double(), TypeError, "the dtype of the weights, torch.float32"),
    "device": (lambda x: x.to("meta"), ValueError, "the device of the weights, cpu, got meta"),
}


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
@pytest.mark.parametrize("layer", ["plain", "own widths"])
def test_wrong_tensors(name, wrong, layer):
    spoil, error, message = WRONG_TENSORS[wrong]
    ours, _ = make_pair(**LAYERS[layer])
    inputs = make_inputs(0, **LAYERS[layer])
    inputs[name] = spoil(inputs[name])
    with pytest.raises(error, match=f"{name}: expected {message}"):
        call(ours, inputs)


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_tensors_in_self_attention(wrong):
    spoil, error, message = WRONG_TENSORS[wrong]
    ours, _ = make_pair()
    with pytest.raises(error, match=f"query: expected {message}"):
        self_attention(ours, {"x": spoil(make_inputs(0)["query"])})


def test_autocast_casts_all_but_float64():
    ours, _ = make_pair()
    inputs = make_inputs(0)
    with torch.autocast("cpu", torch.bfloat16):
        call(ours, {**inputs, "key": inputs["key"].half()})
        with pytest.raises(TypeError, match="key: expected the dtype of the weights"):
            call(ours, {**inputs, "key": inputs["key"].double()})


def test_package_offers_it():
    assert vlmfast.nn.MultiheadAttention is vnn.MultiheadAttention


def test_a_longer_causal_mask_is_a_hint():
    """Models keep the mask of their longest sequence; with the flag torch does not look at it."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    ours = vnn.MultiheadAttention(32, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(20)
    out, expected = (
        layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        for layer in (ours, theirs)
    )
    torch.testing.assert_close(out, expected)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(7, 7\)"):
        ours(x, x, x, padding, attn_mask=mask, is_causal=True, need_weights=False)
