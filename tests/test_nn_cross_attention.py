"""vlmfast.nn's Flamingo layers against flamingo-pytorch's, and against OpenFlamingo's formula."""

import copy
import inspect
import pickle
import warnings

import flamingo_pytorch.flamingo_pytorch as original
import pytest
import torch
from torch import nn

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn
from tools import open_flamingo, open_flamingo_v1
from tools.models import (
    assert_as_right_as,
    assert_same_in_float64,
    measure,
    open_gates,
    spy_on_attention,
)
from vlmfast.kept import Copied, Keeper

BATCH, TOKENS, IMAGES, LATENTS, WIDTH, VISUAL = 3, 11, 2, 5, 32, 24
SIZES = {"dim": WIDTH, "dim_head": 8, "heads": 4}

# The last row has an image more than there are media: what comes after it overflows.
LOCATIONS = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
LOCATIONS[0, [4, 8]] = True
LOCATIONS[1, [0, 1]] = True
LOCATIONS[2, [2, 3, 7]] = True


def make_pair(name, library=original, **arguments):
    """The original and ours with the same weights: norms are not 1, gates are open."""
    torch.manual_seed(0)
    theirs = getattr(library, name)(**arguments)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.7, std=0.2)
    ours = getattr(vnn, name)(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def text_and_media(seed, images=IMAGES, width=WIDTH, tokens=TOKENS, **others):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(BATCH, tokens, WIDTH, generator=generator),
        "media": torch.randn(BATCH, images, LATENTS, width, generator=generator),
        **others,
    }


def assert_right(ours, theirs, make_inputs):
    assert_same_in_float64(ours, theirs, make_inputs(0))
    for module in (ours, theirs):
        open_gates(module, WIDTH)
    assert_as_right_as(ours, theirs, make_inputs)


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
@pytest.mark.parametrize("locations", [LOCATIONS, None], ids=["media", "absent"])
def test_flamingo_pytorch(name, immediate, locations):
    ours, theirs = make_pair(name, **SIZES, only_attend_immediate_media=immediate)
    assert_right(ours, theirs, lambda s: text_and_media(s, media_locations=locations))


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
def test_no_image_before(immediate):
    ours, theirs = make_pair("MaskedCrossAttention", **SIZES, only_attend_immediate_media=immediate)
    none = torch.zeros_like(LOCATIONS)
    if immediate:
        out = ours(**text_and_media(0, media_locations=none))
        assert torch.equal(out, torch.zeros_like(out))
    assert_as_right_as(ours, theirs, lambda s: text_and_media(s, media_locations=none))


