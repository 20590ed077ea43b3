"""What layers keep from one call to the next is given again only while it is right."""

import copy
import warnings

import pytest
import torch
from torch import nn

import vlmfast.functional as VF
from tools.samples import (
    FLAMINGO_SIZES,
    IMAGES,
    LATENTS,
    LOCATIONS,
    WIDTH,
    make_pair,
    text_and_media,
)
from vlmfast.kept import Copied, Keeper


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
    ours, _ = make_pair("MaskedCrossAttention", **FLAMINGO_SIZES)
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
    arguments[1] = arguments[1].view(len(LOCATIONS), 1, IMAGES * LATENTS, WIDTH)


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
    ours, _ = make_pair("MaskedCrossAttention", **FLAMINGO_SIZES)
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
    ours, _ = make_pair("MaskedCrossAttention", **FLAMINGO_SIZES)
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


def test_one_plan_serves_all_layers(monkeypatch):
    layers = [make_pair("GatedCrossAttentionBlock", **FLAMINGO_SIZES)[0] for _ in range(3)]
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


def test_compiled_after_decoding_projects_anew(decoding):
    torch._dynamo.reset()
    layer, arguments, _ = decoding
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(*arguments)
        layer.to_kv.weight.data.mul_(2)
        torch.testing.assert_close(compiled(*arguments), fresh(layer, *arguments))