def test_locations_may_be_numbers():
    ours, theirs = make_pair("MaskedCrossAttention", **SIZES)
    inputs = text_and_media(0, media_locations=LOCATIONS.long())
    torch.testing.assert_close(ours(**inputs), theirs(**inputs))


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
@pytest.mark.parametrize("cached", [False, True])
def test_open_flamingo(name, immediate, cached):
    ours, theirs = make_pair(
        name, open_flamingo, **SIZES, dim_visual=VISUAL, only_attend_immediate_media=immediate
    )
    others = {"media_locations": LOCATIONS, "use_cached_media": cached}
    tokens = 4 if cached else TOKENS
    assert_right(ours, theirs, lambda s: text_and_media(s, width=VISUAL, tokens=tokens, **others))


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("previous", [False, True])
def test_attend_previous(name, previous):
    theirs = getattr(open_flamingo_v1, name)(**SIZES, dim_visual=VISUAL)
    ours = getattr(vnn, name)(**SIZES, dim_visual=VISUAL)
    open_gates(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    others = {"media_locations": LOCATIONS, "attend_previous": previous}
    assert_right(ours, theirs, lambda s: text_and_media(s, images=3, width=VISUAL, **others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    ours, theirs = (m.to(dtype) for m in make_pair("GatedCrossAttentionBlock", **SIZES))
    for module in (ours, theirs):
        open_gates(module, WIDTH)
    assert_as_right_as(ours, theirs, lambda s: text_and_media(s, media_locations=LOCATIONS))
    ours, theirs = (m.to(dtype) for m in make_pair("PerceiverAttention", **SIZES))
    assert_as_right_as(ours, theirs, features_and_latents)


def test_autocast():
    ours, theirs = make_pair("GatedCrossAttentionBlock", **SIZES)
    for module in (ours, theirs):
        open_gates(module, WIDTH)

    def call(module, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(**inputs)
        assert out.dtype == inputs["x"].dtype
        return out

    assert_as_right_as(ours, theirs, lambda s: text_and_media(s, media_locations=LOCATIONS), call)


def test_fresh_block_is_the_identity_and_its_gates_learn():
    theirs = original.GatedCrossAttentionBlock(**SIZES)
    ours = vnn.GatedCrossAttentionBlock(**SIZES)
    ours.load_state_dict(theirs.state_dict())

    def call(module, inputs):  # with all that has a gradient: closed gates let none through
        module.requires_grad_(False)
        for gate in (module.attn_gate, module.ff_gate):
            gate.requires_grad_()
        inputs["media"].requires_grad_(False)
        return module(**inputs)

    inputs = text_and_media(0, media_locations=LOCATIONS)
    assert_same_in_float64(ours, theirs, inputs, call)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = ours.to(dtype).requires_grad_()
        inputs = text_and_media(0)
        x, media = (tensor.to(dtype) for tensor in inputs.values())
        out = ours(x, media, LOCATIONS)
        assert torch.equal(out, x)
        out.sum().backward()
        assert ours.attn_gate.grad != 0 and ours.ff_gate.grad != 0
        ours.zero_grad()


def features_and_latents(seed, features=9):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(2, 3, features, WIDTH, generator=generator),
        "latents": torch.randn(2, 3, 4, WIDTH, generator=generator),
    }


@pytest.mark.parametrize("features", [1, 9])
def test_perceiver_attention(features):
    ours, theirs = make_pair("PerceiverAttention", **SIZES)
    assert_right(ours, theirs, lambda seed: features_and_latents(seed, features))


def test_perceiver_attention_of_sources_far_apart():
    # The softmax is one over both: a source whose logits are all small must all but vanish.
    ours, theirs = (m.double() for m in make_pair("PerceiverAttention", **SIZES))
    for norm in ("norm_media", "norm_latents"):
        for factor in (1e-3, 6.0):
            for m in (ours, theirs):
                nn.init.constant_(getattr(m, norm).weight, factor)
            assert_same_in_float64(ours, theirs, features_and_latents(0))


def test_perceiver_attention_puts_nothing_together(monkeypatch):
    ours, _ = make_pair("PerceiverAttention", **SIZES)
    for name in ("cat", "concat", "concatenate", "stack"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("put together"))
    calls = spy_on_attention(monkeypatch)
    ours(**features_and_latents(0))
    assert [c.function for c in calls] == ["varlen_attention"] * 2


def video(seed, shape):
    return {"x": torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))}


RESAMPLER = {**SIZES, "depth": 2, "num_latents": 6, "ff_mult": 2}


@pytest.mark.parametrize("shape", [(2, 9), (2, 3, 9), (2, 4, 1)], ids=str)
def test_resampler_of_flamingo_pytorch(shape):
    ours, theirs = make_pair("PerceiverResampler", **RESAMPLER)
    assert_right(ours, theirs, lambda seed: video(seed, shape))


@pytest.mark.parametrize("media", [None, 5])
@pytest.mark.parametrize("frames", [None, 4])
def test_resampler_of_open_flamingo(media, frames):
    torch.manual_seed(0)
    theirs = open_flamingo.PerceiverResampler(
        **RESAMPLER, max_num_media=media, max_num_frames=frames
    )
    ours = vnn.PerceiverResampler(
        **RESAMPLER, max_num_media=media, max_num_frames=frames, num_media_embeds=None
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_right(ours, theirs, lambda seed: video(seed, (2, 3, 4, 5)))


def test_resampler_takes_open_flamingos_arguments_as_they_are():
    arguments = {**RESAMPLER, "max_num_media": 2}
    theirs = open_flamingo.PerceiverResampler(**arguments)
    assert list(vnn.PerceiverResampler(**arguments).state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "MaskedCrossAttention",
        "GatedCrossAttentionBlock",
        "PerceiverAttention",
        "PerceiverResampler",
    ],
)
def test_same_constructor_and_state(name):
    ours, theirs = (
        inspect.signature(getattr(library, name)).parameters for library in (vnn, original)
    )
    for argument, parameter in theirs.items():
        assert ours[argument].kind == parameter.kind
        if parameter.default is not parameter.empty:
            assert ours[argument].default == parameter.default
    arguments = RESAMPLER if name == "PerceiverResampler" else SIZES
    mine, original_layer = make_pair(name, **arguments)
    assert list(mine.state_dict()) == list(original_layer.state_dict())
    original_layer.load_state_dict(mine.state_dict(), strict=True)


def test_images_that_are_not_attended_to_do_not_matter():
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    inputs = text_and_media(0)
    index = VF.image_index(LOCATIONS)
    before = ours(**inputs, media_locations=LOCATIONS)
    for image in range(IMAGES):
        media = inputs["media"].clone()
        media[:, image] += 1
        changed = ours(inputs["x"], media, LOCATIONS) != before
        sees = (index == image + 1) | (index > IMAGES)  # the overflowing see all, as a mean
        assert torch.equal(changed.any(-1), sees)
        media[:, image] = float("nan")
        assert torch.equal(ours(inputs["x"], media, LOCATIONS).isnan().any(-1), sees)


def test_permuting_the_batch_permutes_the_result():
    ours, _ = make_pair("GatedCrossAttentionBlock", **SIZES)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    order = torch.tensor([2, 0, 1])
    permuted = {name: tensor[order] for name, tensor in inputs.items()}
    torch.testing.assert_close(ours(**permuted), ours(**inputs)[order])


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_steps_of_decoding_give_what_the_prefill_gives(name, immediate, mode):
    ours, theirs = make_pair(name, **SIZES, only_attend_immediate_media=immediate)
    with mode():
        inputs = text_and_media(0)
        x, media = inputs["x"], inputs["media"]
        whole = ours(x, media, LOCATIONS)
        steps = [
            ours(x[:, t : t + 1], media, LOCATIONS[:, : t + 1], use_cached_media=True)
            for t in range(TOKENS)
        ]
        torch.testing.assert_close(torch.cat(steps, 1), whole)
        torch.testing.assert_close(whole, theirs(x, media, LOCATIONS))


class Counted:
    """How often a layer projected its media."""

    def __init__(self, monkeypatch, layer):
        self.layer, self.count = layer, 0
        forward = nn.Linear.forward

        def counting(module, input):
            self.count += module is layer.to_kv
            return forward(module, input)

        monkeypatch.setattr(nn.Linear, "forward", counting)

    def during(self, call):
        before = self.count
        result = call()
        return result, self.count - before


def fresh(layer, *inputs):
    """What the layer gives without anything kept from before."""
    again = copy.deepcopy(layer)
    return again(*inputs)


@pytest.fixture
def decoding(monkeypatch):
    """A layer that has just projected some media, which it must not do again."""
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    ours.eval()
    inputs = text_and_media(0)
    arguments = [inputs["x"], inputs["media"], LOCATIONS]
    counted = Counted(monkeypatch, ours)
    with torch.no_grad():
        out, projections = counted.during(lambda: ours(*arguments))
        assert projections == 1
        again, projections = counted.during(lambda: ours(*arguments))
        assert projections == 0 and torch.equal(again, out)
        view, projections = counted.during(
            lambda: ours(arguments[0], arguments[1].view(arguments[1].shape), LOCATIONS)
        )
        assert projections == 0 and torch.equal(view, out)
    return ours, arguments, counted


def media_in_place(layer, arguments):
    arguments[1][1] += 1


def media_through_a_view(layer, arguments):
    arguments[1].view(-1)[7] = 3


def other_media(layer, arguments):
    arguments[1] = arguments[1] * 2


def media_of_another_shape(layer, arguments):
    arguments[1] = arguments[1].view(BATCH, 1, IMAGES * LATENTS, WIDTH)


def media_reordered(layer, arguments):
    arguments[1] = arguments[1].flip(1)


def media_data_replaced(layer, arguments):
    arguments[1].data = arguments[1].data + 1


def weight_in_place(layer, arguments):
    layer.to_kv.weight.mul_(2)


def weight_data_replaced(layer, arguments):
    layer.to_kv.weight.data = layer.to_kv.weight.data * 2


def other_weight(layer, arguments):
    layer.to_kv.weight = nn.Parameter(layer.to_kv.weight * 2)


def other_projection(layer, arguments):
    projection = nn.Linear(WIDTH, 64, bias=True)
    layer.to_kv = projection


def loaded_weights(layer, arguments):
    layer.load_state_dict({name: 2 * x for name, x in layer.state_dict().items()})


def weight_through_data(layer, arguments):
    layer.to_kv.weight.data.mul_(2)


def media_through_data(layer, arguments):
    arguments[1].data.add_(1)


def weight_through_numpy(layer, arguments):
    layer.to_kv.weight.detach().numpy()[3] = 1


def media_through_numpy(layer, arguments):
    arguments[1].numpy()[...] *= 2


def media_through_dlpack(layer, arguments):
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(arguments[1])).mul_(2)


def weight_by_a_fused_kernel(layer, arguments):
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.5, "dampening": 0.0}
    flags = {"nesterov": False, "maximize": False, "is_first_step": True}
    weight = layer.to_kv.weight
    torch._fused_sgd_([weight], [torch.ones_like(weight)], [], **options, **flags)


def signs_of_zeros(layer, arguments):
    layer.to_kv.weight.data.zero_()
    layer(*arguments)
    layer.to_kv.weight.data.neg_()


def other_dtype(layer, arguments):
    layer.double()
    arguments[:2] = [x.double() for x in arguments[:2]]


def optimiser(**options):
    def step(layer, arguments):
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        with torch.enable_grad():
            layer(*arguments).square().sum().backward()
        with torch.no_grad():
            layer(*arguments)  # kept again, between backward and the step
        optimiser.step()

    step.__name__ = f"step of an optimiser, {options}"
    return step


CHANGES = [
    media_in_place,
    media_through_a_view,
    other_media,
    media_of_another_shape,
    media_reordered,
    media_data_replaced,
    weight_in_place,
    weight_data_replaced,
    other_weight,
    other_projection,
    loaded_weights,
    weight_through_data,
    media_through_data,
    weight_through_numpy,
    media_through_numpy,
    media_through_dlpack,
    weight_by_a_fused_kernel,
    signs_of_zeros,
    other_dtype,
    optimiser(foreach=False),
    optimiser(foreach=True),
    optimiser(fused=True),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_kept_media_are_never_stale(decoding, change):
    layer, arguments, counted = decoding
    with torch.no_grad():
        change(layer, arguments)
        out, projections = counted.during(lambda: layer(*arguments))
        assert projections == 1
        assert torch.equal(out, fresh(layer, *arguments))
        assert counted.during(lambda: layer(*arguments))[1] == 0


def test_masks_that_numpy_writes_are_noticed(decoding):
    layer, arguments, _ = decoding
    arguments[2] = LOCATIONS.clone()
    with torch.no_grad():
        layer(*arguments)
        arguments[2].numpy()[...] ^= True
        assert torch.equal(layer(*arguments), fresh(layer, *arguments))


def test_hooks_on_all_modules_run_every_time(decoding):
    layer, arguments, _ = decoding
    seen = []

    def hook(module, inputs, output):
        seen.append(module)
        return output * 2 if module is layer.to_kv else None

    with torch.no_grad():
        expected = layer(*arguments)
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        try:
            other = [layer(*arguments) for _ in range(2)]
        finally:
            handle.remove()
        assert torch.equal(*other) and not torch.allclose(other[0], expected)
        assert seen.count(layer.to_kv) == 2
        assert torch.equal(layer(*arguments), expected)


def test_kept_media_in_inference_mode(monkeypatch):
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    counted = Counted(monkeypatch, ours)
    with torch.inference_mode():
        inputs = text_and_media(0, media_locations=LOCATIONS.clone())
        assert inputs["media"].is_inference()
        assert counted.during(lambda: ours(**inputs))[1] == 1
        assert counted.during(lambda: ours(**inputs))[1] == 0
        inputs["media"][0] += 1
        inputs["media_locations"][0, 6] = True
        out, projections = counted.during(lambda: ours(**inputs))
        assert projections == 1 and torch.equal(out, copy.deepcopy(ours)(**inputs))


@pytest.mark.parametrize("which", ["media", "weight", "locations"])
def test_writes_of_other_processes_are_seen(decoding, which):
    layer, arguments, _ = decoding
    arguments[2] = LOCATIONS.int()
    written = {"media": arguments[1], "weight": layer.to_kv.weight, "locations": arguments[2]}
    written = written[which].detach()
    assert written.share_memory_().is_shared()
    with torch.no_grad():
        layer(*arguments)
        process = torch.multiprocessing.get_context("fork").Process(
            target=torch.Tensor.zero_, args=(written,)
        )
        process.start()
        process.join()
        assert not written.any()
        assert torch.equal(layer(*arguments), fresh(layer, *arguments))


def test_equal_media_elsewhere_are_the_same(decoding):
    layer, arguments, counted = decoding
    with torch.no_grad():
        expected = layer(*arguments)
        arguments[1] = arguments[1].clone()
        out, projections = counted.during(lambda: layer(*arguments))
    assert projections == 0 and torch.equal(out, expected)


@pytest.mark.parametrize("size", [8, 6, 1], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("offset", [0, 1])
def test_every_byte_is_compared(size, offset):
    memory = torch.zeros(size + offset, dtype=torch.uint8)
    source = memory[offset:]
    keeper, made = Keeper(), []
    for value, written in enumerate((0, 0, size - 1)):
        source.data[written] = value
        for _ in range(2):
            keeper.get(Copied, (source,), None, lambda: made.append(0))
    assert len(made) == 3


def test_what_inference_mode_kept_serves_training():
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    ours.to_kv.requires_grad_(False)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    with torch.inference_mode():
        expected = ours(**inputs)
    out = ours(**inputs)
    out.sum().backward()
    assert torch.equal(out, expected) and ours.to_q.weight.grad.abs().sum() > 0


def test_kept_media_under_autocast(decoding):
    layer, arguments, counted = decoding
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, projections = counted.during(lambda: layer(*arguments))
        assert projections == 1 and out.dtype == torch.bfloat16
        assert torch.equal(out, fresh(layer, *arguments))
    with torch.no_grad():
        assert layer(*arguments).dtype == torch.float32


def test_nothing_is_kept_where_a_gradient_is_wanted(decoding):
    layer, arguments, counted = decoding
    for _ in range(2):
        out, projections = counted.during(lambda: layer(*arguments))
        assert projections == 1
        out.sum().backward()
    layer.requires_grad_(False)
    arguments[1].requires_grad_()
    for _ in range(2):
        out, projections = counted.during(lambda: layer(*arguments))
        assert projections == 1
        out.sum().backward()


def test_hooks_on_the_projection_run_every_time(decoding):
    layer, arguments, _ = decoding
    seen = []
    layer.to_kv.register_forward_hook(lambda *_: seen.append("hook"))
    with torch.no_grad():
        layer(*arguments)
        layer(*arguments)
    assert len(seen) == 2


def test_traces_hold_the_projection(decoding):
    layer, arguments, _ = decoding
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, tuple(arguments[:2]), check_trace=False)
        other = torch.randn_like(arguments[1])
        torch.testing.assert_close(traced(arguments[0], other), layer(arguments[0], other))


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_layers_take_other_tokens_media_and_locations(immediate):
    block, _ = make_pair("GatedCrossAttentionBlock", **SIZES, only_attend_immediate_media=immediate)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    traced = torch.jit.trace(block, tuple(inputs.values()))
    others = text_and_media(1, media_locations=LOCATIONS.flip(0)).values()
    torch.testing.assert_close(traced(*others), block(*others))


def test_one_plan_serves_all_layers(monkeypatch):
    layers = [make_pair("GatedCrossAttentionBlock", **SIZES)[0] for _ in range(3)]
    made = []
    original_plan = VF.cross_attention_plan

    def counting(*args, **kwargs):
        made.append(args)
        return original_plan(*args, **kwargs)

    monkeypatch.setattr(VF, "cross_attention_plan", counting)
    inputs, locations = text_and_media(0), LOCATIONS.clone()
    layers[0].attn.forget_media()
    for _ in range(2):
        x = inputs["x"]
        for layer in layers:
            x = layer(x, inputs["media"], locations)
    assert len(made) == 1
    locations[0, 6] = True
    out = layers[0](inputs["x"], inputs["media"], locations)
    assert len(made) == 2
    torch.testing.assert_close(out, layers[0](inputs["x"], inputs["media"], locations.clone()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    ours, _ = make_pair("GatedCrossAttentionBlock", **SIZES)
    ours.attn.backend = "reference"
    inputs = text_and_media(0, media_locations=LOCATIONS)
    with torch.no_grad():
        expected = ours(**inputs)
        again = copied(ours)
        assert again.attn.backend == "reference"
        assert torch.equal(again(**inputs), expected)
        ours.attn.to_kv.weight.zero_()
        assert torch.equal(again(**inputs), expected)


def test_backend_is_forced(monkeypatch):
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    calls = spy_on_attention(monkeypatch)
    for backend in (None, "reference"):
        ours.backend = backend
        ours(**text_and_media(0, media_locations=LOCATIONS))
        ours(**text_and_media(0))
    assert [(c.function, c.backend) for c in calls] == [
        ("image_cross_attention", None),
        ("scaled_dot_product_attention", None),
        ("image_cross_attention", "reference"),
        ("scaled_dot_product_attention", "reference"),
    ]


def test_explain():
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    explanation = vlmfast.explain(ours, **text_and_media(0, media_locations=LOCATIONS))
    assert explanation.family == "cross_attention"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    torch._dynamo.reset()
    ours, _ = make_pair("GatedCrossAttentionBlock", **SIZES)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    results, expected = (
        measure(ours, inputs, lambda _, given, m=m: m(**given)) for m in (compiled, ours)
    )
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])


def test_resampler_compiles_into_one_graph():
    torch._dynamo.reset()
    ours, _ = make_pair("PerceiverResampler", **RESAMPLER)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = video(0, (2, 3, 9))
    torch.testing.assert_close(compiled(**inputs), ours(**inputs))


def test_compiled_after_decoding_projects_anew(decoding):
    torch._dynamo.reset()
    layer, arguments, _ = decoding
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(*arguments)
        layer.to_kv.weight.data.mul_(2)
        torch.testing.assert_close(compiled(*arguments), fresh(layer, *arguments))


@pytest.mark.parametrize(("batch", "tokens", "images"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_empty(batch, tokens, images):
    ours = vnn.GatedCrossAttentionBlock(**SIZES)
    x = torch.randn(batch, tokens, WIDTH)
    media = torch.randn(batch, images, LATENTS, WIDTH)
    out = ours(x, media, torch.ones(batch, tokens, dtype=torch.bool))
    assert torch.equal(out, x)


GOOD = {
    "x": torch.zeros(2, 4, WIDTH),
    "media": torch.zeros(2, 3, 5, WIDTH),
    "media_locations": torch.zeros(2, 4, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 4, WIDTH).long()}, TypeError, "x: expected a floating dtype"),
        ({"x": torch.zeros(2, 4, WIDTH).double()}, TypeError, "x: expected the dtype of the wei"),
        ({"x": torch.zeros(4, WIDTH)}, ValueError, r"x: expected shape \(B, T, dim\)"),
        ({"x": torch.zeros(2, 4, 7)}, ValueError, "x: expected a last dimension of size 32"),
        ({"media": None}, TypeError, "media: expected a tensor, got NoneType"),
        ({"media": torch.zeros(2, 5, WIDTH)}, ValueError, r"media: expected shape \(2, I, L"),
        ({"media": torch.zeros(1, 3, 5, WIDTH)}, ValueError, r"media: expected shape \(2, I, L"),
        ({"media": torch.zeros(2, 3, 5, 7)}, ValueError, "media: expected a last dimension"),
        ({"media": torch.zeros(2, 3, 5, WIDTH, device="meta")}, ValueError, "media: expected the"),
        ({"media_locations": [[True]]}, TypeError, "media_locations: expected a tensor or None"),
        ({"media_locations": torch.zeros(2, 4)}, TypeError, "media_locations: expected dtype"),
        ({"media_locations": torch.zeros(2, 5).bool()}, ValueError, r"media_locations: .*\(2, 4\)"),
        (
            {"media_locations": torch.zeros(3, 5).bool(), "use_cached_media": True},
            ValueError,
            r"media_locations: .*\(2, any\)",
        ),
        (
            {"attend_previous": False, "use_cached_media": True},
            ValueError,
            "attend_previous: expected True with use_cached_media",
        ),
        (
            {"attend_previous": False, "media_locations": torch.zeros(2, 4).long()},
            TypeError,
            "media_locations: expected dtype torch.bool with attend_previous=False",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    layer = vnn.MaskedCrossAttention(**SIZES)
    with pytest.raises(error, match=message):
        layer(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"latents": 3}, TypeError, "latents: expected a tensor, got int"),
        ({"x": torch.zeros(2, 9, WIDTH)}, ValueError, r"x: expected shape \(B, I, tokens, dim\)"),
        ({"x": torch.zeros(2, 3, 9, 7)}, ValueError, "x: expected a last dimension of size 32"),
        ({"x": torch.zeros(2, 4, 9, WIDTH)}, ValueError, r"latents: expected batch and images"),
        ({"latents": torch.zeros(2, 3, 4, WIDTH).half()}, TypeError, "latents: expected the dty"),
    ],
)
def test_bad_arguments_of_perceiver_attention(arguments, error, message):
    layer = vnn.PerceiverAttention(**SIZES)
    with pytest.raises(error, match=message):
        layer(**{**features_and_latents(0), **arguments})


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (WIDTH,), "x: expected 3 to 5 dimensions, the last of size 32"),
        ({}, (2, 3, 9, 7), "x: expected 3 to 5 dimensions, the last of size 32"),
        ({}, (2, 5, 9, WIDTH), "x: expected at most 4 images, as there are embeddings, got 5"),
        ({"max_num_frames": 2}, (2, 3, 9, WIDTH), "x: expected shape .*, having frame_embs"),
        ({"max_num_frames": 2}, (2, 1, 3, 9, WIDTH), "x: expected at most 2 frames"),
        ({"max_num_media": 2}, (2, 3, 9, WIDTH), "x: expected at most 2 images"),
    ],
)
def test_bad_arguments_of_the_resampler(arguments, shape, message):
    layer = vnn.PerceiverResampler(**RESAMPLER, **arguments)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        layer(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    "layer",
    [
        vnn.MaskedCrossAttention,
        vnn.GatedCrossAttentionBlock,
        vnn.PerceiverAttention,
        vnn.PerceiverResampler,
    ],
)
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"dim": -1}, ValueError, "dim: expected at least 1, got -1"),
        ({"heads": 0}, ValueError, "heads: expected at least 1, got 0"),
        ({"dim_head": 0}, ValueError, "dim_head: expected at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "heads: expected an int, got float"),
    ],
)
def test_bad_sizes(layer, sizes, error, message):
    with pytest.raises(error, match=message):
        layer(**{"dim": WIDTH, **sizes})


def test_bad_sizes_of_single_layers():
    with pytest.raises(ValueError, match="dim_visual: expected at least 1, got 0"):
        vnn.MaskedCrossAttention(dim=WIDTH, dim_visual=0)
    for name in ("num_latents", "depth", "num_media_embeds", "max_num_media", "max_num_frames"):
        for bad, error in (
            (0, ValueError),
            (-1, ValueError),
            (2**63, ValueError),
            (1.5, TypeError),
        ):
            with pytest.raises(error, match=f"{name}: expected"):
                vnn.PerceiverResampler(dim=WIDTH, **{name: bad})
    for bad, error in ((0, ValueError), (-1, ValueError), (1e300, ValueError), ("4", TypeError)):
        for layer in (vnn.PerceiverResampler, vnn.GatedCrossAttentionBlock):
            with pytest.raises(error, match="ff_mult: expected"):
                layer(dim=WIDTH, ff_mult=bad)
